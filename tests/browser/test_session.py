"""A whole session on the page, against a real server: what is shown is what the API says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from servers import Server
from visits import Visit

PROMPT = "the quick brown fox"


def answer(server: Server, **fields: Any) -> dict[str, Any]:
    """The API's own answer, asked for without the page."""
    response = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def replayed(server: Server, request: dict[str, Any]) -> list[str]:
    """The texts that the request gives when it is sent again and not streamed."""
    choices = answer(server, **{**request, "stream": False})["choices"]
    return [choice["text"] for choice in choices]


def as_shown(text: str) -> str:
    """A text as a text area holds it."""
    return text.replace("\r", "␍")


# Writing


def test_the_page_says_what_is_served(visit: Visit) -> None:
    expect(visit("#model-name")).to_have_text("tiny")
    expect(visit("#facts")).to_contain_text("context 128 · vocabulary 300")
    expect(visit("#state")).to_have_text("Ready")


def test_text_is_generated_as_the_api_gives_it(visit: Visit, server: Server) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=24, seed=7, temperature=0.7, top_p=0.9, top_k=30)
    visit.generate()
    (request,) = visit.requests()
    wanted = {"max_tokens": 24, "seed": 7, "temperature": 0.7, "top_p": 0.9, "top_k": 30}
    assert request.items() >= wanted.items()
    (text,) = replayed(server, request)
    assert visit.text == PROMPT + as_shown(text)
    assert visit.by_model == as_shown(text)
    expect(visit("#stats")).to_contain_text("24 tokens · ")
    expect(visit("#stats")).to_contain_text("tokens/s · first after ")
    expect(visit("#status")).to_contain_text("Done: 24 tokens")


def test_the_settings_under_more_and_stop_texts_are_sent(visit: Visit, server: Server) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=30, seed=3, min_p=0.02, repetition_penalty=1.3, logprobs=2)
    visit("#stop-text").fill("\\n")
    visit("#stop-text").press("Enter")
    visit("#stop-text").fill("Z")
    visit.click("Add")
    visit.generate()
    (request,) = visit.requests()
    wanted = {"min_p": 0.02, "repetition_penalty": 1.3, "logprobs": 2, "stop": ["\n", "Z"]}
    assert request.items() >= wanted.items()
    assert visit.text == PROMPT + as_shown(replayed(server, request)[0])
    visit("[aria-label='Remove the stop text \\\\n']").click()
    expect(visit(".chip")).to_have_count(1)


def test_what_is_off_is_not_sent(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=2)
    visit.generate()
    off = {"top_k", "min_p", "repetition_penalty", "stop", "n"}
    assert off.isdisjoint(visit.requests()[0])


def test_continue_undo_redo_and_regenerate(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=8)
    visit.generate()
    first = visit.text
    visit.click("Continue")
    visit.wait_idle()
    second = visit.text
    assert len(second) > len(first) > len(PROMPT)
    assert second.startswith(first)
    assert visit.requests()[1]["prompt"].startswith(PROMPT)
    visit.click("Regenerate")
    visit.wait_idle()
    third = visit.text
    assert third.startswith(first)
    assert third != second, "another seed each time"
    for wanted in (second, first, PROMPT):
        visit.click("Undo")
        assert visit.text == wanted
    visit.click("Redo")
    assert visit.text == first
    expect(visit("#redo")).to_be_enabled()


def test_a_person_can_type_anywhere_and_undo_it(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=8, seed=1)
    visit.generate()
    before, by_model = visit.text, visit.by_model
    area = visit("#text")
    area.press("Control+Home")
    area.press_sequentially("Yes, ")
    area.press("Control+End")
    area.press_sequentially(" no")
    assert visit.text == f"Yes, {before} no"
    assert visit.by_model == by_model
    expect(visit("#generate")).to_have_text("Generate")
    expect(visit("#regenerate")).to_be_disabled()
    for _ in range(4):
        if visit.text != before:
            area.press("Control+z")
    assert visit.text == before
    assert visit.by_model == by_model


def test_a_kept_seed_gives_the_same_text(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=8)
    visit.generate()
    first = visit.text
    visit.click("Keep last")
    visit.click("Regenerate")
    visit.wait_idle()
    assert visit.text == first
    assert visit.requests()[0]["seed"] == visit.requests()[1]["seed"]


def test_samples_side_by_side_one_of_which_is_used(visit: Visit, server: Server) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=10, n=3)
    visit.generate()
    texts = replayed(server, visit.requests()[0])
    assert visit(".sample-text").all_text_contents() == texts
    assert visit.text == PROMPT
    visit("[aria-label='Use this one, sample 2']").click()
    expect(visit("#samples")).to_be_hidden()
    assert visit.text == PROMPT + as_shown(texts[1])
    assert visit.by_model == as_shown(texts[1])
    visit.click("Undo")
    assert visit.text == PROMPT


def test_markup_is_text(visit: Visit) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    visit.write(markup)
    visit.set(max_tokens=4)
    visit.generate()
    visit.click("Probabilities")
    visit.click("Measure this text")
    expect(visit("#measure-result")).to_contain_text("Perplexity")
    visit.click("History")
    expect(visit(".history-text")).to_contain_text(markup)
    assert visit("main img, main script, dialog img, dialog script").count() == 0


# Probabilities


def labels(visit: Visit) -> list[str]:
    """What a screen reader is told of each token."""
    return visit("#tokens .token").evaluate_all("all => all.map((one) => one.ariaLabel)")


def test_each_token_has_its_probability_and_alternatives(visit: Visit, server: Server) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=12, seed=11, logprobs=4)
    visit.generate()
    visit.click("Probabilities")
    (request,) = visit.requests()
    logprobs = answer(server, **{**request, "stream": False})["choices"][0]["logprobs"]
    tokens = visit("#tokens .token")
    expect(tokens).to_have_count(12)
    limits = [0.75, 0.35, 0.12, 0.03, 0]
    shares = [math.exp(value) for value in logprobs["token_logprobs"]]
    wanted = [next(i for i, least in enumerate(limits) if share >= least) for share in shares]
    classes = tokens.evaluate_all("all => all.map((one) => one.className)")
    assert classes == [f"token step-{step}" for step in wanted], (logprobs, labels(visit))
    tokens.nth(5).click()
    panel = visit("#alternatives")
    expect(panel).to_be_visible()
    top = sorted(logprobs["top_logprobs"][5].values(), reverse=True)
    shares = [float(text.strip("<> %")) for text in visit(".choice-share").all_text_contents()]
    assert shares == pytest.approx([100 * math.exp(value) for value in top], abs=0.051)
    expect(visit(".choice.chosen")).to_have_count(1)
    visit.page.keyboard.press("Escape")
    expect(panel).to_be_hidden()


def test_hovering_shows_alternatives_and_leaving_hides_them(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=6)
    visit.generate()
    visit.click("Probabilities")
    visit("#tokens .token").nth(2).hover()
    expect(visit("#alternatives")).to_be_visible()
    visit("#alternatives").hover()
    visit.page.wait_for_timeout(400)
    expect(visit("#alternatives")).to_be_visible()
    visit("h1").hover()
    expect(visit("#alternatives")).to_be_hidden()


def test_opened_alternatives_stay_while_the_text_scrolls(visit: Visit) -> None:
    visit.write("the fox\n" * 25)
    visit.click("Probabilities")
    visit.click("Measure this text")
    expect(visit("#stats")).to_contain_text("tokens measured")
    visit("#tokens .token").nth(20).click()
    first = visit(".choice:not(:disabled)").first
    expect(first).to_be_focused()
    before = visit("#alternatives").bounding_box()
    visit.page.evaluate("document.getElementById('sheet').scrollTop += 60")
    visit.page.wait_for_timeout(300)
    after = visit("#alternatives").bounding_box()
    assert before is not None
    assert after is not None
    assert after["y"] != before["y"], "with its token"
    expect(first).to_be_focused()
    visit("h1").click()
    expect(visit("#alternatives")).to_be_hidden()


def test_going_on_from_a_token_with_another(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=12, seed=11, logprobs=8)
    visit.generate()
    before = visit.text
    visit.click("Probabilities")
    tokens = visit("#tokens")
    tokens.focus()
    # By the keyboard alone: to the second token, into its alternatives, take one.
    tokens.press("Home")
    tokens.press("ArrowRight")
    tokens.press("Enter")
    row = visit(".choice:not(.chosen):not(:disabled)").first
    chosen = row.locator(".choice-name").text_content() or ""
    row.focus()
    row.press("Enter")
    visit.wait_idle()
    first, second = visit.requests()
    # `visible` shows signs for white space.
    for sign, character in (("␣", " "), ("↵", "\n"), ("⇥", "\t"), ("␍", "\r")):
        chosen = chosen.replace(sign, character)
    assert second["prompt"].startswith(first["prompt"])
    assert second["prompt"].endswith(chosen)
    visit.click("Text")
    assert visit.text.startswith(as_shown(second["prompt"]))
    visit.click("Undo")
    assert visit.text == before


def test_the_prompt_is_measured(visit: Visit, server: Server) -> None:
    text = "the quick brown fox jumps over é漢 the lazy dog"
    visit.write(text)
    visit.click("Probabilities")
    visit.click("Measure this text")
    choice = answer(server, prompt=text, echo=True, max_tokens=0, logprobs=1)["choices"][0]
    values = choice["logprobs"]["token_logprobs"][1:]
    perplexity = math.exp(-sum(values) / len(values))
    said = f"Perplexity {perplexity:.2f} over the {len(values)} tokens."
    expect(visit("#measure-result")).to_have_text(said)
    names = visit("#tokens .token").evaluate_all(
        "all => all.map((one) => [...one.childNodes].filter((n) => n.nodeType === 3)"
        ".map((n) => n.data).join(''))"
    )
    assert "".join(names) == text
    assert len(names) == len(values) + 1


# Counting, examples, code


def test_tokens_are_counted_while_typing(visit: Visit, server: Server) -> None:
    visit("#text").press_sequentially("the lazy dog ")
    count = httpx.post(f"{server.url}/tokenize", json={"prompt": "the lazy dog "}).json()["count"]
    expect(visit("#count")).to_contain_text(f"{count} of 128 tokens")
    expect(visit("#count")).to_contain_text("ends with a space")
    assert len(visit.requests("/tokenize")) < 5, "after a pause, not for each letter"


def test_examples_bring_their_settings(visit: Visit) -> None:
    visit.click("Questions and answers")
    assert visit.text.endswith("Q: What is frozen water called?\nA:")
    assert visit("#set-temperature").input_value() == "0"
    expect(visit(".chip")).to_have_text(["\\n×"])
    visit.click("Examples")
    visit("[aria-label^='Use the example A story']").click()
    assert "unicorns" in visit.text
    visit.click("Clear")
    assert visit.text == ""


def test_the_code_runs_and_gives_what_the_page_gave(
    visit: Visit, server: Server, tmp_path: Path
) -> None:
    visit.write('it\'s "the" $HOME `fox`\n\\n')
    visit.set(max_tokens=12, seed=5, top_k=20)
    visit.click("Code")
    visit.click("Copy")
    expect(visit("#copy-message")).to_have_text("Copied.")
    command = visit.page.evaluate("navigator.clipboard.readText()")
    visit.click("Python")
    program = visit("#code").text_content() or ""
    visit.click("Close")
    visit.generate()
    (text,) = replayed(server, visit.requests()[0])
    silent = command.replace("curl ", "curl --silent ", 1)
    out = subprocess.run(["sh", "-c", silent], capture_output=True, check=True, timeout=60)
    assert json.loads(out.stdout)["choices"][0]["text"] == text
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, check=True, timeout=60, env={"PATH": ""}
    )
    assert done.stdout.decode().rstrip("\n") == text.rstrip("\n")


# What is kept


def test_history_restores_deletes_exports_and_imports(visit: Visit, tmp_path: Path) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=6, temperature=1.1)
    visit.generate()
    text, by_model = visit.text, visit.by_model
    visit.write("another")
    visit.set(temperature=0.2)
    visit.generate()
    visit.click("History")
    expect(visit("#history-list li")).to_have_count(2)
    with visit.page.expect_download() as download:
        visit.click("Export JSON")
    path = tmp_path / "history.json"
    download.value.save_as(path)
    assert [entry["text"] for entry in json.loads(path.read_text())["entries"]][1].startswith(
        PROMPT
    )
    visit.click("Delete all")
    expect(visit("#history-empty")).to_be_visible()
    visit("#history-file").set_input_files(path)
    expect(visit("#history-list li")).to_have_count(2)
    visit("#history-list li").nth(1).get_by_role("button", name="Restore").click()
    assert (visit.text, visit.by_model) == (text, by_model)
    assert visit("#set-temperature").input_value() == "1.1"
    visit.click("History")
    visit("#history-list li").nth(0).get_by_role("button", name="Delete").click()
    expect(visit("#history-list li")).to_have_count(1)
    path.write_text("{}")
    visit("#history-file").set_input_files(path)
    expect(visit("#history-message")).to_contain_text("not an exported history")


def test_two_tabs_share_one_history(visit: Visit, server: Server, context: BrowserContext) -> None:
    other = Visit(context.new_page(), server.url).open()
    for tab, text in ((visit, "one"), (other, "two"), (visit, "three")):
        tab.write(text)
        tab.set(max_tokens=3)
        tab.generate()
    entries = visit("#history-list li")
    visit.click("History")
    expect(entries).to_have_count(3)
    other.click("History")
    other("#history-list li").nth(1).get_by_role("button", name="Delete").click()
    expect(entries).to_have_count(2)
    visit.page.keyboard.press("Escape")
    # What the other tab deleted stays deleted when this one adds.
    visit.write("four")
    visit.generate()
    visit.click("History")
    texts = visit(".history-text").all_text_contents()
    assert [text[:3] for text in texts] == ["fou", "thr", "one"]
    expect(other("#history-list li")).to_have_count(3)
    other.check_clean()


def test_an_import_tells_what_there_was_no_room_for(visit: Visit, tmp_path: Path) -> None:
    visit.write("mine")
    visit.set(max_tokens=3)
    visit.generate()
    entry = {"time": "2999-01-01T00:00:00Z", "model": "m", "runs": [], "settings": {}}
    entries = [{**entry, "id": f"{i}", "text": f"{i} text"} for i in range(300)]
    path = tmp_path / "history.json"
    path.write_text(json.dumps({"format": "meshlm-history-1", "entries": entries}))
    visit.click("History")
    visit("#history-file").set_input_files(path)
    expect(visit("#history-message")).to_contain_text("300 read, 99 added, 201 left out: the his")
    expect(visit("#history-list li")).to_have_count(100)
    expect(visit(".history-text").last).to_contain_text("mine")


@pytest.mark.parametrize("size", [(1280, 800), (320, 640)])
def test_the_historys_buttons_lie_below_its_entries(visit: Visit, size: tuple[int, int]) -> None:
    visit.page.set_viewport_size({"width": size[0], "height": size[1]})
    for number in range(4):
        visit.write(f"{number} " + "many words " * 9)
        visit.set(max_tokens=2)
        visit.generate()
    visit.click("History")
    visit("#history-list li").last.scroll_into_view_if_needed()
    entries = visit("#history-list").bounding_box()
    button = visit("#export-history").bounding_box()
    assert entries is not None
    assert button is not None
    assert entries["y"] + entries["height"] <= button["y"]
    clips = "(list) => list.scrollHeight <= list.clientHeight || getComputedStyle(list).overflowY"
    assert visit("#history-list").evaluate(clips) in (True, "auto")


def test_a_reload_loses_nothing(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=6, temperature=0.33)
    visit.generate()
    text, by_model = visit.text, visit.by_model
    visit.page.reload()
    visit.wait_state("ready")
    assert (visit.text, visit.by_model) == (text, by_model)
    assert visit("#set-temperature").input_value() == "0.33"


def test_a_shared_link_opens_text_and_settings_elsewhere(
    visit: Visit, server: Server, context: BrowserContext
) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=6, temperature=0.41)
    visit.generate()
    visit.click("Share")
    expect(visit("#share")).to_have_text("Link copied")
    link = visit.page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{server.url}/#s=")
    browser = context.browser
    assert browser is not None
    with browser.new_context() as elsewhere:
        other = Visit(elsewhere.new_page(), server.url).open(link.rpartition("/")[2])
        assert (other.text, other.by_model) == (visit.text, visit.by_model)
        assert other("#set-temperature").input_value() == "0.41"
        assert "#" not in other.page.url, "a reload would lose what is written later"
        other.check_clean()


@pytest.mark.parametrize("fragment", ["#s=", "#s=%%%", "#s=eyJ0ZXh0Ijoi", "#s=eyJ0ZXh0IjoxfQ"])
def test_a_damaged_link_is_told_and_changes_nothing(visit: Visit, fragment: str) -> None:
    visit.write(PROMPT)
    visit.page.evaluate("(fragment) => { location.hash = fragment; }", fragment)
    notice = visit.notice("This link is damaged.")
    expect(notice).to_contain_text("ask for it again")
    assert visit.text == PROMPT
    notice.get_by_role("button", name="Close").click()
    expect(notice).to_be_hidden()
    visit.page.wait_for_timeout(500)
    visit.page.goto("about:blank")
    visit.open(fragment)
    visit.notice("This link is damaged.")
    assert visit.text == PROMPT


def test_half_a_character_is_sent_as_the_sign_for_it(visit: Visit) -> None:
    visit("#text").evaluate(
        "(area) => { area.value = 'a\\ud83d b 🙂'; area.dispatchEvent(new Event('input')); }"
    )
    visit.set(max_tokens=2)
    visit.generate()
    assert visit.requests()[0]["prompt"] == "a� b 🙂"
    expect(visit("#status")).to_contain_text("Done")


def test_the_theme_is_chosen_and_kept(visit: Visit) -> None:
    def paper() -> str:
        return visit.page.evaluate("getComputedStyle(document.body).backgroundColor")

    visit.page.emulate_media(color_scheme="dark")
    dark = paper()
    visit.click("Theme: auto")
    light = paper()
    assert light != dark
    visit.page.reload()
    expect(visit("#theme")).to_have_text("Theme: light")
    assert paper() == light
    visit.click("Theme: light")
    assert paper() == dark


def test_the_keyboard_generates(visit: Visit) -> None:
    visit.write(PROMPT)
    visit.set(max_tokens=4)
    visit("#text").press("Control+Enter")
    expect(visit("#status")).to_contain_text("Done")
    visit.wait_idle()
    assert len(visit.text) > len(PROMPT)


def test_the_page_needs_no_server_but_its_own(page: Page, server: Server) -> None:
    response = page.goto(server.url)
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
