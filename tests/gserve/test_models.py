"""A launched service with several models, as a user types the commands."""

import json

from tests.gserve.place import Place, eventually


def config(place: Place, **models: int) -> str:
    """Write a config whose models have these numbers of servers. The judge marks its answers, by their seeds."""
    sections = {
        name: {
            "llm": {"model_name": f"the-{name}"},
            "serve": {"servers": servers},
            "engine": {"type": "echo", "sample": name == "judge"},
        }
        for name, servers in models.items()
    }
    (place.folder / "demo.yaml").write_text(json.dumps({"models": sections, "serve": {"max_restarts": 3}}))
    return "demo.yaml"


def test_a_launched_service_has_several_models(place: Place) -> None:
    file = config(place, writer=2, judge=1)
    checked = place.run("check", file).stdout
    assert "# writer-1 of the model writer" in checked
    launch = place.start("launch", file)
    place.run("wait", "demo", "--model", "judge")
    assert "no model 'juge'; did you mean 'judge'" in place.run("wait", "demo", "--model", "juge", code=2).stderr

    assert "several models" in place.run("generate", "--attach", "demo", "a b", code=2).stderr
    assert place.run("generate", "--attach", "demo", "--model", "writer", "a b").stdout == "a b\n"
    assert place.run("generate", "--attach", "demo", "--model", "judge", "a b").stdout.startswith("a b seed-")
    said = place.run("chat", "--attach", "demo", "--model", "judge", stdin="hello\n").stdout
    assert said.startswith("hello seed-"), said
    place.write("in.jsonl", {"prompt": "c"})
    place.run("generate", "--attach", "demo", "--model", "judge", "-i", "in.jsonl", "-o", "out.jsonl")
    assert json.loads((place.folder / "out.jsonl").read_text())["response"].startswith("c seed-")

    (seen,) = json.loads(place.run("ps", "--json", "--model", "judge").stdout)["services"]
    assert [(it["name"], it["pool"], it["model"]) for it in seen["servers"]] == [("judge-0", "judge", "the-judge")]
    assert [(it["name"], it["status"]) for it in seen["models"]] == [("writer", "ok"), ("judge", "ok")]
    assert {line.partition("]")[0] for line in place.run("logs", "demo", "--model", "judge").stdout.splitlines()} == {
        "[judge-0"
    }
    for words in (["ps"], ["top", "demo"]):
        wrong = place.run(*words, "--model", "nope", code=2).stderr
        assert "this service has no model 'nope'; its models: 'writer', 'judge'" in wrong
    top = place.run("top", "demo", "--model", "writer").stdout
    assert "writer ok, judge ok" in top.replace("\n", " ")
    assert ("writer-1" in top, "judge-0" in top) == (True, False)

    assert "several models" in place.run("scale", "demo", "2", code=2).stderr
    scaled = place.run("scale", "demo", "2", "--model", "judge").stderr
    assert scaled == "'demo': 2 servers of writer, 2 servers of judge ready\n"
    config(place, writer=2, other=1)
    assert place.run("reload", "demo").stderr == "'demo': 2 servers of writer, 1 server of other ready\n"
    (seen,) = json.loads(place.run("ps", "--json").stdout)["services"]
    assert [(it["name"], it["generation"]) for it in seen["servers"]] == [
        ("other-0", 1), ("writer-0", 1), ("writer-1", 1)
    ]  # fmt: skip
    place.run("stop", "demo")
    assert launch.wait(30) == 0
    eventually(lambda: not place.servers())
