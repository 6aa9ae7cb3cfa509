/** The images as a virtual list: only what is near the window is in the document. */

import { imageOf, realOf } from "./api.js";
import { afterRest, asScore, eachFrame, el, levelColour, setStyle } from "./dom.js";
import { LABEL, flatLayout, neighbour, spectrumLayout } from "./layout.js";
import { visibleBlocks, visibleRows } from "./layout.js";
import { DROP, KEEP, digestOf, idOf } from "./table.js";

const TINY = 64;
const SETTLE = 60;

/**
 * The grid in its two views.
 *
 * - `frame`: the element that scrolls; `model`: what is shown (table, kept, selected, names…).
 * - `onOpen(at)`, `onToggle(row)`, `onRange(from, to)`: what a person does, `at` a place in the rows.
 */
export class Grid {
  constructor(frame, model, actions) {
    Object.assign(this, { frame, model, actions });
    this.sheet = el("div", { class: "sheet" });
    frame.append(this.sheet);
    this.cells = new Map();
    this.sources = new Map();
    this.seen = new Set();
    this.rows = new Uint32Array(0);
    this.view = "spectrum";
    this.target = 96;
    this.natural = 0;
    this.cursor = 0;
    this.loadLater = afterRest(() => this.load(), SETTLE);
    this.draw = eachFrame(() => this.paint());
    frame.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.resized()).observe(frame);
    frame.addEventListener("click", (event) => this.clicked(event));
    frame.addEventListener("error", (event) => this.broken(event), true);
    frame.addEventListener("load", (event) => this.loaded(event), true);
  }

  /** Side of a picture; tiny images are enlarged by a whole number. */
  get cell() {
    const narrow = this.frame.clientWidth < 480 ? Math.min(this.target, 84) : this.target;
    const { natural } = this;
    if (!natural || natural > TINY) return narrow;
    return Math.max(1, Math.floor((narrow + 8) / natural)) * natural;
  }

  /** Shows other rows; the cursor stays on its image if that is still there. */
  show(rows, view = this.view) {
    const row = this.rows[this.cursor];
    const top = this.frame.scrollTop;
    const changed = view !== this.view;
    this.rows = rows;
    this.view = view;
    const at = row === undefined ? -1 : rows.indexOf(row);
    this.cursor = Math.max(0, Math.min(at >= 0 ? at : this.cursor, rows.length - 1));
    this.arrange();
    if (changed && at >= 0) this.reveal(this.cursor);
    else this.frame.scrollTop = top;
  }

  resized() {
    const width = this.frame.clientWidth;
    if (width === this.width) return this.draw();
    const first = this.layout ? visibleRows(this.layout, this.frame.scrollTop, Infinity)[0] : 0;
    this.arrange();
    if (this.frame.scrollTop > 0) this.frame.scrollTop = this.layout.ys[first] - LABEL;
    return undefined;
  }

  arrange() {
    const style = getComputedStyle(this.frame);
    this.width = this.frame.clientWidth;
    const inner = this.width - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    this.layout =
      this.view === "spectrum"
        ? spectrumLayout(this.rows, this.model.table, inner, this.cell)
        : flatLayout(this.rows, inner, this.cell);
    setStyle(this.sheet, "height", `${this.layout.height}px`);
    setStyle(this.sheet, "--cell", `${this.layout.cell}px`);
    setStyle(this.sheet, "--real", `${this.layout.real ?? 0}px`);
    this.clear();
    this.paint();
  }

  clear() {
    for (const node of [...this.cells.values(), ...this.sources.values()]) discard(node);
    this.cells.clear();
    this.sources.clear();
  }

  paint() {
    const { scrollTop, clientHeight } = this.frame;
    const margin = clientHeight / 2;
    const [from, to] = [scrollTop - margin, scrollTop + clientHeight + margin];
    this.keep(this.cells, visibleRows(this.layout, from, to), (at) => this.makeCell(at));
    this.keep(this.sources, visibleBlocks(this.layout, from, to), (at) => this.makeSource(at));
    this.restyle();
    this.loadLater();
  }

  /** Adds what came into the window, and removes what left it. */
  keep(shown, [first, end], make) {
    for (const [at, node] of shown) {
      if (at < first || at >= end) {
        discard(node);
        shown.delete(at);
      }
    }
    const fresh = [];
    for (let at = first; at < end; at++) {
      if (shown.has(at)) continue;
      const node = make(at);
      shown.set(at, node);
      fresh.push(node);
    }
    this.sheet.append(...fresh);
  }

  makeCell(at) {
    const row = this.rows[at];
    const { table } = this.model;
    const picture = el("img", { alt: "", draggable: "false", decoding: "async" });
    this.later(picture, imageOf(idOf(table, row)));
    const node = el(
      "div",
      { class: "cell", role: "option", id: `cell-${at}`, "aria-setsize": this.rows.length },
      el("span", { class: "frame" }, picture, el("span", { class: "badge" })),
      el("span", { class: "pick", "aria-hidden": "true" }),
      el("span", { class: "score", text: asScore(table.score[row]) }),
    );
    node.setAttribute("aria-posinset", at + 1);
    node.dataset.at = at;
    setStyle(node, "transform", `translate(${this.layout.xs[at]}px, ${this.layout.ys[at]}px)`);
    return node;
  }

  makeSource(at) {
    const { table, run } = this.model;
    const block = this.layout.blocks[at];
    const label = table.class[this.rows[block.first]];
    const picture = el("img", { alt: `Real image, ${run.classes[label]}`, draggable: "false" });
    this.later(picture, realOf(digestOf(table, block.source)));
    const real = el(
      "div",
      { class: "real" },
      el("span", { class: "frame" }, picture),
      el("span", { class: "class-name", text: run.classes[label], title: run.classes[label] }),
      el("span", { class: "note", text: "real image" }),
    );
    const node = el("div", { class: "source", role: "presentation" }, real);
    node.append(...this.levelLabels(block));
    setStyle(node, "top", `${block.top}px`);
    setStyle(node, "height", `${block.height}px`);
    return node;
  }

  /** A picture that has been there before comes at once, the others when the window rests. */
  later(picture, address) {
    if (this.seen.has(address)) picture.src = address;
    else picture.dataset.src = address;
  }

  /** A label with the colour of its level above each stretch of a line. */
  levelLabels({ first, end, top }) {
    const { xs, ys, cell } = this.layout;
    const { level } = this.model.table;
    const labels = [];
    for (let from = first, to = first; from < end; from = to) {
      const own = level[this.rows[from]];
      while (to < end && level[this.rows[to]] === own && ys[to] === ys[from]) to++;
      const label = el("span", { class: "level", text: `${own} %` });
      setStyle(label, "left", `${xs[from]}px`);
      setStyle(label, "top", `${ys[from] - top - LABEL}px`);
      setStyle(label, "width", `${xs[to - 1] + cell - xs[from]}px`);
      setStyle(label, "border-color", levelColour(own));
      labels.push(label);
    }
    return labels;
  }

  /** What may change without a new layout: kept, by hand, selected, the cursor. */
  restyle() {
    const { kept, selected, marks } = this.model;
    for (const [at, node] of this.cells) {
      const row = this.rows[at];
      const { hand, tag } = marks.of(row);
      const picked = selected.has(row);
      const state = [
        "cell",
        kept[row] ? "" : "dropped",
        hand === KEEP ? "by-hand keep" : hand === DROP ? "by-hand drop" : "",
        tag ? "tagged" : "",
        at === this.cursor ? "cursor" : "",
      ];
      node.className = state.filter(Boolean).join(" ");
      node.setAttribute("aria-selected", picked);
      node.setAttribute("aria-label", this.model.describe(row));
      node.title = this.model.describe(row);
    }
    if (this.rows.length) this.frame.setAttribute("aria-activedescendant", `cell-${this.cursor}`);
    else this.frame.removeAttribute("aria-activedescendant");
  }

  /**
   * Asks for the pictures in the window once it rests, not for those scrolled past.
   *
   * The server opens the data set for the first real image, which takes seconds. Until it has come
   * no other is asked for: they would hold all connections of the browser.
   */
  load() {
    for (const node of this.sheet.querySelectorAll("img[data-src]")) {
      if (!this.realCame && node.closest(".real")) {
        if (this.firstReal?.isConnected) continue;
        this.firstReal = node;
      }
      node.src = node.dataset.src;
      delete node.dataset.src;
    }
  }

  /** Lets the other real images follow the first one, whether it came or is not readable. */
  realAnswered(node) {
    if (this.realCame || !node.closest(".real")) return;
    this.realCame = true;
    this.load();
  }

  loaded({ target }) {
    if (target.tagName !== "IMG") return;
    this.realAnswered(target);
    this.seen.add(target.getAttribute("src"));
    const { naturalWidth, naturalHeight } = target;
    target.classList.toggle("tiny", Math.max(naturalWidth, naturalHeight) <= TINY);
    target.classList.add("there");
    if (!this.natural && target.closest(".cell")) {
      const before = this.cell;
      this.natural = Math.max(naturalWidth, naturalHeight);
      if (this.cell !== before) this.arrange();
    }
  }

  broken({ target }) {
    if (target.tagName !== "IMG" || !target.getAttribute("src")) return;
    target.parentNode.classList.add("unreadable");
    this.realAnswered(target);
  }

  clicked(event) {
    const node = event.target.closest(".cell");
    if (!node) return;
    const at = Number(node.dataset.at);
    const pick = event.target.classList.contains("pick");
    if (event.shiftKey) this.actions.onRange(this.cursor, at);
    else if (pick || event.ctrlKey || event.metaKey) this.actions.onToggle(this.rows[at]);
    this.cursor = at;
    this.restyle();
    if (!pick && !event.shiftKey && !event.ctrlKey && !event.metaKey) this.actions.onOpen(at);
  }

  /** Moves the cursor by a key; returns where it was and is. */
  move(key) {
    if (!this.rows.length) return null;
    const before = this.cursor;
    this.moveTo(neighbour(this.layout, before, key));
    return [before, this.cursor];
  }

  moveTo(at) {
    this.cursor = Math.max(0, Math.min(at, this.rows.length - 1));
    this.reveal(this.cursor);
    this.paint();
  }

  reveal(at) {
    const { ys, cell } = this.layout;
    if (!ys.length) return;
    const { scrollTop, clientHeight } = this.frame;
    const [top, bottom] = [ys[at] - LABEL - 8, ys[at] + cell + 34];
    if (top < scrollTop) this.frame.scrollTop = top;
    else if (bottom > scrollTop + clientHeight) this.frame.scrollTop = bottom - clientHeight;
  }
}

/** Removes an element, and stops the loading of its pictures. */
function discard(node) {
  for (const picture of node.querySelectorAll("img")) picture.removeAttribute("src");
  node.remove();
}
