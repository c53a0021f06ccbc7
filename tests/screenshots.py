"""Takes the pictures of the page in docs/images: `screenshots.py RUN`, a run that is trained.

make demo
.venv/bin/python tests/screenshots.py demo/run
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, expect, sync_playwright

from servers import Server
from visits import Visit

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
Scheme = Literal["light", "dark"]
WIDE = (1280, 800)
NARROW = (320, 700)
PROMPT = '''import os


def read_lines(path):
    """Returns the lines of a file."""
'''


def main(run: str) -> None:
    """Serves the run and writes the pictures."""
    IMAGES.mkdir(exist_ok=True)
    with Server(Path(run), "--model-id", "demo") as server, sync_playwright() as playwright:
        server.wait_ready(600)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        text(browser, server, "page-light", "light", WIDE)
        text(browser, server, "page-dark", "dark", WIDE)
        text(browser, server, "page-narrow", "light", NARROW)
        tokens(browser, server)
        samples(browser, server)
        browser.close()


def written(browser: Browser, server: Server, scheme: Scheme, size: tuple[int, int]) -> Visit:
    """A page on which the model has gone on from the prompt."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
    )
    visit = Visit(context.new_page(), server.url).open()
    visit.write(PROMPT)
    visit.set(temperature=0.6, max_tokens=96, seed=4)
    if size == NARROW:
        visit("#settings > summary").click()
    visit.generate()
    expect(visit("#status")).to_contain_text("Done")
    return visit


def picture(visit: Visit, name: str) -> None:
    """Writes what is seen now, and leaves the page."""
    visit("h1").hover()
    visit.page.wait_for_timeout(600)
    visit.page.screenshot(path=IMAGES / f"{name}.png")
    visit.check_clean()
    visit.page.context.close()


def text(
    browser: Browser, server: Server, name: str, scheme: Scheme, size: tuple[int, int]
) -> None:
    """The text, with the model's part marked."""
    visit = written(browser, server, scheme, size)
    visit.page.evaluate("scrollTo(0, 0); document.getElementById('sheet').scrollTop = 0")
    picture(visit, name)


def tokens(browser: Browser, server: Server) -> None:
    """Probabilities, and the alternatives of one token."""
    visit = written(browser, server, "light", WIDE)
    visit.click("Probabilities")
    visit.click("Measure this text")
    expect(visit("#stats")).to_contain_text("tokens measured")
    visit("#tokens .step-3").nth(3).click()
    visit.page.wait_for_timeout(300)
    visit.page.screenshot(path=IMAGES / "page-tokens.png")
    visit.check_clean()
    visit.page.context.close()


def samples(browser: Browser, server: Server) -> None:
    """Three samples side by side."""
    visit = written(browser, server, "dark", WIDE)
    visit.click("Undo")
    visit.set(n=3, max_tokens=64)
    visit.generate()
    expect(visit("#samples")).to_be_visible()
    picture(visit, "page-samples")


if __name__ == "__main__":
    main(sys.argv[1])
