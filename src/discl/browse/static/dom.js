/** Small helpers for elements. Every text from the run goes through textContent. */

export const byId = (id) => document.getElementById(id);

/**
 * An element with its attributes and children.
 *
 * `text` becomes textContent, `on…` functions become listeners, `class` the class name, false and
 * null leave an attribute out; strings among the children become text nodes.
 */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for an element of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "style") Object.entries(value).forEach(([k, v]) => setStyle(node, k, v));
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets a style or custom property through the CSSOM, which a strict content policy allows. */
export function setStyle(node, name, value) {
  node.style.setProperty(name, value);
}

/** Calls `act` once, `ms` after the last call. */
export function afterRest(act, ms) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...values), ms);
  };
}

/** Calls `act` at most once a frame, with the last arguments. */
export function eachFrame(act) {
  let waiting = false;
  let last = [];
  return (...values) => {
    last = values;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      act(...last);
    });
  };
}

const STOPS = [
  [0, [94, 66, 196]],
  [50, [206, 70, 130]],
  [100, [243, 168, 60]],
];

/** Colour of a level: violet for text only, amber for the real image, as in the report. */
export function levelColour(percent) {
  const at = percent <= 50 ? 0 : 1;
  const [[start, left], [end, right]] = [STOPS[at], STOPS[at + 1]];
  const fraction = (percent - start) / (end - start);
  const mixed = left.map((value, i) => Math.round(value + fraction * (right[i] - value)));
  return `rgb(${mixed.join(" ")})`;
}

/** A similarity in few digits; a dash where there is none. */
export function asScore(value, digits = 2) {
  return Number.isNaN(value) || value === null ? "–" : value.toFixed(digits);
}

/** A count with thin separators: 100 000. */
export function asCount(value) {
  return String(value).replace(/\B(?=(\d{3})+$)/g, "\u2009");
}

/** "1 image", "2 images". */
export function counted(number, noun, plural = `${noun}s`) {
  return `${asCount(number)} ${number === 1 ? noun : plural}`;
}

/** Says a sentence at the foot of the page, and to screen readers. */
export function say(text, kind = "") {
  const box = byId("said");
  box.textContent = text;
  box.className = `said ${kind}`;
  clearTimeout(say.timer);
  say.timer = setTimeout(
    () => {
      box.textContent = "";
      box.className = "said";
    },
    kind === "bad" ? 9000 : 4500,
  );
}
