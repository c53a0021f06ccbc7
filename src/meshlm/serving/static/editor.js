// The editor: a text area, and under it the same text with the model's part marked.

import { segments } from "./document.js";
import { byId, make, node } from "./dom.js";

/** @typedef {import("./document.js").Doc} Doc */

export class Editor {
  #area = byId("text", HTMLTextAreaElement);
  #mirror = node("mirror");
  #sheet = node("sheet");

  /** @param {{onText: (text: string) => void, onUndo: () => void, onRedo: () => void}} tell */
  constructor(tell) {
    this.#area.addEventListener("input", () => tell.onText(this.#area.value));
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
    const shown = this.#area.value;
    if (doc.text !== shown) {
      if (doc.text.startsWith(shown)) {
        const added = doc.text.slice(shown.length);
        this.#area.setRangeText(added, shown.length, shown.length, "preserve");
      } else {
        this.#area.value = doc.text;
        this.#area.setSelectionRange(doc.text.length, doc.text.length);
      }
    }
    // A last line that is empty has a height only if something follows it.
    const marked = segments(doc).map(({ text, byModel }) =>
      byModel ? make("span", { className: "by-model", text }) : text,
    );
    this.#mirror.replaceChildren(...marked, "\u200b");
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
