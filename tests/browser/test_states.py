"""What the page says when something is in the way, and how it goes on: real failures."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from servers import Server
from visits import Visit

PROMPT = "the quick brown fox"
# Slow enough to be seen at work: some 15 tokens a second.
TURN_S = 0.06


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Iterator[Server]:
    """A slow server for one at a time, with room for two that wait."""
    with start("--slots", "1", "--max-queue", "2", turn_s=TURN_S) as running:
        yield running.wait_ready()


@contextlib.contextmanager
def somebody_else(server: Server) -> Iterator[None]:
    """Another client, whose long request is being served or waits."""
    body = {"prompt": "the dog", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        yield


def idle(server: Server) -> bool:
    """Whether the engine has nothing to do."""
    metrics = server.metrics()
    return metrics["meshlm_samples_running"] + metrics["meshlm_samples_waiting"] == 0


def wait_until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


# The engine's queue


def test_waiting_is_told_with_the_position(visit: Visit, server: Server) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=3)
    with somebody_else(server):
        wait_until(lambda: not idle(server))
        with somebody_else(server):
            visit("#generate").click()
            notice = visit.notice("Waiting for a free place.")
            expect(notice).to_contain_text("1 sample waits before yours.")
    visit.wait_idle()
    expect(notice).to_be_hidden()
    assert len(visit.text) > len(PROMPT)


def test_a_full_server_says_when_to_try_again(visit: Visit, server: Server) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=3)
    with somebody_else(server):
        wait_until(lambda: not idle(server))
        with somebody_else(server), somebody_else(server):
            visit("#generate").click()
            notice = visit.notice("The server is full.")
            button = notice.get_by_role("button")
            expect(button).to_have_text(re.compile(r"^Try again in \d s$"))
            expect(button).to_be_disabled()
            expect(button).to_have_text("Try again")
    wait_until(lambda: idle(server))
    button.click()
    expect(visit("#status")).to_contain_text("Done: 3 tokens")
    expect(notice).to_be_hidden()


# Stopping


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_keeps_what_came_and_frees_the_server(visit: Visit, server: Server, how: str) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=100, seed=1)
    visit("#generate").click()
    expect(visit("#stats")).to_contain_text("tokens ·")
    expect(visit("#text")).to_have_attribute("aria-busy", "true")
    expect(visit("#text")).not_to_be_editable()
    if how == "key":
        visit.page.keyboard.press("Escape")
    else:
        expect(visit("#stop")).to_be_focused()
        visit("#stop").click()
    visit.wait_idle()
    expect(visit("#status")).to_contain_text("Stopped after")
    expect(visit("#text")).to_have_attribute("aria-busy", "false")
    assert len(visit.text) > len(PROMPT)
    wait_until(lambda: idle(server))
    visit.click("Undo")
    assert visit.text == PROMPT


# The text


def test_a_full_context_is_told_and_can_be_emptied(visit: Visit) -> None:
    visit.write("fox jumps " * 130)
    expect(visit("#count")).to_contain_text("full")
    visit("#generate").click()
    notice = visit.notice("The context is full.")
    expect(notice).to_contain_text("the context holds 128")
    visit.wait_idle()
    assert visit.requests() == []
    expect(visit("#stats")).to_have_text("")
    visit.write(PROMPT)
    visit.set(max_tokens=2)
    visit.generate()
    expect(notice).to_be_hidden()
    assert len(visit.text) > len(PROMPT)


def test_a_length_that_does_not_fit_is_shortened_aloud(visit: Visit) -> None:
    text = "the quick brown fox jumps over the lazy dog; " * 9
    visit.write(text)
    expect(visit("#count")).to_contain_text("room for")
    visit.set(max_tokens=100)
    visit.generate()
    (request,) = visit.requests()
    assert 0 < request["max_tokens"] < 100
    expect(visit("#stats")).to_contain_text(f"shortened to the {request['max_tokens']} tokens")


def test_a_model_that_writes_nothing(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=1, temperature=0, seed=1)
    visit.generate()
    written = visit.text.removeprefix(PROMPT)
    assert written
    visit.click("Undo")
    # What it writes is a stop text now.
    visit("#stop-text").fill(written.replace("\n", "\\n"))
    visit.click("Add")
    visit.generate()
    notice = visit.notice("The model wrote nothing.")
    assert visit.text == PROMPT
    visit("[aria-label^='Remove the stop text']").click()
    notice.get_by_role("button", name="Try again").click()
    visit.wait_idle()
    assert visit.text == PROMPT + written


# The server's life


def test_a_servers_life(context: BrowserContext, start: Callable[..., Server]) -> None:
    """It loads, wants a key, is cut off in a stream, comes back, shuts down, is gone."""
    key = "secret-of-the-page"
    options = ("--slots", "1", "--api-key", key)
    with start(*options, turn_s=TURN_S) as first:
        port = first.wait_listening().port
        visit = Visit(context.new_page(), first.url)
        visit.page.goto(first.url)
        notice = visit.notice("The model is loading.")
        expect(notice).to_contain_text("Now: ")
        expect(visit("#notice-progress")).to_be_visible()
        visit.wait_state("ready")
        give_key(visit, "wrong")
        expect(visit("#key-dialog")).to_be_visible()
        give_key(visit, key)
        expect(visit("#count")).to_contain_text("of 128")
        visit.write(PROMPT)
        visit.set(seed=1, max_tokens=30)
        visit("#generate").click()
        expect(visit("#stats")).to_contain_text("tokens ·")
        first.process.kill()
        visit.notice("The connection is lost.")
        expect(notice).to_contain_text("that had come are kept")
        kept = visit.text
        assert len(kept) > len(PROMPT)
        visit.wait_state("offline")
    with start(*options, "--port", str(port), turn_s=TURN_S) as second:
        visit.wait_state("ready")
        visit.notice("The server is ready.")
        # Another tab, where the key is given again.
        other = Visit(context.new_page(), first.url)
        other.page.goto(first.url)
        give_key(other, key)
        expect(other("#count")).to_contain_text("of 128")
        visit.page.bring_to_front()
        notice.get_by_role("button", name="Continue").click()
        expect(visit("#stats")).to_contain_text("tokens ·")
        assert visit.requests()[-1]["prompt"] == kept
        second.send(signal.SIGTERM)
        other.page.bring_to_front()
        other("#generate").click()
        other.notice("The server is shutting down.")
        assert second.wait_exit() == 0
        other.wait_state("offline")
        other.notice("No connection.")
        visit.page.bring_to_front()
        # What had begun was finished.
        visit.notice("No connection.")
        assert visit.text.startswith(kept)
        expect(visit("#stats")).to_contain_text("30 tokens ·")
    assert key not in json.dumps(visit.page.evaluate("Object.entries(localStorage)"))
    visit.check_clean()
    other.check_clean()


def give_key(visit: Visit, key: str) -> None:
    expect(visit("#key-dialog")).to_be_visible()
    visit("#key").fill(key)
    visit("#key").press("Enter")


def test_an_engine_that_fails(context: BrowserContext, start: Callable[..., Server]) -> None:
    with start("--slots", "1", turn_s=TURN_S, turns=20) as server:
        visit = Visit(context.new_page(), server.wait_ready().url).open()
        visit.write(PROMPT)
        visit.generate()
        notice = visit.notice("The server failed.")
        expect(notice).to_contain_text("that had come are kept")
        assert len(visit.text) > len(PROMPT)
        assert server.wait_exit() != 0
        visit.wait_state("offline")
        visit.check_clean()


# What a proxy or a long wait answers: not to be had from this server in time.


@pytest.mark.parametrize(
    ("status", "body", "title"),
    [
        (503, {"error": {"code": "timeout", "message": "After 600 s."}}, "This took too long."),
        (502, None, "The model is not ready."),
        (400, {"error": {"message": "top_k is odd"}}, "The server refused this request."),
        (500, {"error": {"code": "engine_error", "message": "NaN"}}, "The server failed."),
    ],
)
def test_other_answers_have_words(
    visit: Visit, status: int, body: dict[str, Any] | None, title: str
) -> None:
    text = "<html>Bad Gateway</html>" if body is None else json.dumps(body)
    with visit.page.context.expect_event("response"):
        visit.page.route(
            "**/v1/completions", lambda route: route.fulfill(status=status, body=text), times=1
        )
        visit.write(PROMPT)
        visit.set(max_tokens=2)
        visit("#generate").click()
    notice = visit.notice(title)
    if body is not None:
        expect(notice).to_contain_text(body["error"]["message"])
    visit.generate()
    expect(notice).to_be_hidden()
    assert len(visit.text) > len(PROMPT)


def test_a_broken_stream_without_an_end(visit: Visit, page: Page) -> None:
    event = {"choices": [{"index": 0, "text": " é", "finish_reason": None}]}
    cut = f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=cut), times=1)
    visit.write(PROMPT)
    visit("#generate").click()
    visit.notice("The connection is lost.")
