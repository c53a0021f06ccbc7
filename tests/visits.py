"""What a person does on the server's page, and what must not happen meanwhile."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import ConsoleMessage, Locator, Page, Request, expect

# What Chromium itself says of answers that are not 200.
FAILED_ANSWER = "Failed to load resource"


class Visit:
    """Somebody who has the page open."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.faults: list[str] = []
        self.sent: list[tuple[str, Any]] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        bad = message.type in ("error", "warning")
        if bad and not message.text.startswith(FAILED_ANSWER):
            self.faults.append(message.text)

    def _on_request(self, request: Request) -> None:
        address = urlsplit(request.url)
        own = address.scheme in ("data", "blob") or request.url.startswith(self.url)
        if not own:
            self.faults.append(f"asked {request.url}")
        if request.method == "POST":
            self.sent.append((address.path, json.loads(request.post_data or "null")))

    def check_clean(self) -> None:
        """No error of a script, no violation of the policy, no request to elsewhere."""
        assert self.faults == []

    def open(self, fragment: str = "") -> Visit:
        self.page.goto(f"{self.url}/{fragment}")
        self.wait_state("ready")
        expect(self("#count")).to_contain_text(" of ")
        return self

    def __call__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def click(self, name: str) -> None:
        """Presses the button with exactly this text."""
        self.page.get_by_role("button", name=name, exact=True).click()

    def wait_state(self, state: str) -> None:
        self.page.wait_for_selector(f"#state[data-state={state}]")

    def wait_idle(self) -> None:
        expect(self("#generate")).to_be_visible()

    def write(self, text: str) -> None:
        """Puts text in the place of all there is."""
        self("#text").fill(text)

    def generate(self) -> None:
        """Presses Generate, or Continue, and waits for the end."""
        self("#generate").click()
        self.wait_idle()

    def unfold(self, selector: str) -> None:
        if self(selector).get_attribute("open") is None:
            self(f"{selector} > summary").click()

    @property
    def text(self) -> str:
        return self("#text").input_value()

    @property
    def by_model(self) -> str:
        """The part of the text that is marked as the model's."""
        return "".join(self("#mirror .by-model").all_text_contents())

    def set(self, **settings: float | None) -> None:
        """Types numbers beside the sliders, by the names that they have in a request."""
        self.unfold("#settings")
        for name, value in settings.items():
            more = name in ("min_p", "repetition_penalty", "logprobs")
            if more:
                self.unfold(".more")
            field = "#seed" if name == "seed" else f".slider:has(#set-{name}) input[type=number]"
            self(field).fill("" if value is None else str(value))
            self(field).press("Tab")

    def requests(self, path: str = "/v1/completions") -> list[Any]:
        """The bodies that the page sent there."""
        return [body for sent, body in self.sent if sent == path]

    def notice(self, title: str) -> Locator:
        """The notice, once it has this title."""
        expect(self("#notice-title")).to_have_text(title)
        expect(self("#notice")).to_be_visible()
        return self("#notice")
