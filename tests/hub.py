"""A stand-in for the model hub on loopback: it serves folders as models, and counts what it is asked for."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 1 << 20
GATED = "owner/gated"
LFS = (".safetensors", ".bin", ".pth")


@dataclass
class Hub:
    """The hub. `models`: folders by name. `asked`: counts the requests, as in "GET owner/model config.json".

    vLLM reads the headers of safetensors files: "GET the begin of owner/model model.safetensors".

    `before_chunk`: called before each part of a file is sent, with the file's path in its model and the position.
    """

    models: dict[str, Path]
    asked: Counter[str] = field(default_factory=Counter)
    before_chunk: Callable[[str, int], object] = lambda path, position: None
    ranges: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def environ(self) -> dict[str, str]:
        """The environment in which the hub is asked."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}

    def gets(self, name: str) -> dict[str, int]:
        """Return how often each file of a model was fetched."""
        before = f"GET {name} "
        return {key.removeprefix(before): count for key, count in self.asked.items() if key.startswith(before)}


@contextmanager
def running(models: dict[str, Path]) -> Iterator[Hub]:
    """Run a hub with these models."""
    hub = Hub(models)

    class Handler(_Handler):
        of = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/").replace("%2F", "/")
        is_api = path.startswith("api/models/")
        names = "/".join(path.removeprefix("api/models/").split("/")[:2])
        rest = path.removeprefix("api/models/").removeprefix(names).strip("/").split("/")
        if names == GATED:
            self._fail(401, "GatedRepo", names)
        elif names not in self.of.models:
            self._fail(404, "RepoNotFound", names)
        elif is_api and rest[0] == "revision" and rest[1] not in ("main", COMMIT):
            self._fail(404, "RevisionNotFound", names)
        elif is_api and rest[0] in ("", "revision"):
            self.of.asked[f"{self.command} {names} (which files)"] += 1
            self._send_json({"id": names, "sha": COMMIT, "siblings": self._siblings(names)})
        elif is_api and rest[0] == "tree" and len(rest) == 2:
            self._send_json(self._tree(names))
        elif rest[0] == "resolve":
            self._send_file(names, "/".join(rest[2:]))
        else:
            self._fail(404, "EntryNotFound", names)

    do_HEAD = do_GET

    def _files(self, name: str) -> list[Path]:
        folder = self.of.models[name]
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def _siblings(self, name: str) -> list[dict[str, Any]]:
        found = []
        for path in self._files(name):
            size = path.stat().st_size
            lfs = {"sha256": _etag(path), "size": size, "pointerSize": 130}
            own = {"rfilename": str(path.relative_to(self.of.models[name])), "size": size, "blobId": _etag(path)}
            found.append(own | ({"lfs": lfs} if path.suffix in LFS else {}))
        return found

    def _tree(self, name: str) -> list[dict[str, Any]]:
        found = []
        for it in self._siblings(name):
            own = {"type": "file", "path": it["rfilename"], "size": it["size"], "oid": it["blobId"]}
            lfs = {"oid": it["blobId"], "size": it["size"], "pointerSize": 130}
            found.append(own | ({"lfs": lfs} if "lfs" in it else {}))
        return found

    def _send_file(self, name: str, path: str) -> None:
        file = self.of.models[name] / path
        if not file.is_file():
            self._fail(404, "EntryNotFound", name)
            return
        size = file.stat().st_size
        start, end = 0, size
        if (wanted := self.headers.get("Range")) is not None and self.command == "GET":
            self.of.ranges.append(wanted)
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or size) + 1, size)
        what = self.command if end == size else "GET the begin of"
        self.of.asked[f"{what} {name} {path}"] += 1
        self.send_response(200 if (start, end) == (0, size) else 206)
        if (start, end) != (0, size):
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        with file.open("rb") as stream:
            stream.seek(start)
            while data := stream.read(min(CHUNK, end - stream.tell())):
                self.of.before_chunk(path, stream.tell() - len(data))
                try:
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True
                    return

    def _send_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _fail(self, status: int, code: str, name: str) -> None:
        self.of.asked[f"{name}: {code}"] += 1
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def _etag(path: Path) -> str:
    """Return the name of a file's content. The folder's name is part of it, since files may be large."""
    return hashlib.sha256(f"{path} {path.stat().st_size}".encode()).hexdigest()
