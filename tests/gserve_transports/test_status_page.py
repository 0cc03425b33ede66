"""The status page of a gateway, in a real browser."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gserve import GatewayConfig, LLMConfig, ModelConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from tests.browser import ENTER, TAB, Browser, browser
from tests.listeners import server_pid

MARKUP = "<b>bold</b><img src=x onerror=hacked=1><script>hacked=1</script>"
"""Text that would set a variable of the page if it were taken for HTML."""
CUT = "before the answer was complete"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    llm, serve = LLMConfig(f"m{MARKUP}", max_model_len=10_000), ServeConfig(servers=2, max_restarts=1000)
    gateway = GatewayConfig(api_key="the-key-of-the-tests")
    with VLLMService(llm, serve, engine=EchoEngine(latency=0.02), gateway=gateway, name="a-service") as made:
        yield made


def root(service: VLLMService) -> str:
    assert service.base_url is not None
    return service.base_url.removesuffix("v1")


@pytest.fixture
def closed(chromium: Browser, service: VLLMService) -> Iterator[Browser]:
    """A browser that shows the page, without a key."""
    chromium.open(root(service))
    chromium.run("sessionStorage.clear()")
    chromium.open(root(service))
    chromium.console()
    chromium.requests()
    yield chromium
    assert not chromium.run("return 'hacked' in window"), "markup was taken for HTML"
    errors = [message for message in chromium.console() if "the server responded with a status of" not in message]
    assert not errors
    asked = [url for url in chromium.requests() if not url.startswith("data:")]
    assert all(url.startswith(root(service)) for url in asked), asked
    assert not any("key" in url for url in asked)


@pytest.fixture
def page(closed: Browser, service: VLLMService) -> Browser:
    """A browser that shows the page, with the key, and that has the first status."""
    enter(closed, service.api_key or "")
    closed.until("document.querySelectorAll('#servers tr').length === 2 && document.querySelector('#model').value")
    return closed


def enter(browser: Browser, key: str) -> None:
    browser.type("#key", key + ENTER)


def say(page: Browser, prompt: str, *, tokens: int) -> None:
    """Send a message in the chat. `tokens`: maximum length of the answer."""
    page.run("document.querySelector('#prompt').value = arguments[0]", prompt)
    page.run("document.querySelector('#max-tokens').value = arguments[0]", tokens)
    page.type("#prompt", ENTER)


def servers(page: Browser) -> Any:
    """Return the cells of the table of servers, by title."""
    return page.run(
        "return [...document.querySelectorAll('#servers tr')].map(row => Object.fromEntries([...row.cells].map("
        "cell => [cell.dataset.label ?? (cell.tagName === 'TH' ? 'Server' : 'State'), cell.innerText])))"
    )


# ----------------------------------------------------------------------------------------------------------- the answer


def test_the_page_needs_no_key_and_holds_no_data(service: VLLMService) -> None:
    reply = httpx.get(root(service))
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["x-content-type-options"] == "nosniff"
    for secret in ("a-service", "server-0", "the-key", str(service.status()[0].port), service.status()[0].token):
        assert secret not in reply.text
    refused = httpx.post(root(service))
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
    assert httpx.post(root(service), headers={"x-api-key": service.api_key or ""}).status_code == 405


def test_the_policy_allows_the_pages_own_script_only(service: VLLMService) -> None:
    text = httpx.get(root(service)).headers["content-security-policy"]
    policy = dict(part.strip().split(" ", 1) for part in text.split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-")
    assert policy["style-src"].startswith("'sha256-")
    assert "unsafe" not in text
    assert "http" not in text


def test_the_page_names_no_other_host_and_sets_no_html(service: VLLMService) -> None:
    text = httpx.get(root(service)).text.replace("http://www.w3.org/2000/svg", "")
    for word in ("http:", "https:", "//cdn", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in text, word


def test_the_page_is_shown_under_the_gateways_own_names_only(service: VLLMService) -> None:
    reply = httpx.get(root(service), headers={"Host": "evil.example"})
    assert reply.status_code == 400
    assert "allowed_hosts" in reply.text


# ------------------------------------------------------------------------------------------------------------- the key


def test_without_a_key_only_the_form_is_shown(closed: Browser) -> None:
    assert closed.run("return document.activeElement.id") == "key"
    assert "API key" in closed.text("main")
    assert "Servers" not in closed.text("main")
    assert closed.requests()[1:] == [], "the page asked for something without a key"


def test_a_wrong_key_is_told_and_not_kept(closed: Browser, service: VLLMService) -> None:
    for given, told in (
        ("wrong-key", "This key is wrong."),
        ("wrong key", "This is no key: a key has no spaces, and ASCII characters only."),
        ("schlüssel", "This is no key: a key has no spaces, and ASCII characters only."),
    ):
        enter(closed, given)
        closed.until("document.querySelector('#key-error').textContent === arguments[0]", told)
        assert "Servers" not in closed.text("main")
        assert closed.run("return sessionStorage.length") == 0
    enter(closed, service.api_key or "")
    closed.until("document.querySelector('#servers').children.length === 2")
    assert closed.text("#key-error") == ""


def test_the_key_stays_in_this_tab_until_it_is_forgotten(page: Browser, service: VLLMService) -> None:
    assert page.run("return location.href + document.cookie + localStorage.length") == root(service) + "0"
    page.open(root(service))
    page.until("document.querySelector('#servers').children.length === 2")
    page.click("#forget")
    page.until("document.querySelector('#key')?.offsetParent && !document.querySelector('#servers').children.length")
    assert page.run("return sessionStorage.length") == 0
    assert page.text("h1") == "gserve"


# ----------------------------------------------------------------------------------------------------------- the status


def test_the_servers_are_shown_with_what_they_do(page: Browser, service: VLLMService) -> None:
    assert page.text("h1") == "a-service"
    assert page.text("#status") == "ok"
    for row, state in zip(servers(page), service.status(), strict=True):
        assert (row["Server"], row["State"], row["Restarts"]) == (state.name, "ready", "0")
        assert (row["Model"], row["Address"]) == (f"m{MARKUP}", str(state.address))
    page.until("document.querySelectorAll('polyline')[2].getAttribute('points').split(' ').length > 2")
    captions = [page.text(f"figure:nth-child({number}) figcaption span") for number in (1, 2, 3, 4)]
    assert captions == ["Tokens out", "Tokens in", "Requests", "Waiting"]


def test_servers_are_shown_that_begin_no_items(page: Browser, service: VLLMService) -> None:
    phases = "[...document.querySelectorAll('#servers small')].map(it => it.textContent).join(' ')"
    service.pause()
    try:
        page.until(f"{phases} === 'paused paused'")
    finally:
        service.resume()
    page.until(f"{phases} === ' '")


def test_a_death_is_shown_with_its_cause_and_cuts_the_answer(closed: Browser) -> None:
    llm, serve = LLMConfig("m", max_model_len=10_000), ServeConfig(servers=2, max_restarts=10)
    with VLLMService(llm, serve, engine=EchoEngine(latency=0.05), gateway=GatewayConfig()) as service:
        closed.open(root(service))
        enter(closed, service.api_key or "")
        closed.until("document.querySelector('#model').value")
        say(closed, "word " * 5000, tokens=5000)
        closed.until("document.querySelector('#chat-log article:last-child').innerText.includes('word word')")
        requests = "[...document.querySelectorAll('[data-label=Requests]')]"
        busy = closed.until(f"{requests}.findIndex(it => it.textContent === '1') + 1") - 1
        os.kill(server_pid(service.servers[busy]), signal.SIGKILL)
        closed.until("document.querySelector('#chat-log .error')?.textContent.includes(arguments[0])", CUT)
        closed.until("document.querySelector('#endings summary')")
        assert closed.text("#endings summary").startswith(f"server-{busy} (start 1) ")
        closed.click("#endings summary")
        assert "SIGKILL" in closed.text("#endings pre")
        closed.until("document.querySelector('#endings summary').innerText.includes('now in start 2')")
        closed.until("[...document.querySelectorAll('#servers .state')].every(it => it.textContent === 'ready')")
        assert [row["Restarts"] for row in servers(closed)] == [str(int(index == busy)) for index in (0, 1)]
        assert closed.run("return document.querySelector('#endings details').open"), "the next status closed it"
        assert not closed.run("return document.querySelector('#send').disabled")
    closed.until("document.querySelector('#trouble').innerText === 'The gateway does not answer.'")
    closed.open("about:blank")
    closed.console()
    closed.requests()


def test_two_models_are_shown_and_the_chat_asks_the_chosen_one(closed: Browser) -> None:
    models = {
        "writer": ModelConfig(LLMConfig("large-model", max_model_len=10_000), ServeConfig(servers=2)),
        "judge": ModelConfig(LLMConfig("small-model", max_model_len=10_000), ServeConfig(max_restarts=10)),
    }
    with VLLMService(models=models, engine=EchoEngine(latency=0.05), gateway=GatewayConfig(), name="two") as service:
        closed.open(root(service))
        enter(closed, service.api_key or "")
        closed.until("document.querySelector('#model').value")
        shown = {row["Server"]: row["Model"] for row in servers(closed)}
        assert shown == {"writer-0": "large-model", "writer-1": "large-model", "judge-0": "small-model"}
        assert closed.text("#about").endswith(", writer ok, judge ok")
        assert closed.run("return [...document.querySelector('#model').options].map(it => it.value)") == [*models]
        closed.run("document.querySelector('#model').value = 'judge'")
        say(closed, "word " * 5000, tokens=5000)
        busy = "[...document.querySelectorAll('#servers tr')].filter(row => row.innerText.includes(arguments[0]))"
        requests = f"{busy}.map(row => row.querySelector('[data-label=Requests]').textContent)"
        closed.until(f"{requests}.join() === '1'", "judge")
        assert closed.run(f"return {requests}", "writer") == ["0", "0"]
        assert closed.text("#chat-log article:last-child h3") == "judge"
        (judge,) = [index for index, state in enumerate(service.status()) if state.name == "judge-0"]
        os.kill(server_pid(service.servers[judge]), signal.SIGKILL)
        closed.until("document.querySelector('#chat-log .error')?.textContent.includes(arguments[0])", CUT)
        closed.until("document.querySelector('#endings summary')")
        assert closed.text("#endings summary").startswith("judge-0 (start 1) ")
        assert "writer ok" in closed.text("#about"), "the death of one model's server is none of the other's"
        closed.run("document.querySelector('#model').value = 'writer'")
        say(closed, "one two three", tokens=3)
        closed.until("document.querySelectorAll('#chat-log article')[3]?.innerText.includes('in all')")
        closed.until("document.querySelector('#about').textContent.endsWith(', writer ok, judge ok')")
        assert {row["Server"]: row["Restarts"] for row in servers(closed)} == {
            "writer-0": "0", "writer-1": "0", "judge-0": "1",
        }  # fmt: skip
    closed.until("document.querySelector('#trouble').innerText === 'The gateway does not answer.'")
    closed.open("about:blank")
    closed.console()
    closed.requests()


# ------------------------------------------------------------------------------------------------------------- the log


def test_the_log_of_a_server_is_followed(page: Browser, service: VLLMService) -> None:
    log = service.status()[1].log
    assert log is not None
    page.run("document.querySelector('#log-server').value = 'server-1'")
    page.run("document.querySelector('#log-server').dispatchEvent(new Event('change'))")
    for number in range(2):
        with log.open("a") as stream:
            stream.write(f"{MARKUP} {number}\nstep\rstep\r\x1b[31mred\x1b[0m\n")
        page.until("document.querySelector('#log').innerText.includes(arguments[0])", f"{MARKUP} {number}")
    assert page.text("#log").endswith("step\nstep\nred\n")
    assert page.text("#log").count(f"{MARKUP} 0\n") == 1
    is_at_end = "(box => box.scrollHeight - box.scrollTop - box.clientHeight < 2)(document.querySelector('#log'))"
    with log.open("a") as stream:
        stream.write("line\n" * 1000)
    page.until("document.querySelector('#log').innerText.endsWith('line\\n')")
    page.until(is_at_end)
    page.run("document.querySelector('#log').scrollTop = 0")
    with log.open("a") as stream:
        stream.write("last\n")
    page.until("document.querySelector('#log').innerText.endsWith('last\\n')")
    assert page.run("return document.querySelector('#log').scrollTop") == 0, "it moved away from what is read"


# ------------------------------------------------------------------------------------------------------------- the chat


def test_the_chat_streams_and_shows_markup_as_text(page: Browser) -> None:
    answer = "document.querySelectorAll('#chat-log article')[1]?.innerText"
    page.run(  # the page itself looks at the parts: this process may not look in time
        "window.parts = 0; new MutationObserver(() => {"
        f" const text = {answer} ?? ''; window.parts += text.includes('word word') && !text.includes('in all')"
        " }).observe(document.querySelector('#chat-log'), {childList: true, characterData: true, subtree: true})"
    )
    say(page, f"one {MARKUP} " + "word " * 60, tokens=60)
    page.until(f"{answer}?.includes('s in all')")
    assert page.run("return window.parts") > 0, "the answer came in one piece"
    assert page.run("return document.querySelectorAll('#chat-log article div')[1].textContent").startswith(
        f"one {MARKUP}"
    )
    assert page.run("return document.querySelectorAll('#chat-log b, #chat-log img').length") == 0


def test_an_answer_can_be_stopped_and_the_chat_goes_on(page: Browser) -> None:
    say(page, "word " * 2000, tokens=2000)
    page.until("document.querySelector('#chat-log').textContent.includes('word word')")
    page.click("#stop")
    page.until("document.querySelector('#chat-log').textContent.includes('stopped after')")
    page.until("[...document.querySelectorAll('[data-label=Requests]')].every(it => it.textContent === '0')")
    say(page, "again and again", tokens=20)
    page.until("document.querySelectorAll('#chat-log article')[3]?.innerText.includes('again and again')")
    page.until("document.querySelectorAll('#chat-log article')[3].innerText.includes('in all')")
    page.click("#clear")
    assert page.text("#chat-log") == ""


def test_an_error_of_the_chat_is_shown_and_the_next_message_goes_without_it(page: Browser) -> None:
    say(page, "word " * 10_001, tokens=1)
    page.until("document.querySelector('#chat-log .error')?.textContent.includes('10000')")
    say(page, "hello there my friend", tokens=2)
    page.until("document.querySelectorAll('#chat-log article')[3]?.innerText.includes('in all')")
    assert page.text("#chat-log article:last-child div") == "hello there"


# ------------------------------------------------------------------------------------------------------ hostile, narrow


def _received(listening: socket.socket) -> bytes:
    """Return what was sent to this socket, over the connections that have come. Browsers make some for no request."""
    found = b""
    listening.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(TimeoutError):
                connection.settimeout(0.2)
                found += connection.recv(1000)
    return found


@pytest.mark.parametrize(
    "attack",
    [
        "let it = document.createElement('script'); it.textContent = 'hacked = 1'; document.body.append(it)",
        "document.body.innerHTML = '<img src=x onerror=\"hacked = 1\">'",
        "let it = document.createElement('script'); it.src = 'data:,hacked=1'; document.body.append(it)",
        "let it = document.createElement('p'); it.setAttribute('onclick', 'hacked = 1'); it.click()",
        "let it = document.createElement('a'); it.href = 'javascript:hacked=1'; document.body.append(it); it.click()",
        "let it = new Image(); it.src = foreign",
        "fetch(foreign).catch(() => 0)",
        "navigator.sendBeacon(foreign, 'x')",
        "let it = document.createElement('iframe'); it.src = foreign; document.body.append(it)",
        "let it = document.createElement('form'); it.action = foreign; document.body.append(it); it.submit()",
    ],
)
def test_a_script_that_gets_in_can_do_nothing(closed: Browser, attack: str) -> None:
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.2", 0))
        foreign.listen()
        url = f"http://127.0.0.2:{foreign.getsockname()[1]}/"
        closed.run(f"let foreign = '{url}'; try {{ {attack} }} catch (error) {{ console.error(String(error)) }}")
        told, deadline = "", time.monotonic() + 10
        while "blocked" not in told and "Content Security Policy" not in told:
            assert time.monotonic() < deadline
            told += str(closed.console())
        assert not closed.run("return 'hacked' in window")
        assert _received(foreign) == b""
    closed.console()
    closed.requests()  # those that were blocked are among them


@pytest.mark.parametrize("width", [320, 400, 800, 1400])
def test_the_page_fits_its_width(page: Browser, width: int) -> None:
    try:
        page.resize(width, 900)
        assert page.run("return document.documentElement.scrollWidth") <= width
        inner = "main *:not(pre, #chat-log *, svg, svg *, option)"
        ends = f"[...document.querySelectorAll('{inner}')].map(it => it.getBoundingClientRect().right)"
        assert page.run(f"return Math.max(...{ends})") <= width
    finally:
        page.devtools("Emulation.clearDeviceMetricsOverride")


def test_every_field_has_a_label(page: Browser) -> None:
    fields = "[...document.querySelectorAll('input, select, textarea, button')]"
    assert page.run(f"return {fields}.length") == 11
    unnamed = page.run(f"return {fields}.filter(it => !(it.labels?.length || it.textContent.trim())).map(it => it.id)")
    assert unnamed == []


def test_everything_can_be_done_with_the_keyboard(page: Browser) -> None:
    reached = set()
    page.run("document.querySelector('#forget').focus()")
    for _ in range(12):
        page.press(TAB)
        reached.add(page.run("return document.activeElement.id"))
    wanted = {"log-server", "follow", "log", "model", "max-tokens", "clear", "chat-log", "prompt", "send"}
    assert wanted <= reached
    page.run("document.querySelector('#log-server').focus()")
    page.press("server-1")
    page.until("document.querySelector('#log-server').value === 'server-1'")
