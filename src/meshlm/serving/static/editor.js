// The editor: a text area, and under it the same text with the model's part marked.

import { segments } from "./document.js";
import { byId, make, node } from "./dom.js";

/** @typedef {import("./document.js").Doc} Doc */

const RETURN_SIGN = "␍";

export class Editor {
  #area = byId("text", HTMLTextAreaElement);
  #mirror = node("mirror");
  #sheet = node("sheet");
  #hasReturns = false;

  /** @param {{onText: (text: string) => void, onUndo: () => void, onRedo: () => void}} tell */
  constructor(tell) {
    this.#area.addEventListener("input", () => tell.onText(this.#read()));
    node("editor").addEventListener("click", (event) => {
      if (event.target === event.currentTarget) this.focus();
    });
    // The browser's own undo knows nothing of what the model wrote.
    this.#area.addEventListener("beforeinput", (event) => {
      if (event.inputType !== "historyUndo" && event.inputType !== "historyRedo") return;
      event.preventDefault();
      if (event.inputType === "historyUndo") tell.onUndo();
      else tell.onRedo();
    });
  }

  /**
   * Shows a document; the caret stays where it is as far as the text is the same.
   * @param {Doc} doc
   */
  show(doc) {
    const text = shownAs(doc.text);
    const shown = this.#area.value;
    this.#hasReturns = text !== doc.text;
    if (text !== shown) {
      if (text.startsWith(shown)) {
        this.#area.setRangeText(text.slice(shown.length), shown.length, shown.length, "preserve");
      } else {
        this.#area.value = text;
        this.#area.setSelectionRange(text.length, text.length);
      }
    }
    // A last line that is empty has a height only if something follows it.
    const marked = segments(doc).map(({ text, byModel }) =>
      byModel ? make("span", { className: "by-model", text: shownAs(text) }) : shownAs(text),
    );
    this.#mirror.replaceChildren(...marked, "\u200b");
  }

  /** The text, with its carriage returns. */
  #read() {
    const { value } = this.#area;
    return this.#hasReturns ? value.replaceAll(RETURN_SIGN, "\r") : value;
  }

  /**
   * While the model writes, the text is not for typing.
   * @param {boolean} busy
   */
  setBusy(busy) {
    this.#area.readOnly = busy;
    this.#area.setAttribute("aria-busy", String(busy));
  }

  /** Puts the caret at the end. */
  focus() {
    this.#area.focus({ preventScroll: true });
    this.#area.setSelectionRange(this.#area.value.length, this.#area.value.length);
  }

  /** Whether the end of the sheet is in sight. */
  get isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.#sheet;
    return scrollHeight - scrollTop - clientHeight < 80;
  }

  scrollToEnd() {
    this.#sheet.scrollTop = this.#sheet.scrollHeight;
  }
}

/**
 * A text area turns carriage returns into new lines: they are shown as a sign instead.
 * @param {string} text
 */
function shownAs(text) {
  return text.replaceAll("\r", RETURN_SIGN);
}
