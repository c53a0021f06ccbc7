// The smaller dialogs: examples, the request as code, the API key.

import { button, byId, dialog, make, makeButton, node } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { curlOf, pythonOf } from "./snippets.js";

/** @typedef {import("./examples.js").Example} Example */

/**
 * Fills the lists of examples: the dialog's, and the one under an empty text.
 * @param {(example: Example) => void} onChoose
 */
export function setUpExamples(onChoose) {
  const box = dialog("examples-dialog");
  button("open-examples").addEventListener("click", () => box.showModal());
  for (const example of EXAMPLES) {
    node("starter-list").append(makeButton(example.name, () => onChoose(example)));
    const choose = makeButton("Use", () => {
      box.close();
      onChoose(example);
    });
    choose.setAttribute("aria-label", `Use the example ${example.name}`);
    const about = make("p", { className: "hint", text: example.about });
    const head = make(
      "div",
      { className: "example-head" },
      make("div", {}, make("h3", { text: example.name }), about),
      choose,
    );
    node("example-list").append(
      make("article", { className: "example" }, head, make("pre", { text: example.text })),
    );
  }
}

/**
 * @typedef {{base: string, body: Record<string, unknown>, withKey: boolean}} Call
 * @param {() => Call} current returns the request as it would be sent now
 */
export function setUpCode(current) {
  const box = dialog("code-dialog");
  const tabs = { curl: button("code-curl"), python: button("code-python") };
  let language = /** @type {keyof typeof tabs} */ ("curl");
  /** @type {Call} */
  let call;
  const show = () => {
    const { base, body, withKey } = call;
    node("code").textContent =
      language === "curl" ? curlOf(base, body, withKey) : pythonOf(base, body, withKey);
    node("code-key").hidden = !withKey;
    node("copy-message").textContent = "";
    for (const [name, tab] of Object.entries(tabs))
      tab.setAttribute("aria-pressed", String(name === language));
  };
  for (const [name, tab] of Object.entries(tabs)) {
    tab.addEventListener("click", () => {
      language = /** @type {keyof typeof tabs} */ (name);
      show();
    });
  }
  button("open-code").addEventListener("click", () => {
    call = current();
    show();
    box.showModal();
  });
  button("copy-code").addEventListener("click", async () => {
    const isCopied = await copied(node("code").textContent ?? "");
    node("copy-message").textContent = isCopied
      ? "Copied."
      : "Select the text and copy it: this browser does not allow the button to.";
  });
}

/**
 * Puts text on the clipboard; returns whether it could.
 * @param {string} text
 */
export async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** The dialog that asks for the API key. */
export class KeyDialog {
  #box = dialog("key-dialog");
  #input = byId("key", HTMLInputElement);
  /** @type {(() => void) | undefined} */
  #then;

  /** @param {(key: string) => void} onKey */
  constructor(onKey) {
    button("open-key").addEventListener("click", () =>
      this.ask("Give another key, which takes this one’s place."),
    );
    byId("key-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      onKey(this.#input.value.trim());
      this.#input.value = "";
      this.#box.close();
      this.#then?.();
    });
  }

  /**
   * @param {string} message
   * @param {() => void} [then] what to do once there is a key
   */
  ask(message, then) {
    this.#then = then;
    button("open-key").hidden = false;
    node("key-message").textContent = `${message} It is kept in this tab only, until you close it.`;
    if (!this.#box.open) this.#box.showModal();
  }
}
