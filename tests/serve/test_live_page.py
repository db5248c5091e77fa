"""The live page, in a real browser against a real server: it shows what the API says, and only as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Running, Start, listening

from steeple.serve.auth import hashed
from steeple.serve.page import SCRIPTS, add_page, build

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROMPT = "class Box:"
TALK = [{"role": "user", "content": PROMPT}]
EVIL = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>"
LETTERS = {"accepted": "a", "recovered": "r", "bonus": "b", "plain": "p"}
WAIT = 60_000  # a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@contextmanager
def serving(running: Running) -> Iterator[str]:
    """A real server with the page."""
    if not any(getattr(route, "path", None) == "/" for route in running.app.routes):
        add_page(running.app, running.service)
    with listening(running) as url:
        yield url


@contextmanager
def opened(browser: Any, url: str, said: list[str] | None = None, **options: Any) -> Iterator[Any]:
    """The page; ``said`` gets what the console, errors and requests to elsewhere say."""
    page = browser.new_page(**options)
    page.set_default_timeout(WAIT)
    heard: list[str] = [] if said is None else said
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on(
        "request", lambda request: heard.append(request.url) if not request.url.startswith((url, "data:")) else None
    )
    page.goto(url)
    yield page
    page.close()


def shows(page: Any, selector: str, text: str) -> None:
    """Wait until an element's text has a match of ``text``."""
    page.locator(selector, has_text=re.compile(text)).first.wait_for(state="attached")


def answering(**answer: Any) -> Callable[[Any], None]:
    """For ``page.route``: this answer instead of the server's."""
    return lambda route: route.fulfill(**answer)


def write(page: Any, prompt: str, tokens: int, mode: str = "completion") -> None:
    page.check(f"[name=mode][value={mode}]")
    page.fill("#prompt", prompt)
    page.fill("#max", str(tokens))
    page.click("#send")


def spans(page: Any) -> list[list[str]]:
    """Origin and text of every token of the newest answer."""
    return page.evaluate(
        """() => [...[...document.querySelectorAll(".answer")].at(-1).querySelectorAll("[data-origin]")]
        .map((span) => [span.dataset.origin, span.textContent])"""
    )


def places(page: Any) -> Any:
    """Where the parts of the page are that numbers must not move."""
    return page.evaluate(
        """() => ["#tiles", "#speed", "#talk", "#prompt", "#send", "#pace"].map((name) => {
          const {x, y, width, height} = document.querySelector(name).getBoundingClientRect();
          return [name, x, y + scrollY, width, height];
        })"""
    )


def test_the_policy_lets_only_the_own_scripts_run() -> None:
    page, headers = build({"model": EVIL})
    html, policy = page.decode(), headers["Content-Security-Policy"]
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == len(SCRIPTS)
    for text in (*scripts, *re.findall(r"<style>(.*?)</style>", html, re.DOTALL)):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    markup = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)
    assert not re.search(r"\son[a-z]+\s*=|\sstyle\s*=|https?://", markup)
    facts = re.search(r'<script type="application/json" id="facts">(.*?)</script>', html, re.DOTALL)
    assert facts is not None
    assert json.loads(facts[1]) == {"model": EVIL}


def test_the_page_is_sent_with_its_policy(server: Running) -> None:
    with serving(server) as url:
        answer = httpx.get(url)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'sha256-" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_numbers_come_by_themselves(browser: Any, server: Running) -> None:
    said: list[str] = []
    with serving(server) as url, opened(browser, url, said, viewport={"width": 1280, "height": 900}) as page:
        shows(page, "#health", "^ready$")
        shows(page, "#done", "^0$")
        before = places(page)
        body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        off = {**body, "max_tokens": 8, "speculative": {"k": 0}}
        assert httpx.post(f"{url}/v1/completions", json=off, timeout=60).status_code == 200
        shows(page, "#done", "^2$")
        stats = httpx.get(f"{url}/stats").json()
        page.locator("#timeline tbody tr").nth(1).wait_for()
        speculation = stats["speculation"]
        assert page.text_content("#tau") == f"{speculation['tokens_per_round']:.2f}"
        shares = page.locator("#acceptance .value").all_text_contents()
        assert [float(text.removesuffix(" %")) / 100 for text in shares] == pytest.approx(
            speculation["acceptance_by_position"], abs=0.005
        )
        engine = stats["engine"]
        rest = engine["verify_seconds"] + engine["other_seconds"]
        gain = speculation["tokens_per_round"] * rest / (engine["draft_seconds"] + rest)
        assert page.text_content("#gain") == f"gain at most {gain:.2f}x"
        rows = [row.split("\n") for row in page.locator("#drafters tbody").inner_text().strip().split("\n")]
        assert [row[0].split("\t")[0] for row in rows] == list(stats["by_drafter"])
        assert page.text_content("#memory-parts tbody th") == next(iter(stats["memory"]["predicted"]))
        label = page.get_attribute("#timeline tbody tr:last-child canvas", "aria-label")
        rounds = len(re.findall("a*[rbp]|a+$", stats["recent"][0]["origins"])) - 1
        assert f"then {rounds} rounds" in label
        assert places(page) == before
        assert said == []


@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_tokens_are_coloured_and_their_text_is_the_answer(browser: Any, server: Running, mode: str) -> None:
    said: list[str] = []
    asked: dict[str, Any] = {"prompt": PROMPT} if mode == "completion" else {"messages": TALK}
    path = "/v1/completions" if mode == "completion" else "/v1/chat/completions"
    with serving(server) as url, opened(browser, url, said) as page:
        body = {**asked, "max_tokens": 60, "temperature": 0}
        choice = httpx.post(f"{url}{path}", json=body, timeout=60).json()["choices"][0]
        before = places(page)
        write(page, PROMPT, 60, mode)
        shows(page, "#status", "^Done: 60 tokens")
        found = spans(page)
        assert "".join(text for _, text in found) == (choice.get("text") or choice["message"]["content"])
        newest = httpx.get(f"{url}/stats").json()["recent"][-1]
        assert "".join(LETTERS[origin] for origin, _ in found) == newest["origins"]
        assert {"accepted", "recovered", "plain"} <= {origin for origin, _ in found}
        assert page.text_content("#count-tau") == f"{newest['tokens_per_round']:.2f}"
        for name, letter in LETTERS.items():
            assert page.text_content(f"#count-{name}") == str(newest["origins"].count(letter))
        assert places(page) == before
        # by keyboard, to the first token that can be seen
        page.focus("#talk")
        page.keyboard.press("ArrowRight")
        shows(page, "#token", r"^Token \d+, .* Round \d+, in which")
        # without a drafter the same text, and every token plain
        page.click("#clear")
        page.select_option("#drafter", "none")
        write(page, PROMPT, 60, mode)
        shows(page, "#count-plain", "^60$")
        shows(page, "#status", "^Done")
        assert [text for _, text in spans(page)] == [text for _, text in found]
        assert said == []


def test_a_chat_goes_on(browser: Any, server: Running) -> None:
    with serving(server) as url, opened(browser, url) as page:
        write(page, PROMPT, 6, "chat")
        shows(page, "#status", "^Done")
        first = "".join(text for _, text in spans(page))
        write(page, "more", 12, "chat")
        shows(page, "#status", "^Done: 12")
        turns = [*TALK, {"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
        body = {"messages": turns, "max_tokens": 12, "temperature": 0}
        choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
        assert "".join(text for _, text in spans(page)) == choice["message"]["content"]


def test_options_are_sent(browser: Any, server: Running) -> None:
    with serving(server) as url, opened(browser, url) as page:
        page.fill("#k", "2")
        page.fill("#temperature", "0.7")
        page.fill("#seed", "9")
        with page.expect_request("**/v1/completions") as sent:
            write(page, PROMPT, 5)
        shows(page, "#status", "^Done")
    assert json.loads(sent.value.post_data) == {
        "prompt": PROMPT, "max_tokens": 5, "temperature": 0.7, "seed": 9, "stream": True,
        "speculative": {"origins": True, "k": 2},
    }  # fmt: skip


def test_stop_frees_the_request(browser: Any, server: Running) -> None:
    step = server.engine.step

    def slow() -> Any:
        time.sleep(0.03)
        return step()

    server.engine.step = slow  # type: ignore[method-assign]
    with serving(server) as url, opened(browser, url) as page:
        write(page, PROMPT, 200)
        page.locator(".answer span").nth(3).wait_for(state="attached")
        assert page.is_disabled("#send")
        page.click("#stop")
        shows(page, "#status", r"^Stopped after \d+ tokens")
        assert page.is_enabled("#send")
        server.settle()
        assert server.loop.tally.outcomes == {"cancelled": 1}
        assert len(spans(page)) < 200


def test_a_full_queue_is_told(browser: Any, start: Start) -> None:
    server = start(queue_size=1, retry_after=7)
    step, entered, go = server.engine.step, threading.Event(), threading.Event()

    def held() -> Any:
        entered.set()
        go.wait(60)
        return step()

    server.engine.step = held  # type: ignore[method-assign]
    body = {"prompt": PROMPT, "max_tokens": 2}
    with serving(server) as url, ThreadPoolExecutor(2) as others, opened(browser, url) as page:
        try:
            waits = [others.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)]
            assert entered.wait(60)
            waits.append(others.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60))
            while not sum(server.loop.tenants.values()):
                time.sleep(0.01)
            write(page, PROMPT, 2)
            shows(page, "#status", "^429: .* 7 s")
            assert page.is_enabled("#send")
        finally:
            go.set()
        assert [wait.result().status_code for wait in waits] == [200, 200]
        assert httpx.get(f"{url}/stats").json()["turned_away"] == 1
        page.click("#send")
        shows(page, "#status", "^Done")


def test_a_key_is_asked_for_and_kept_in_memory_only(browser: Any, start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"one:{hashed('right-key')}\n")
    with serving(start(keys_file=keys)) as url, opened(browser, url) as page:
        shows(page, "#health", "^401: no API key was given")
        write(page, PROMPT, 4)
        shows(page, "#status", "^401: no API key")
        for key, health in (("wrong", "^401: the API key is not known"), ("right-key", "^ready$")):
            page.fill("#key", key)
            page.click("#key-form button")
            shows(page, "#health", health)
        assert page.is_hidden("#key-form")
        page.click("#send")
        shows(page, "#status", "^Done: 4")
        kept = page.evaluate(
            """() => JSON.stringify([localStorage, sessionStorage, document.cookie, location.href,
            document.documentElement.outerHTML, [...document.querySelectorAll("input")].map((item) => item.value)])"""
        )
        assert "right-key" not in kept


def test_markup_stays_text(browser: Any, start: Start) -> None:
    tokens = [{"id": 1, "text": EVIL, "origin": "accepted"}, {"id": 2, "text": "b", "origin": EVIL}]
    choice = {"index": 0, "text": f"{EVIL}b", "finish_reason": "length", "speculative": {"tokens": tokens}}
    stream = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    said: list[str] = []
    with serving(start(served_name=EVIL)) as url, opened(browser, url, said) as page:
        stats = httpx.get(f"{url}/stats").json()
        recent = {"id": EVIL, "outcome": EVIL, "prompt_tokens": 1, "completion_tokens": 1, "drafter": EVIL,
                  "tokens_per_round": 1.0, "first_token_seconds": 0.1, "seconds": 0.2, "origins": "p"}  # fmt: skip
        stats |= {
            "recent": [recent],
            "trouble": EVIL,
            "outcomes": {EVIL: 1},
            "by_drafter": {EVIL: stats["speculation"]},
        }
        page.route("**/stats", answering(json=stats))
        page.route("**/v1/completions", answering(content_type="text/event-stream", body=stream))
        write(page, EVIL, 4)
        shows(page, "#status", "^Done")
        shows(page, "#health", "^<img")
        assert [text for _, text in spans(page)] == [EVIL, "b"]
        assert page.text_content("#serving").startswith(EVIL)
        assert page.text_content("#timeline tbody th") == EVIL
        page.unroute("**/v1/completions")
        error = {"error": {"message": EVIL}}
        page.route("**/v1/completions", answering(status=400, json=error))
        page.click("#send")
        shows(page, "#status", "^400: <img")
        assert page.locator("img").count() == 0
        assert "run" not in (page.title(), page.evaluate("document.title"))
        assert [line for line in said if "400" not in line] == []


@pytest.mark.parametrize("told", [True, False])
def test_a_request_is_drawn_as_it_went(browser: Any, server: Running, told: bool) -> None:
    """Waiting, prompt and rounds at their times, a round as high as its tokens; evenly where times are not told."""
    request = {"id": "one", "outcome": "length", "prompt_tokens": 1, "completion_tokens": 8, "drafter": "near",
               "tokens_per_round": 3.5, "first_token_seconds": 0.5, "seconds": 1.0, "origins": "paaraaab"}  # fmt: skip
    if told:
        request |= {"waiting_seconds": 0.25, "round_seconds": [0.5, 0.6, 1.0]}
    with serving(server) as url, opened(browser, url, color_scheme="light") as page:
        stats = httpx.get(f"{url}/stats").json()
        page.route("**/stats", answering(json=stats | {"recent": [request]}))
        page.locator("#timeline canvas").wait_for()
        at = page.evaluate(
            """() => {
              const canvas = document.querySelector("#timeline canvas"), pen = canvas.getContext("2d");
              const spots = [[0.1, 0.1], [0.4, 0.1], [0.55, 0.6], [0.7, 0.6], [0.9, 0.1], [0.9, 0.9], [0.4, 0.6]];
              const dot = (x, y) => pen.getImageData(canvas.width * x, canvas.height * (1 - y), 1, 1);
              return spots.map(([x, y]) => [...dot(x, y).data].join());
            }"""
        )
        waiting, prompt, accepted, recovered, bonus = (
            "227,194,106,255", "185,190,199,255", "0,158,115,255", "213,94,0,255", "0,114,178,255"
        )  # fmt: skip
        second = accepted if told else recovered  # whether at 0.7 the second round has begun
        assert at == [waiting if told else prompt, prompt, recovered, second, accepted, bonus, "0,0,0,0"]


def test_the_text_ends_where_the_server_says(browser: Any, server: Running) -> None:
    """Tokens may say more than the text, which a stop string cut, or less, if half a character is left."""
    with serving(server) as url, opened(browser, url) as page:
        for pieces, text in ((["ab", "cd", "ef"], "abc"), (["ab", "", ""], "ab\ufffd"), (["ab", "c"], "abc")):
            tokens = [{"id": 1, "text": piece, "origin": "plain"} for piece in pieces]
            choice = {"index": 0, "text": text, "finish_reason": "stop", "speculative": {"tokens": tokens}}
            stream = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
            page.route("**/v1/completions", answering(content_type="text/event-stream", body=stream))
            page.click("#clear")
            write(page, PROMPT, 4)
            shows(page, "#status", "^Done")
            assert "".join(piece for _, piece in spans(page)) == text


def test_a_phone_has_no_sideways_scrolling_and_every_control_a_name(browser: Any, server: Running) -> None:
    options: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
    with serving(server) as url, opened(browser, url, **options) as page:
        write(page, PROMPT, 40)
        shows(page, "#status", "^Done")
        page.locator("#timeline tbody tr").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        before = places(page)
        page.focus("#talk")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        shows(page, "#token", "Round")
        assert places(page) == before
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea, canvas")]
            .filter((item) => !item.labels?.length && !item.getAttribute("aria-label")).map((item) => item.id)"""
        )
        assert unnamed == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark == "rgb(22, 24, 28)"
