"""Images in messages: their forms, the files that a client reads, and what it refuses."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest

from gserve import BatchError, GatewayConfig, ItemError, LLMConfig, ServeConfig, VLLMClient, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import ConfigError
from gserve_core.images import FORMATS, MAX_FILE_BYTES, ImageFiles, summary
from gserve_core.messages import Conversation, ImageUrl, Message, Part
from gserve_core.run_requests import prompt_size
from tests.images import part, png, url

RED = png(255, 0, 0)
SHOWN = f"<image image/png {len(RED)} bytes>"


def ask(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts]}]


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    with VLLMService(LLMConfig("m"), ServeConfig(servers=1), engine=EchoEngine(), gateway=GatewayConfig()) as service:
        yield service


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a media root with images, beside files that it does not hold."""
    root = tmp_path / "root"
    (root / "cats").mkdir(parents=True)
    (root / "cats" / "a b.png").write_bytes(RED)
    (root / "inner.png").symlink_to(root / "cats" / "a b.png")
    (tmp_path / "secret.png").write_bytes(RED)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "text.png").write_text("no image")
    (root / "empty.png").touch()
    with (root / "large.png").open("wb") as file:
        file.write(RED)
        file.truncate(MAX_FILE_BYTES + 1)
    os.mkfifo(root / "pipe.png")
    return root


# ------------------------------------------------------------------------------------------------------------ the forms


@pytest.mark.parametrize(
    "given",
    [
        {"type": "image_url", "image_url": {"url": url(RED), "detail": "low"}},
        {"type": "image_url", "image_url": url(RED), "text": None},
        {"type": "input_image", "image_url": url(RED)},
        {"type": "image", "image": url(RED)},
    ],
)
def test_all_forms_of_an_image_become_the_one_of_openai(given: dict[str, Any]) -> None:
    expected = Message("user", [Part("image_url", image_url=ImageUrl(url(RED)))])
    made = msgspec.convert({"role": "user", "content": [given]}, Message)
    assert made == expected
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Message) == expected
    assert msgspec.to_builtins(made) == {"role": "user", "content": [part(url(RED))]}
    assert (made.texts, made.images) == ([], [url(RED)])


def test_a_text_has_no_image_whatever_else_its_part_holds() -> None:
    made = msgspec.convert({"type": "text", "text": "a", "image_url": {"url": None}, "image": "http://a"}, Part)
    assert made == Part("text", "a")


def test_images_count_for_the_size_of_a_prompt() -> None:
    (message,) = msgspec.convert(ask(part(url(RED)), part(url(RED))), list[Message])
    assert prompt_size(Conversation([message])) == 2 * len(url(RED))


@pytest.mark.parametrize("size", range(1, 7))
def test_the_summary_of_an_image_has_its_size(size: int) -> None:
    assert summary(url(b"a" * size, "jpeg")) == f"<image image/jpeg {size} bytes>"


# --------------------------------------------------------------------------------------------------- from the own files


@pytest.mark.parametrize("name", ["cats/a b.png", "./inner.png", "file://{root}/cats/a%20b.png", "{root}/cats/a b.png"])
def test_a_file_below_the_root_is_read(root: Path, name: str) -> None:
    name = name.format(root=root)
    for given in (part(name), {"type": "image", "image": name}, {"type": "input_image", "image_url": name}):
        assert ImageFiles(root).embed(ask(given)) == ask(part(url(RED)))


def test_what_is_no_file_stays_as_it_is(root: Path) -> None:
    messages = [
        {"role": "system", "content": "cats/a b.png"},
        *ask(part(url(RED)), {"type": "text", "text": "inner.png", "image_url": "inner.png"}, "inner.png"),
        Message("user", "a"),
        {"role": "assistant", "content": None},
        {"role": "assistant"},
    ]
    assert ImageFiles(root).embed(messages) == messages
    assert ImageFiles().embed(ask(part("inner.png"))) == ask(part("inner.png")), "without a root, a text is no path"
    assert ImageFiles(root).embed("inner.png") == "inner.png"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.png", "cannot read the image 'none.png': No such file or directory"),
        ("cats", "the image 'cats' is not a file"),
        ("pipe.png", "the image 'pipe.png' is not a file"),
        ("", "the image '' is not a file"),
        ("../secret.png", "the image '../secret.png' lies outside the media root"),
        ("link.png", "the image 'link.png' lies outside the media root"),
        ("up/secret.png", "the image 'up/secret.png' lies outside the media root"),
        ("/etc/passwd", "the image '/etc/passwd' lies outside the media root"),
        ("file:///etc/passwd", "the image 'file:///etc/passwd' lies outside the media root"),
        ("file://host/a.png", "the image 'file://host/a.png' is on another machine"),
        ("http://127.0.0.1/a.png", "the image 'http://127.0.0.1/a.png' is not fetched"),
        ("s3://bucket/a.png", "the image 's3://bucket/a.png' is not fetched"),
        ("a\0.png", "cannot read the image 'a\0.png': "),
        ("text.png", "the file 'text.png' is no image: expected PNG, JPEG"),
        ("empty.png", "the file 'empty.png' is no image"),
        ("large.png", "the image 'large.png' is larger than 20 MiB"),
        ("a" * 5000, "cannot read the image 'aaa"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_with_its_name(root: Path, name: str, told: str) -> None:
    with pytest.raises(ItemError) as caught:
        ImageFiles(root).embed(ask(part(name)))
    assert str(caught.value).startswith(told)
    assert len(str(caught.value)) < 400


def test_the_format_is_that_of_the_content(root: Path) -> None:
    webp = b"RIFF\x24\x00\x00\x00WEBPVP8 "
    for start, kind in (*FORMATS.items(), (webp, "webp")):
        (root / "any.png").write_bytes(start + b"rest")
        assert ImageFiles(root).embed(ask(part("any.png"))) == ask(part(url(start + b"rest", kind)))


def test_a_root_must_be_a_folder(root: Path) -> None:
    for wrong in (root / "none", root / "text.png"):
        with pytest.raises(ConfigError, match="is not a folder"):
            ImageFiles(wrong)


# ------------------------------------------------------------------------------------------------------ through servers


def test_images_come_to_the_engine_in_python(service: VLLMService, root: Path) -> None:
    chats = [
        ask({"type": "text", "text": "see"}, part(url(RED))),
        ask(part(root / "inner.png"), {"type": "text", "text": "seen"}),
        ask({"type": "image", "image": root / "link.png"}),
    ]
    expected = [f"see {SHOWN}", f"{SHOWN} seen", SHOWN]
    assert service.chat(chats) == [[text] for text in expected]
    assert service.base_url is not None
    with VLLMClient("127.0.0.1", urlsplit(service.base_url).port or 0, token=service.api_key) as client:
        assert client.chat(chats) == [[text] for text in expected]


def test_a_wrong_image_fails_its_item_alone(service: VLLMService, root: Path) -> None:
    wrong = [part("inner.png"), part("http://127.0.0.1/a.png"), part(root / "none.png"), part(7), part(None)]
    outcomes = service.chat([ask(part(url(RED))), *map(ask, wrong)], on_error="return")
    assert outcomes[0] == [SHOWN]
    told = [*map(str, outcomes[1:])]
    assert all(isinstance(outcome, ItemError) for outcome in outcomes[1:])
    assert "expected an image as 'data:image/png;base64,…', got 'inner.png': servers fetch no URL" in told[0]
    assert "got 'http://127.0.0.1/a.png'" in told[1]
    assert "none.png': No such file or directory" in told[2]
    assert "expected the URL of an image as a text, got int" in told[3]
    assert "a part of type 'image_url' needs 'image_url'" in told[4]


def test_the_rows_of_a_table_name_files_below_the_media_root(service: VLLMService, root: Path) -> None:
    rows = [
        {"messages": ask(part("inner.png"))},
        {"messages": ask(part("link.png"))},
        {"messages": np.array(ask(part("cats/a b.png")), dtype=object).tolist()},
    ]
    first, second, third = service.map(rows, chat=True, media_root=root)
    assert first["response"] == third["response"] == SHOWN
    assert "lies outside the media root" in second["error"]
    assert first["messages"] == ask(part("inner.png")), "the row is as it was"
    with pytest.raises(ConfigError, match="is not a folder"):
        service.map(rows, chat=True, media_root=root / "none")


def test_a_file_is_answered_with_the_images_beside_it(service: VLLMService, root: Path, tmp_path: Path) -> None:
    names = ["inner.png", "none.png", url(RED), "text.png"]
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(msgspec.json.encode({"id": name[:9], "messages": ask(part(name))}) for name in names))
    service.run_file(source, output, chat=True, media_root=root)
    answers = {row["id"]: row["response"] for row in map(msgspec.json.decode, output.read_bytes().splitlines())}
    assert answers == {"inner.png": SHOWN, url(RED)[:9]: SHOWN}
    failed = (tmp_path / "out.failed.jsonl").read_text()
    assert "cannot read the image 'none.png'" in failed
    assert "'text.png' is no image" in failed


def test_a_service_that_lost_no_item_still_refuses_all(service: VLLMService) -> None:
    with pytest.raises(BatchError, match="servers fetch no URL and read no file"):
        service.chat([ask(part("https://example.org/a.png"))])
