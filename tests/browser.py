"""Headless Chromium, driven over WebDriver (https://www.w3.org/TR/webdriver2/)."""

import base64
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gserve_core.testing import RUN_VARIABLE

PROGRAMS = ("chromium", "chromedriver")
ENTER, TAB = "\ue007", "\ue004"
"""Keys, as WebDriver spells them."""
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window of a browser. `console` and `requests` return what came since the last call."""

    def __init__(self, asking: httpx.Client, session: str) -> None:
        self._asking = asking
        self._session = session

    def _do(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        reply = self._asking.request(method, f"/session/{self._session}{path}", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["value"]

    def devtools(self, command: str, **params: Any) -> Any:
        """Send a command of the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""
        return self._do("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self._do("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; return what it returns."""
        return self._do("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """Return the visible text of the first element that a CSS selector finds; "" if there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def _find(self, selector: str) -> str:
        found = self._do("POST", "/element", {"using": "css selector", "value": selector})
        return str(found[_ELEMENT])

    def click(self, selector: str) -> None:
        """Click an element, as a mouse does."""
        self._do("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type text into an element, as a keyboard does."""
        self._do("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, keys: str) -> None:
        """Press keys where the focus is."""
        presses = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._do("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": presses}]})

    def until(self, script: str, *arguments: Any, seconds: float = 20.0) -> Any:
        """Wait until an expression of JavaScript is true; return its value."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(f"return {script}", *arguments)):
            assert time.monotonic() < deadline, f"not so within {seconds:g} s: {script}\n{self.text('body')}"
            time.sleep(0.02)
        return found

    def resize(self, width: int, height: int) -> None:
        """Give the page this size, as a phone has it for one."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def console(self) -> list[str]:
        """Return the messages of the console."""
        return [entry["message"] for entry in self._do("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return the URLs that the page asked for."""
        entries = self._do("POST", "/se/log", {"type": "performance"})
        found = (re.search(r'"method":"Network.requestWillBeSent".*?"url":"([^"]*)"', it["message"]) for it in entries)
        return [it[1] for it in found if it is not None]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile. Skips the test where there is none."""
    if not all(map(shutil.which, PROGRAMS)):
        pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)")
    environ = {name: value for name, value in os.environ.items() if name != RUN_VARIABLE}  # a browser forks at any time
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=environ | dict.fromkeys(("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), str(profile)),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = next(found[1] for line in process.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        options = {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as asking:
            reply = asking.post("/session", json={"capabilities": {"alwaysMatch": options}})
            assert reply.status_code == 200, reply.text
            session = reply.json()["value"]["sessionId"]
            try:
                yield Browser(asking, session)
            finally:
                asking.delete(f"/session/{session}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
