"""Every answer says which weights made it: over HTTP in a header, and in jobs on files."""

import csv
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pyarrow import parquet

from gserve import ConfigError, GatewayConfig, GserveError, LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.rows.fingerprint import path_beside
from tests.gserve_core.fake_servers import until
from tests.gserve_core.service.test_gateway import client

HEADER = "x-gserve-weight-version"
MESSAGES = [{"role": "user", "content": "a b c"}]
MAKING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "a b"}),
    ("/v1/completions", {"prompt": "a b", "stream": True}),
    ("/generate", {"prompts": ["a", "b"]}),
    ("/chat", {"conversations": [MESSAGES]}),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with weights: `v1` and `v2`."""
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    return tmp_path


@contextmanager
def launched(name: str | None = None, **engine: Any) -> Iterator[VLLMService]:
    echo = EchoEngine(show_weights=True, **engine)
    with VLLMService(LLMConfig("m"), ServeConfig(servers=1), engine=echo, gateway=GatewayConfig(), name=name) as it:
        yield it


def server_client(service: VLLMService) -> httpx.Client:
    """Return a client of the server itself, which sends its token."""
    (state,) = service.status()
    return httpx.Client(base_url=f"http://{state.address}", headers={"Authorization": f"Bearer {state.token}"})


def test_every_answer_over_http_names_the_weights_that_made_it(root: Path) -> None:
    with launched() as service, client(service) as gateway, server_client(service) as server:
        for version in ("0", "1"):
            if version != "0":
                service.update_weights(root / "v1", version=version)
            for asking in (gateway, server):
                for path, body in MAKING:
                    reply = asking.post(path, json=body)
                    assert (reply.status_code, reply.headers.get_list(HEADER)) == (200, [version]), path
                reply = asking.post("/v1/completions", json={"prompt": 1.5})
                assert (reply.status_code, reply.headers.get(HEADER)) == (400, version)
                assert HEADER not in asking.get("/v1/models").headers


def test_vectors_over_http_name_the_weights_that_made_them(root: Path) -> None:
    with launched(embedding=4) as service, client(service) as gateway:
        service.update_weights(root / "v1", version="1")
        assert gateway.post("/v1/embeddings", json={"input": ["a", "b"]}).headers[HEADER] == "1"


def test_a_stream_that_an_update_meets_is_of_the_version_in_its_head(root: Path) -> None:
    with launched(latency=0.02) as service, client(service) as gateway:
        body = {"prompt": " ".join(["a"] * 40), "max_tokens": 40, "stream": True}
        with gateway.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.headers[HEADER] == "0"
            update = threading.Thread(target=lambda: service.update_weights(root / "v1", version="1"))
            update.start()
            assert "weights=v1" not in reply.read().decode()
        update.join()
        assert gateway.post("/v1/completions", json={"prompt": "a"}).headers[HEADER] == "1"


def test_a_batch_that_two_versions_answer_names_both(root: Path) -> None:
    with launched(latency=0.02, capacity=1) as service, client(service) as gateway:
        replies: list[httpx.Response] = []
        body = {"prompts": ["a a a a a"] * 40}
        asking = threading.Thread(target=lambda: replies.append(gateway.post("/generate", json=body)))
        asking.start()
        until(lambda: service.status()[0].counters.items > 0)  # the first is told at once, later ones every 2 s
        service.update_weights(root / "v1", version="1")
        asking.join()
        versions = [item[0].get("weight_version", "0") for item in replies[0].json()]
        assert (versions[0], versions[-1]) == ("0", "1")
        assert replies[0].headers[HEADER] == "0, 1"


# ------------------------------------------------------------------------------------------------------------- on files


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts_of(output: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(path_beside(output).read_text())["facts"]
    return facts


@pytest.fixture
def attached(root: Path) -> Iterator[tuple[VLLMService, list[VLLMService]]]:
    """Return a service, and those that use it by its name and by its URL."""
    with launched("versions") as service:
        assert service.base_url is not None
        with VLLMService.attach("versions") as by_name, VLLMService.attach(service.base_url) as by_url:
            yield service, [by_name, by_url]


def test_a_job_is_continued_with_the_same_weights_only(
    attached: tuple[VLLMService, list[VLLMService]], root: Path
) -> None:
    service, others = attached
    source = root / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    outputs = [root / f"{number}.jsonl" for number in range(3)]
    service.update_weights(root / "v1", version="1")
    for one, output in zip([service, *others], outputs, strict=True):
        assert one.weights == service.weights
        one.run_file(source, output, limit=1)
        assert rows_of(output)[0]["weight_version"] == "1"
        facts = facts_of(output)
        assert (facts["weight_version"], facts["weight_folder"]) == ("1", str(root / "v1"))
    service.update_weights(root / "v2", version="2")
    for one, output in zip([service, *others], outputs, strict=True):
        with pytest.raises(ConfigError, match='was made with weight_version "1", not "2", and with weight_folder'):
            one.run_file(source, output)
    service.update_weights(root / "v1", version="1")
    for one, output in zip([service, *others], outputs, strict=True):
        assert one.run_file(source, output).done == 1
        assert [row["response"] for row in rows_of(output)] == ["a weights=v1", "b weights=v1"]


def test_a_job_may_begin_while_the_service_that_it_uses_restarts(root: Path) -> None:
    with launched("restarting") as service, VLLMService.attach("restarting") as attached:
        assert attached.model_facts()["weight_version"] is None
        service.shutdown()
        assert "weight_version" not in attached.model_facts()
        with pytest.raises(GserveError, match="no service named 'restarting'"):
            attached.weights_of()


def test_an_output_of_an_older_version_was_made_with_the_weights_of_the_start(root: Path) -> None:
    source, output = root / "in.jsonl", root / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with launched() as service:
        service.run_file(source, output, limit=1)
        assert "weight_version" not in rows_of(output)[0]
        known = json.loads(path_beside(output).read_text())
        facts = {name: value for name, value in known["facts"].items() if not name.startswith("weight_")}
        path_beside(output).write_text(json.dumps(known | {"facts": facts}))
        service.update_weights(root / "v1", version="1")
        with pytest.raises(ConfigError, match='was made without weight_version, not with "1"'):
            service.run_file(source, output)
    with launched() as service:
        assert service.run_file(source, output).done == 1


def test_jobs_that_an_update_meets_go_on_and_each_row_names_its_version(root: Path) -> None:
    source = root / "in.jsonl"
    source.write_text("".join(f'{{"prompt": "a {number} b c d"}}\n' for number in range(40)))
    outputs = [root / "out.jsonl", root / "out.csv", root / "out.parquet"]
    with launched(latency=0.01, capacity=1) as service:
        begun = {output: threading.Event() for output in outputs}

        def run(output: Path) -> None:
            service.run_file(
                source, output, on_progress=lambda progress: begun[output].set() if progress.done else None
            )

        jobs = [threading.Thread(target=run, args=(output,)) for output in outputs]
        for job in jobs:
            job.start()
        assert all(it.wait(30) for it in begun.values())
        service.update_weights(root / "v1", version="1")
        for job in jobs:
            job.join()
    for output in outputs:
        rows = read_rows_of(output)
        versions = {row["prompt"]: row.get("weight_version") or "0" for row in rows}
        assert set(versions.values()) == {"0", "1"}, output
        for row in rows:
            assert row["response"] == row["prompt"] + (" weights=v1" if versions[row["prompt"]] == "1" else "")
        assert facts_of(output)["weight_version"] is None


def read_rows_of(output: Path) -> list[dict[str, Any]]:
    match output.suffix:
        case ".csv":
            with output.open(newline="") as stream:
                return list(csv.DictReader(stream))
        case ".parquet":
            found: list[dict[str, Any]] = parquet.read_table(output).to_pylist()
            return found
    return rows_of(output)


def test_extra_names_the_version_of_the_start_too(root: Path) -> None:
    output = root / "out.jsonl"
    with launched() as service:
        source = root / "in.jsonl"
        source.write_text('{"prompt": "a"}\n')
        service.run_file(source, output, extra=True)
        table = service.map([{"prompt": "a"}])
        assert "weight_version" not in table[0]
        service.update_weights(root / "v1", version="1")
        assert service.map([{"prompt": "a"}])[0]["weight_version"] == "1"
    assert rows_of(output)[0]["weight_version"] == "0"
