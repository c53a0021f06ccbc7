// The browser's stores, which may be switched off or full: then nothing is kept.

/** The history's own name in the store, which `storage` events tell. */
export const STORED_HISTORY = "meshlm.history";

/**
 * Returns the value kept under a name, null where there is none that can be read.
 * @param {string} name
 * @returns {unknown}
 */
export function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(`meshlm.${name}`) ?? "null");
  } catch {
    return null;
  }
}

/**
 * Keeps a value; returns whether it could.
 * @param {string} name
 * @param {unknown} value
 */
export function keep(name, value) {
  try {
    localStorage.setItem(`meshlm.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** The API key is kept for this tab only. */
export function recallKey() {
  try {
    return sessionStorage.getItem("meshlm.key") ?? "";
  } catch {
    return "";
  }
}

/** @param {string} key */
export function keepKey(key) {
  try {
    sessionStorage.setItem("meshlm.key", key);
  } catch {
    // It then holds until the page is left.
  }
}
