// The history: a dialog over the entries that this browser keeps.

import { button, byId, dialog, make, makeButton, node } from "./dom.js";
import { entriesFrom, exported, imported, merged, withEntry } from "./history.js";
import { keep, recall } from "./storage.js";

/** @typedef {import("./history.js").Entry} Entry */

const SHOWN_CHARACTERS = 240;

export class HistoryView {
  #entries = entriesFrom(recall("history"));
  #dialog = dialog("history-dialog");
  #file = byId("history-file", HTMLInputElement);

  /** @param {{onRestore: (entry: Entry) => void}} tell */
  constructor(tell) {
    this.tell = tell;
    button("open-history").addEventListener("click", () => this.open());
    button("export-history").addEventListener("click", () => this.#export());
    button("import-history").addEventListener("click", () => this.#file.click());
    this.#file.addEventListener("change", () => this.#import());
    button("clear-history").addEventListener("click", () => this.#set([], "All deleted."));
  }

  open() {
    node("history-message").textContent = "";
    this.#show();
    this.#dialog.showModal();
  }

  /** @param {Entry} entry */
  add(entry) {
    this.#store(withEntry(this.#entries, entry));
  }

  /**
   * @param {Entry[]} entries
   * @param {string} message
   */
  #set(entries, message) {
    const isKept = this.#store(entries);
    node("history-message").textContent = isKept
      ? message
      : "This browser keeps nothing: its storage is full or off.";
    this.#show();
  }

  /**
   * Keeps the entries, of the newest as many as the browser has room for.
   * @param {Entry[]} entries
   */
  #store(entries) {
    this.#entries = entries;
    while (!keep("history", this.#entries)) {
      if (this.#entries.length <= 1) return false;
      this.#entries = this.#entries.slice(0, Math.ceil(this.#entries.length / 2));
    }
    return true;
  }

  #show() {
    node("history-list").replaceChildren(...this.#entries.map((entry) => this.#row(entry)));
    node("history-empty").hidden = this.#entries.length > 0;
    button("export-history").disabled = button("clear-history").disabled =
      this.#entries.length === 0;
  }

  /** @param {Entry} entry */
  #row(entry) {
    const time = make("time", {
      text: new Date(entry.time).toLocaleString(),
      attributes: { datetime: entry.time },
    });
    const facts = make("p", { className: "hint" }, time, ` · ${entry.model}`);
    const cut = entry.text.length > SHOWN_CHARACTERS;
    const text = make("p", {
      className: "history-text",
      text: entry.text.slice(0, SHOWN_CHARACTERS) + (cut ? "…" : ""),
    });
    const restore = makeButton("Restore", () => {
      this.#dialog.close();
      this.tell.onRestore(entry);
    });
    const remove = makeButton(
      "Delete",
      () => {
        this.#set(
          this.#entries.filter((other) => other !== entry),
          "Deleted.",
        );
        button("import-history").focus();
      },
      "quiet",
    );
    return make("li", {}, facts, text, make("div", { className: "row" }, restore, remove));
  }

  #export() {
    const url = URL.createObjectURL(
      new Blob([exported(this.#entries)], { type: "application/json" }),
    );
    const link = make("a", { attributes: { href: url, download: "meshlm-history.json" } });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  async #import() {
    const file = this.#file.files?.[0];
    if (!file) return;
    try {
      const more = imported(await file.text());
      this.#set(merged(this.#entries, more), `${more.length} read.`);
    } catch (error) {
      node("history-message").textContent = /** @type {Error} */ (error).message;
    }
    this.#file.value = "";
  }
}
