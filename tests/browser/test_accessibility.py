"""The page for everybody: axe-core, keyboard, screen readers, narrow screens, contrast."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, ViewportSize, expect

from servers import Server
from visits import Visit

TOUCH_PX = 44
PROMPT = "the quick brown fox"


@pytest.fixture(params=[(s, w) for s in ("light", "dark") for w in (320, 1280)], ids=str)
def visit(request: pytest.FixtureRequest, browser: Browser, server: Server) -> Iterator[Visit]:
    """The page in each theme, narrow and wide."""
    scheme, width = request.param
    size = ViewportSize(width=width, height=800)
    with browser.new_context(viewport=size, color_scheme=scheme) as context:
        visit = Visit(context.new_page(), server.url).open()
        yield visit
        visit.check_clean()


def check(visit: Visit, axe_source: str) -> None:
    """No violation, nothing beside the screen, everything large enough for a finger."""
    if not visit.page.evaluate("'axe' in window"):
        visit.page.evaluate(axe_source)
    found = visit.page.evaluate("axe.run({ resultTypes: ['violations'] })")
    told = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]]
    assert told == []
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = visit.page.evaluate(
        """(least) => [...document.querySelectorAll("button, input, select, summary")]
          .filter((one) => one.checkVisibility({ visibilityProperty: true }))
          .map((one) => [one.outerHTML, one.getBoundingClientRect()])
          .filter(([, { width, height }]) => Math.min(width, height) < least - 0.01)
          .map(([html, { width, height }]) => `${width} x ${height}: ${html}`)""",
        TOUCH_PX,
    )
    assert small == []


def test_every_view_is_free_of_violations(visit: Visit, axe_source: str) -> None:
    check(visit, axe_source)
    visit.unfold("#settings")
    visit.unfold(".more")
    visit("#stop-text").fill("END")
    visit.click("Add")
    visit.write(PROMPT)
    visit.set(max_tokens=12, seed=2)
    visit.generate()
    check(visit, axe_source)
    visit.click("Probabilities")
    visit.click("Measure this text")
    expect(visit("#stats")).to_contain_text("tokens measured")
    visit("#tokens .token").nth(3).click()
    check(visit, axe_source)
    visit.page.keyboard.press("Escape")
    visit.click("Text")
    visit.set(n=3)
    visit.generate()
    expect(visit("#samples")).to_be_visible()
    visit.write("fox jumps " * 130)
    visit("#generate").click()
    visit.notice("The context is full.")
    check(visit, axe_source)
    for name in ("History", "Code", "Examples"):
        visit.click(name)
        check(visit, axe_source)
        visit.page.keyboard.press("Escape")


# Colours


def luminance(color: str) -> float:
    """Relative luminance, as WCAG 2 defines it, of "rgb(r, g, b)"."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def style_of(visit: Visit, selector: str) -> dict[str, Any]:
    return visit(selector).first.evaluate(
        """(one) => {
          const { color, backgroundColor, textDecorationLine, textDecorationStyle,
                  textDecorationColor, textDecorationThickness } = getComputedStyle(one);
          return { color, backgroundColor, line: [textDecorationLine, textDecorationStyle,
                   textDecorationColor, textDecorationThickness].join(" ") };
        }"""
    )


def test_text_stands_out_from_its_marks(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=4)
    visit.generate()
    # axe does not look under a text area, where the model's part is marked.
    ink = style_of(visit, "#text")["color"]
    assert contrast(ink, style_of(visit, "#mirror .by-model")["backgroundColor"]) >= 4.5
    visit.click("Probabilities")
    lines = set()
    for step in range(1, 5):
        style = style_of(visit, f"#legend-steps .step-{step}")
        assert contrast(style["color"], style["backgroundColor"]) >= 4.5
        lines.add(style["line"])
    lines.add(style_of(visit, "#legend-steps .step-0")["line"])
    assert len(lines) == 5, "never by colour alone"


# Keyboard and screen readers


def test_the_keyboard_reaches_everything_and_shows_where_it_is(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=4)
    visit.generate()
    # From the top of a fresh page.
    visit.page.reload()
    visit.wait_state("ready")
    reached: list[str] = []
    while True:
        visit.page.keyboard.press("Tab")
        name, is_seen, is_new = visit.page.evaluate(
            """() => {
              window.reached ??= new Set([document.body]);
              const one = document.activeElement;
              const isNew = !reached.has(one);
              reached.add(one);
              const shown = (node) => getComputedStyle(node).outlineStyle !== "none";
              const isSeen = shown(one) || shown(one.closest(".sheet") ?? one);
              return [one.id || one.textContent, isSeen, isNew];
            }"""
        )
        if not is_new:
            break
        assert is_seen, name
        reached.append(name)
    wanted = ["To the text", "open-history", "open-code", "share", "theme", "view-text"]
    wanted += ["view-tokens", "open-examples", "clear", "text", "generate", "regenerate"]
    assert [name for name in reached if name in wanted] == wanted, "in the order of reading"


def test_the_skip_link_leads_into_the_text(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.click("Probabilities")
    visit(".skip").focus()
    visit(".skip").press("Enter")
    expect(visit("#text")).to_be_focused()
    visit.page.keyboard.type("!")
    assert visit.text == f"{PROMPT}!"


def test_a_screen_reader_is_told_once_and_not_by_the_stream(visit: Visit) -> None:
    assert visit("[role=status]").count() == 1
    assert visit("[aria-live], [role=alert], [role=log]").count() == 0
    visit.page.evaluate(
        """() => {
          window.said = [];
          const node = document.getElementById("status");
          const hear = new MutationObserver(() => said.push(node.textContent));
          hear.observe(node, { childList: true });
        }"""
    )
    visit.write(PROMPT)
    visit.set(max_tokens=12, seed=2)
    visit.generate()
    expect(visit("#status")).to_contain_text("Done")
    said = visit.page.evaluate("said")
    assert [words.split(":")[0] for words in said] == ["Generating.", "Done"]


def test_nothing_moves_for_those_who_want_it_still(visit: Visit) -> None:
    visit.page.emulate_media(reduced_motion="reduce")
    moving = "document.getAnimations().filter((one) => one.playState === 'running').length"
    visit.page.evaluate("document.getElementById('notice').hidden = false")
    visit.page.evaluate("document.getElementById('notice-progress').hidden = false")
    assert visit.page.evaluate(moving) == 0
    visit.page.emulate_media(reduced_motion="no-preference")
    assert visit.page.evaluate(moving) == 1
