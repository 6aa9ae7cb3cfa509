/** Requests to the server of `discl browse`. */

const token = document.querySelector('meta[name="token"]').content;

/** What the server refused, in its own words. */
export class Refused extends Error {}

/** JSON of an address. */
export async function getJson(path, signal) {
  return (await ask(path, { signal })).json();
}

/** Bytes of an address. */
export async function getBytes(path) {
  return (await ask(path, {})).arrayBuffer();
}

/** Sends a change with the token of the page. */
export async function postJson(path, body) {
  const headers = { "Content-Type": "application/json", "X-Token": token };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server does not answer; is `discl browse` still running?");
  }
  if (!answer.ok) throw new Refused(await wordsOf(answer));
  return answer;
}

async function wordsOf(answer) {
  try {
    return (await answer.json()).error || answer.statusText;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}

/** Address of the picture of a row or of a real image. */
export const imageOf = (id, thumb = true) => `/image/${id}${thumb ? "?size=thumb" : ""}`;
export const realOf = (digest, thumb = true) => `/real/${digest}${thumb ? "?size=thumb" : ""}`;
