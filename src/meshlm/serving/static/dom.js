// Elements of the page. Text is only ever set as text, never read as HTML.

/**
 * Returns the element of index.html with this id.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} kind
 * @returns {T}
 */
export function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`index.html has no such #${id}`);
  return found;
}

/** @param {string} id */
export function button(id) {
  return byId(id, HTMLButtonElement);
}

/** @param {string} id */
export function node(id) {
  return byId(id, HTMLElement);
}

/**
 * Returns a new element.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {{className?: string, text?: string, attributes?: Record<string, string>}} [what]
 * @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function make(tag, { className = "", text, attributes = {} } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/**
 * Returns a new button.
 * @param {string} text
 * @param {() => void} onClick
 * @param {string} className
 */
export function makeButton(text, onClick, className = "") {
  const made = make("button", { className, text, attributes: { type: "button" } });
  made.addEventListener("click", onClick);
  return made;
}

/**
 * Opens a dialog; its [data-close] buttons close it.
 * @param {string} id
 */
export function dialog(id) {
  const found = byId(id, HTMLDialogElement);
  for (const close of found.querySelectorAll("[data-close]")) {
    close.addEventListener("click", () => found.close());
  }
  return found;
}
