// What the page says about the server's state, and when it is ready again.

import { Connection, shareDone } from "./connection.js";
import { node } from "./dom.js";

/**
 * @typedef {import("./connection.js").Health} Health
 *
 * @typedef {object} Parts
 * @property {import("./notices.js").Notices} notices
 * @property {(words: string) => void} announce
 * @property {() => boolean} isBusy
 * @property {() => {words: string, run: () => void} | null} again what a failed request left to do
 * @property {() => void} onReady
 */

const STATES = {
  asking: "Connecting",
  ready: "Ready",
  loading: "Loading",
  draining: "Shutting down",
  failed: "Failed",
  offline: "No connection",
};
// Notices that a server which is ready settles.
const SETTLED = ["loading", "draining", "offline", "failed", "lost", "engine"];

// A request that they ended has said so already, and how much of it is kept.
const ENDED = ["offline", "failed"];

export class Watch {
  #connection;

  /**
   * @param {string} base
   * @param {Parts} parts
   */
  constructor(base, parts) {
    this.parts = parts;
    this.#connection = new Connection(base, (now, before) => this.#onChange(now, before));
  }

  /** Asks the server how it is. */
  ask() {
    return this.#connection.ask();
  }

  /** Says what is in the way, where nothing else is said. */
  tell() {
    const { state } = this.#connection.health;
    const { notices } = this.parts;
    if (state !== "ready" && state !== "asking" && notices.id === "") {
      notices.show(noticeOfHealth(this.#connection.health));
    }
  }

  /**
   * @param {Health} now
   * @param {Health} before
   */
  #onChange(now, before) {
    const { notices, isBusy, onReady } = this.parts;
    node("state").textContent = STATES[now.state];
    node("state").dataset.state = now.state;
    if (now.state === "ready") {
      onReady();
      this.#settle(before);
    } else if (
      !isBusy() &&
      !(ENDED.includes(now.state) && ["lost", "engine"].includes(notices.id))
    ) {
      notices.show(noticeOfHealth(now));
    }
  }

  /** @param {Health} before */
  #settle(before) {
    const { notices, announce } = this.parts;
    const isSettled = SETTLED.includes(notices.id);
    const again = this.parts.again();
    if (isSettled && again) {
      notices.show({
        id: "back",
        tone: "calm",
        title: "The server is ready.",
        text: "Go on where it ended.",
        actions: [{ text: again.words, run: again.run }],
      });
    } else {
      if (isSettled) notices.clear();
      if (before.state !== "asking") announce("The server is ready.");
    }
  }
}

/**
 * @param {Health} health
 * @returns {import("./notices.js").Notice}
 */
function noticeOfHealth({ state, message }) {
  if (state === "loading") {
    const progress = shareDone(message);
    return { id: "loading", tone: "calm", title: "The model is loading.", text: message, progress };
  }
  if (state === "draining") {
    const text = `${message} This page goes on when it is back.`;
    return { id: "draining", title: "The server is shutting down.", text };
  }
  if (state === "failed") return { id: "failed", title: "The server has failed.", text: message };
  const text = "The server does not answer. This page tries again every second.";
  return { id: "offline", title: "No connection.", text };
}
