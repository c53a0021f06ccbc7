"""A real Chromium, the page of a real server, and what a person does on it.

`axe.min.js` beside this file is axe-core 4.14.1 as its npm package has it, under the MPL-2.0
(`axe.LICENSE`): these tests alone use it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from servers import Server, write_checkpoint
from visits import Visit

HERE = Path(__file__).resolve().parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
IN_CI = os.environ.get("CI") == "true"


def find_chromium() -> str | None:
    """The browser to use: CHROMIUM's, or the first on PATH."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


CHROMIUM = find_chromium()
NO_BROWSER = "BROWSER TESTS SKIPPED: no Chromium here; `make browser` installs Debian's"


def pytest_runtest_setup(item: pytest.Item) -> None:
    # In CI a skip would be a hole that nobody sees.
    if CHROMIUM is None:
        (pytest.fail if IN_CI else pytest.skip)(NO_BROWSER)


# Not for the session: playwright's loop runs in this thread while it is open, and tests of other
# modules that pytest runs in the same process could not start one of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def start(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Server]:
    """Starts a server on the checkpoint; the second one finds compiled what the first one did."""
    cache = tmp_path_factory.mktemp("compiled")

    def begin(*options: str, **more: Any) -> Server:
        return Server(checkpoint, "--compile-cache", str(cache), *options, **more)

    return begin


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Iterator[Server]:
    """A server that is ready, one a module."""
    with start("--slots", "2") as running:
        yield running.wait_ready()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(30_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


@pytest.fixture
def visit(page: Page, server: Server) -> Iterator[Visit]:
    """Somebody on the page of the server, who notices what went wrong unseen."""
    visit = Visit(page, server.url).open()
    yield visit
    visit.check_clean()


@pytest.fixture(scope="session")
def axe_source() -> str:
    return (HERE / "axe.min.js").read_text()
