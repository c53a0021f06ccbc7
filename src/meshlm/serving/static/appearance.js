// The theme: the system's, or a chosen one. theme.js applies it before the page is drawn.

import { button } from "./dom.js";
import { keep, recall } from "./storage.js";

const THEMES = /** @type {const} */ (["auto", "light", "dark"]);

/** Lets the button go through the themes. */
export function setUpTheme() {
  let theme = THEMES.find((name) => name === recall("theme")) ?? "auto";
  const apply = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button("theme").textContent = `Theme: ${theme}`;
  };
  button("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    keep("theme", theme);
    apply();
  });
  apply();
}
