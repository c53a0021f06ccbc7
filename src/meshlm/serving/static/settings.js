// The panel of settings: each slider with a number beside it.

import { button, byId, make, makeButton, node } from "./dom.js";
import {
  BOUNDS,
  DEFAULTS,
  STOP_BOUNDS,
  escaped,
  isSeed,
  settingsFrom,
  unescaped,
} from "./options.js";

/**
 * @typedef {import("./options.js").Settings} Settings
 * @typedef {import("./options.js").Bound} Bound
 */

/** @type {Record<Bound["name"], {label: string, hint: string, more?: true}>} */
const WORDS = {
  temperature: { label: "Temperature", hint: "0 always takes the most probable token" },
  top_p: { label: "Top-p", hint: "the fewest tokens that add up to it" },
  top_k: { label: "Top-k", hint: "this many of the most probable; 0 is off" },
  max_tokens: { label: "Length", hint: "tokens to write at most" },
  n: { label: "Samples", hint: "side by side, to choose from" },
  min_p: { label: "Min-p", hint: "at least this share of the best token’s", more: true },
  repetition_penalty: {
    label: "Repetition penalty",
    hint: "above 1, used tokens are less probable",
    more: true,
  },
  logprobs: { label: "Alternatives", hint: "told for each token", more: true },
};

/** @type {ReadonlyArray<{name: string, settings: Partial<Settings>}>} */
const PRESETS = [
  { name: "Balanced", settings: { temperature: 0.8, top_p: 0.95, top_k: 0 } },
  { name: "Exact: the most probable", settings: { temperature: 0, top_p: 1, top_k: 0 } },
  { name: "Careful: code, facts", settings: { temperature: 0.3, top_p: 0.95, top_k: 0 } },
  { name: "Free: stories", settings: { temperature: 1, top_p: 0.98, top_k: 0 } },
  { name: "As the model is", settings: { temperature: 1, top_p: 1, top_k: 0 } },
];

export class SettingsPanel {
  /** @type {Settings} */
  settings;
  #bounds = new Map(BOUNDS.map((bound) => [bound.name, { ...bound }]));
  #stops = { ...STOP_BOUNDS };
  /** @type {Map<Bound["name"], {slider: HTMLInputElement, number: HTMLInputElement}>} */
  #inputs = new Map();
  #seed = byId("seed", HTMLInputElement);
  #preset = byId("preset", HTMLSelectElement);
  #stop = byId("stop-text", HTMLInputElement);
  /** @type {number | null} */
  #lastSeed = null;

  /**
   * @param {Settings} settings
   * @param {() => void} onChange
   */
  constructor(settings, onChange) {
    this.settings = settings;
    this.onChange = onChange;
    for (const bound of BOUNDS) this.#addSlider(bound);
    this.#preset.append(
      ...PRESETS.map(({ name }, i) =>
        make("option", { text: name, attributes: { value: String(i) } }),
      ),
      make("option", { text: "Your own", attributes: { value: "" } }),
    );
    this.#preset.addEventListener("change", () =>
      this.set(PRESETS[Number(this.#preset.value)]?.settings ?? {}),
    );
    this.#seed.addEventListener("change", () => this.#onSeed());
    button("keep-seed").addEventListener("click", () => this.set({ seed: this.#lastSeed }));
    button("add-stop").addEventListener("click", () => this.#addStop());
    this.#stop.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.#addStop();
    });
    button("reset").addEventListener("click", () => this.set({ ...DEFAULTS, stop: [] }));
    this.#show();
  }

  /** @param {Partial<Settings>} changes */
  set(changes) {
    const settings = { ...this.settings, ...changes };
    this.settings = settingsFrom(settings, this.#bounds.values(), this.#stops);
    this.#show();
    this.onChange();
  }

  /**
   * Takes over what the server allows, be it less than usual or more.
   * @param {Partial<Record<Bound["name"], number>>} most
   * @param {Partial<import("./options.js").StopBounds>} stops
   */
  allow(most, stops = {}) {
    for (const [name, value] of Object.entries(most)) {
      const bound = this.#bounds.get(/** @type {Bound["name"]} */ (name));
      if (!bound || !Number.isFinite(value)) continue;
      bound.most = Math.max(bound.least, value);
      const inputs = this.#inputs.get(bound.name);
      if (inputs) inputs.slider.max = inputs.number.max = String(bound.most);
    }
    for (const name of /** @type {const} */ (["most", "characters"])) {
      const value = stops[name];
      if (Number.isInteger(value)) this.#stops[name] = /** @type {number} */ (value);
    }
    this.set({});
  }

  /**
   * Tells the seed of the last run, which can then be kept.
   * @param {number} seed
   */
  ran(seed) {
    this.#lastSeed = seed;
    button("keep-seed").disabled = false;
  }

  /** @param {Bound} bound */
  #addSlider(bound) {
    const words = WORDS[bound.name];
    const range = { min: String(bound.least), max: String(bound.most), step: String(bound.step) };
    const id = `set-${bound.name}`;
    const described = { "aria-describedby": `${id}-hint` };
    const slider = make("input", { attributes: { ...range, ...described, type: "range", id } });
    const number = make("input", {
      attributes: {
        ...range,
        ...described,
        type: "number",
        inputmode: "decimal",
        "aria-label": `${words.label}, as a number`,
      },
    });
    slider.addEventListener("input", () => this.set({ [bound.name]: slider.valueAsNumber }));
    number.addEventListener("change", () => {
      const value = number.valueAsNumber;
      this.set(Number.isNaN(value) ? {} : { [bound.name]: value });
    });
    const label = make("label", { text: words.label, attributes: { for: id } });
    const hint = make("p", {
      className: "hint",
      text: words.hint,
      attributes: { id: `${id}-hint` },
    });
    const field = make("div", { className: "field slider" }, label, number, slider, hint);
    node(words.more ? "more-settings" : "main-settings").append(field);
    this.#inputs.set(bound.name, { slider, number });
  }

  #onSeed() {
    const value = this.#seed.value === "" ? null : this.#seed.valueAsNumber;
    this.set({ seed: value === null || isSeed(value) ? value : this.settings.seed });
  }

  #addStop() {
    const text = unescaped(this.#stop.value);
    if (text === "" || this.settings.stop.includes(text)) return;
    this.#stop.value = "";
    this.set({ stop: [...this.settings.stop, text] });
  }

  /** @param {string} text */
  #removeStop(text) {
    this.set({ stop: this.settings.stop.filter((other) => other !== text) });
    this.#stop.focus();
  }

  #show() {
    const { settings } = this;
    for (const [name, { slider, number }] of this.#inputs) {
      slider.value = number.value = String(settings[name]);
      const bound = /** @type {Bound} */ (this.#bounds.get(name));
      slider.style.setProperty(
        "--share",
        String((settings[name] - bound.least) / (bound.most - bound.least || 1)),
      );
    }
    this.#seed.value = settings.seed === null ? "" : String(settings.seed);
    const preset = PRESETS.findIndex((one) =>
      Object.entries(one.settings).every(
        ([name, value]) => settings[/** @type {Bound["name"]} */ (name)] === value,
      ),
    );
    this.#preset.value = preset < 0 ? "" : String(preset);
    node("stop-list").replaceChildren(...settings.stop.map((text) => this.#chip(text)));
    this.#stop.disabled = button("add-stop").disabled = settings.stop.length >= this.#stops.most;
  }

  /** @param {string} text */
  #chip(text) {
    const remove = makeButton("×", () => this.#removeStop(text), "chip-remove");
    remove.setAttribute("aria-label", `Remove the stop text ${escaped(text)}`);
    return make("li", { className: "chip" }, make("code", { text: escaped(text) }), remove);
  }
}
