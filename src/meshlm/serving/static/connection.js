// Whether the server answers, and what it is doing: asked often while it is not ready.

/**
 * @typedef {"asking" | "ready" | "loading" | "draining" | "failed" | "offline"} ServerState
 * @typedef {{state: ServerState, message: string}} Health
 */

const OFTEN_MS = 1000;
const SELDOM_MS = 10_000;

/**
 * Returns what an answer of /ready says. (/health is well while the server shuts down.)
 * @param {number} status
 * @param {any} body
 * @returns {Health}
 */
export function healthOf(status, body) {
  if (status === 200) return { state: "ready", message: "" };
  const message = String(body?.error?.message ?? `The server answered ${status}.`);
  const progress = body?.progress;
  if (typeof progress === "string" || message.startsWith("Loading")) {
    return { state: "loading", message: progress ? `Now: ${progress}.` : message };
  }
  if (message.startsWith("Stopp"))
    return { state: "draining", message: "It finishes what it has begun." };
  return { state: "failed", message };
}

/**
 * Returns how much of the work named in words like "compiling 7 of 24" is done, null if not told.
 * @param {string} message
 */
export function shareDone(message) {
  const counts = /(\d+) of (\d+)/.exec(message);
  if (!counts || Number(counts[2]) === 0) return null;
  return Math.min(1, Number(counts[1]) / Number(counts[2]));
}

export class Connection {
  /** @type {Health} */
  health = { state: "asking", message: "" };
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;

  /**
   * @param {string} base
   * @param {(now: Health, before: Health) => void} onChange
   */
  constructor(base, onChange) {
    this.base = base;
    this.onChange = onChange;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.ask();
    });
  }

  /** Asks now, and from then on by itself. */
  async ask() {
    clearTimeout(this.#timer);
    const before = this.health;
    this.health = await this.#read();
    clearTimeout(this.#timer);
    const pause = this.health.state === "ready" ? SELDOM_MS : OFTEN_MS;
    this.#timer = setTimeout(() => this.ask(), pause);
    if (JSON.stringify(before) !== JSON.stringify(this.health)) this.onChange(this.health, before);
  }

  /** @returns {Promise<Health>} */
  async #read() {
    try {
      const response = await fetch(`${this.base}ready`, { cache: "no-store" });
      return healthOf(response.status, await response.json().catch(() => null));
    } catch {
      return { state: "offline", message: "The server does not answer." };
    }
  }
}
