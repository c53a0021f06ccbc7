// The server's API: one place that sends requests and gives failures a kind.

import { SseParser } from "./sse.js";

/**
 * `lost`: no answer or half of one. `key`: a key is missing or wrong. `busy`: too many requests.
 * `context`: text and length together are too long. `refused`: the request is wrong otherwise.
 * @typedef {"lost" | "key" | "busy" | "loading" | "draining" | "timeout" | "context" | "refused" | "engine"} Kind
 */

/** A request that failed, and why. */
export class ApiError extends Error {
  /**
   * @param {Kind} kind
   * @param {string} message the server's words where there are any
   * @param {number | null} retryAfterS seconds until another try makes sense
   */
  constructor(kind, message, retryAfterS = null) {
    super(message);
    this.kind = kind;
    this.retryAfterS = retryAfterS;
  }
}

// The server's own codes; a status alone decides where a proxy answers in its place.
const KINDS = new Map(
  /** @type {[string, Kind][]} */ ([
    ["invalid_api_key", "key"],
    ["queue_full", "busy"],
    ["loading", "loading"],
    ["draining", "draining"],
    ["timeout", "timeout"],
    ["request_timeout", "timeout"],
    ["context_length_exceeded", "context"],
    ["engine_error", "engine"],
    ["engine_failed", "engine"],
  ]),
);

/**
 * Returns the kind of a failure that a server told.
 * @param {number} status
 * @param {any} error the object `error` of the body
 * @returns {Kind}
 */
export function kindOf(status, error) {
  const known = KINDS.get(error?.code);
  if (known) return known;
  if (status === 401 || status === 403) return "key";
  if (status === 429) return "busy";
  if (status === 502 || status === 503 || status === 504) return "loading";
  return status >= 400 && status < 500 ? "refused" : "engine";
}

/**
 * Returns a text that can be sent: a half of a surrogate pair alone becomes U+FFFD, as long as it.
 * @param {string} text
 */
export function wellFormed(text) {
  return text.replace(/\p{Surrogate}/gu, "\ufffd");
}

/**
 * Returns a request's body as JSON, every text in it fit to be sent.
 * @param {object} body
 */
function jsonOf(body) {
  return JSON.stringify(body, (_, value) =>
    typeof value === "string" ? wellFormed(value) : value,
  );
}

/**
 * Returns the seconds that a Retry-After header asks for, null without one.
 * @param {string | null} header
 */
export function secondsIn(header) {
  const seconds = header === null ? NaN : Number(header);
  return Number.isFinite(seconds) && seconds >= 0 ? Math.ceil(seconds) : null;
}

export class Api {
  /**
   * @param {string} base the address that the paths below stand after
   * @param {() => string} key returns the API key, "" for none
   */
  constructor(base, key) {
    this.base = base;
    this.key = key;
  }

  /**
   * Returns the answer to a GET as an object.
   * @param {string} path
   * @returns {Promise<any>}
   */
  async get(path) {
    return (await this.#answer(path, {})).json();
  }

  /**
   * Returns the answer to a POST as an object.
   * @param {string} path
   * @param {object} body
   * @param {AbortSignal} [signal]
   * @returns {Promise<any>}
   */
  async post(path, body, signal) {
    const response = await this.#answer(path, {
      method: "POST",
      body: jsonOf(body),
      signal,
    });
    try {
      return await response.json();
    } catch (error) {
      throw lostUnlessStopped(error);
    }
  }

  /**
   * Yields the events of a streamed answer as objects, and its comments.
   * @param {string} path
   * @param {object} body
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<{value: any} | {comment: string}>}
   */
  async *stream(path, body, signal) {
    const response = await this.#answer(path, {
      method: "POST",
      body: jsonOf(body),
      signal,
    });
    const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
    const parser = new SseParser();
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) throw new ApiError("lost", "The answer broke off.");
        for (const item of parser.push(value)) {
          if ("comment" in item) yield item;
          else if (item.data === "[DONE]") return;
          else yield { value: eventOf(item.data) };
        }
      }
    } catch (error) {
      throw lostUnlessStopped(error);
    } finally {
      reader.cancel().catch(() => {});
    }
  }

  /**
   * @param {string} path
   * @param {RequestInit} init
   */
  async #answer(path, init) {
    /** @type {Record<string, string>} */
    const headers = {};
    if (init.body) headers["Content-Type"] = "application/json";
    if (this.key()) headers.Authorization = `Bearer ${this.key()}`;
    let response;
    try {
      response = await fetch(this.base + path, { ...init, headers, cache: "no-store" });
    } catch (error) {
      throw lostUnlessStopped(error);
    }
    if (response.ok) return response;
    const error = (await response.json().catch(() => null))?.error;
    const message = error?.message ?? `The server answered ${response.status}.`;
    throw new ApiError(
      kindOf(response.status, error),
      message,
      secondsIn(response.headers.get("Retry-After")),
    );
  }
}

/**
 * Returns an event's object; throws where it tells an error.
 * @param {string} data
 */
function eventOf(data) {
  const value = JSON.parse(data);
  if (!value.error) return value;
  throw new ApiError(kindOf(500, value.error), value.error.message ?? "The server failed.");
}

/**
 * Returns the error to throw: what the network did becomes `lost`, a stop of ours stays.
 * @param {unknown} error
 */
function lostUnlessStopped(error) {
  const isOurs =
    error instanceof ApiError || (error instanceof DOMException && error.name === "AbortError");
  return isOurs ? error : new ApiError("lost", "The connection to the server was lost.");
}
