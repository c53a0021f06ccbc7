// The history: a dialog over the entries that this browser keeps.

import { button, byId, dialog, make, makeButton, node } from "./dom.js";
import { exported, imported } from "./history.js";
import { HistoryStore } from "./history-store.js";
import { STORED_HISTORY } from "./storage.js";

/** @typedef {import("./history.js").Entry} Entry */

const SHOWN_CHARACTERS = 240;

export class HistoryView {
  #store = new HistoryStore();
  #list = node("history-list");
  #added = "";
  #dialog = dialog("history-dialog");
  #file = byId("history-file", HTMLInputElement);

  /** @param {{onRestore: (entry: Entry) => void}} tell */
  constructor(tell) {
    this.tell = tell;
    button("open-history").addEventListener("click", () => this.open());
    button("export-history").addEventListener("click", () => this.#export());
    button("import-history").addEventListener("click", () => this.#file.click());
    this.#file.addEventListener("change", () => this.#import());
    button("clear-history").addEventListener("click", () => {
      this.#store.clear();
      this.#say("All deleted.");
    });
    // Another tab has changed it, or the browser has emptied its storage (null).
    addEventListener("storage", ({ key }) => {
      if ((key === null || key === STORED_HISTORY) && this.#dialog.open) this.#show();
    });
  }

  open() {
    this.#say(this.#added);
    this.#added = "";
    this.#dialog.showModal();
  }

  /** @param {Entry} entry */
  add(entry) {
    // Told when the dialog is opened: what came later may have nothing to say.
    this.#added = this.#store.add(entry) || this.#added;
  }

  /** @param {string} message */
  #say(message) {
    node("history-message").textContent = message;
    this.#show();
  }

  #show() {
    const { entries } = this.#store;
    const hadFocus = this.#list.contains(document.activeElement);
    this.#list.replaceChildren(...entries.map((entry) => this.#row(entry)));
    node("history-empty").hidden = entries.length > 0;
    button("export-history").disabled = button("clear-history").disabled = entries.length === 0;
    if (hadFocus) button("import-history").focus();
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
        this.#store.remove(entry.id);
        this.#say("Deleted.");
      },
      "quiet",
    );
    return make("li", {}, facts, text, make("div", { className: "row" }, restore, remove));
  }

  #export() {
    const url = URL.createObjectURL(
      new Blob([exported(this.#store.entries)], { type: "application/json" }),
    );
    const link = make("a", { attributes: { href: url, download: "meshlm-history.json" } });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  async #import() {
    const file = this.#file.files?.[0];
    if (!file) return;
    try {
      this.#say(this.#store.take(imported(await file.text())));
    } catch (error) {
      node("history-message").textContent = /** @type {Error} */ (error).message;
    }
    this.#file.value = "";
  }
}
