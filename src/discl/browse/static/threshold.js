/** The panel of the threshold: histogram, slider, counts, and the images nearest the cut. */

import { imageOf } from "./api.js";
import { afterRest, asCount, asScore, byId, el, levelColour, setStyle } from "./dom.js";
import { belowCut, effectiveScale, emptyCells, histogram, idOf, scopeRows } from "./table.js";
import { scoreAxis } from "./table.js";

const BINS = 96;
const EDGE = 8;
const NEAREST = 6;
const WORST = 6;
const NAMED = 4;
const RULES = {
  alia: "This recipe filters by ALIA’s rule. The slider shows what a threshold would keep.",
  difficulty:
    "This recipe also drops images by their difficulty, measured of those above its threshold.",
};

/**
 * The panel.
 *
 * - `model`: table, thresholds, counts, run.
 * - `onMove`: called after the threshold changed; `onOpen(row)`, `onClass(label)`.
 */
export class ThresholdPanel {
  constructor(model, { onMove, onOpen, onClass }) {
    Object.assign(this, { model, onMove, onOpen, onClass, scope: {} });
    this.canvas = byId("histogram");
    byId("cut").addEventListener("input", (event) => this.move(Number(event.target.value)));
    byId("cut-number").addEventListener("change", (event) => this.typed(event.target));
    byId("scope").addEventListener("change", (event) => this.choose(event.target.value));
    byId("own-off").addEventListener("click", () => this.forget());
    byId("cut-reset").addEventListener("click", () => this.reset());
    byId("scale-method").addEventListener("change", () => this.refresh());
    this.canvas.addEventListener("pointerdown", (event) => this.dragged(event));
    this.canvas.addEventListener("pointermove", (event) => event.buttons && this.dragged(event));
    this.showNearest = afterRest(() => this.nearest(), 90);
    new ResizeObserver(() => this.model.table && this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Takes another table or run. */
  load() {
    const { run } = this.model;
    this.fillScopes(run);
    const methods = run.methods.map((each, i) => [each, i]).filter(([each]) => each.levels.length);
    byId("scale-method").replaceChildren(
      ...methods.map(([each, i]) => el("option", { value: i, text: each.name })),
    );
    byId("scale-row").hidden = !methods.length;
    byId("rule").hidden = !RULES[run.rule];
    byId("rule").textContent = RULES[run.rule] ?? "";
    this.rescope();
  }

  fillScopes(run) {
    const scope = byId("scope");
    const chosen = scope.value || "all";
    const levels = run.levels.map((each) =>
      el("option", { value: `level:${each}`, text: `${each} %` }),
    );
    const classes = run.classes.map((name, i) => [name, i]).filter(([, i]) => run.hard_counts[i]);
    scope.replaceChildren(
      el("option", { value: "all", text: "all images" }),
      el("optgroup", { label: "Level" }, ...levels),
      el(
        "optgroup",
        { label: "Class" },
        ...classes.map(([name, i]) => el("option", { value: `class:${i}`, text: name })),
      ),
    );
    scope.value = [...scope.options].some((each) => each.value === chosen) ? chosen : "all";
    this.scope = scopeOf(scope.value);
  }

  choose(value) {
    byId("scope").value = value;
    this.scope = scopeOf(value);
    this.rescope();
  }

  /** Whether the recipe can hold a threshold for one level or class. */
  get canOwn() {
    return this.model.run.level_thresholds !== undefined;
  }

  get own() {
    const { levels, classes } = this.model.thresholds;
    if (this.scope.class !== undefined) return [classes, this.scope.class];
    if (this.scope.level !== undefined) return [levels, this.scope.level];
    return [null, null];
  }

  get value() {
    const [own, key] = this.own;
    const { thresholds } = this.model;
    return own?.get(key) ?? thresholds.all;
  }

  set value(number) {
    const [own, key] = this.own;
    if (own && this.canOwn) own.set(key, number);
    else this.model.thresholds.all = number;
  }

  rescope() {
    const { table, thresholds } = this.model;
    const cuts = [thresholds.all, ...thresholds.levels.values(), ...thresholds.classes.values()];
    this.axis = scoreAxis(table, cuts);
    this.rows = scopeRows(table, this.scope, thresholds);
    this.bins = histogram(this.rows, table.score, this.axis.low, this.axis.high, BINS);
    const range = byId("cut");
    [range.min, range.max] = [this.axis.low, this.axis.high];
    this.refresh();
  }

  move(number) {
    this.value = Math.round(number * 10000) / 10000;
    this.onMove();
    this.refresh();
  }

  typed(field) {
    const number = Number(field.value.replace(",", "."));
    if (field.value.trim() === "" || !(number >= -1 && number <= 1)) {
      field.value = this.value;
      return;
    }
    this.move(number);
    if (number < this.axis.low || number > this.axis.high) this.rescope();
  }

  dragged(event) {
    const box = this.canvas.getBoundingClientRect();
    const { low, high } = this.axis;
    const at = (event.clientX - box.left - EDGE) / (box.width - 2 * EDGE);
    const step = 0.005;
    const value = low + Math.max(0, Math.min(1, at)) * (high - low);
    this.canvas.setPointerCapture(event.pointerId);
    this.move(Math.round(value / step) * step);
  }

  forget() {
    const [own, key] = this.own;
    own?.delete(key);
    this.onMove();
    this.rescope();
  }

  reset() {
    this.model.resetThresholds();
    this.onMove();
    this.rescope();
  }

  /** Everything that follows the slider, without the pictures nearest the cut. */
  refresh() {
    const { value } = this;
    const range = byId("cut");
    if (Number(range.value) !== value) range.value = value;
    range.setAttribute("aria-valuetext", `${value}: ${this.keptWords()}`);
    const field = byId("cut-number");
    if (document.activeElement !== field || Number(field.value) !== value) field.value = value;
    byId("kept").textContent = this.keptWords();
    byId("own-off").hidden = !(this.canOwn && this.own[0]?.has(this.own[1]));
    byId("cut-reset").hidden = this.model.thresholdsAreSaved();
    byId("use").classList.toggle("primary", !this.model.thresholdsAreSaved());
    this.scales();
    this.worst();
    this.empty();
    this.draw();
    this.showNearest();
  }

  keptWords() {
    const { kept, all } = this.countScope();
    return `${asCount(kept)} of ${asCount(all)} kept (${asShare(kept, all)} %)`;
  }

  countScope() {
    const { counts, everything, table, run } = this.model;
    const width = table.levels.length;
    const found = { kept: 0, all: 0 };
    for (let i = 0; i < everything.length; i++) {
      if (this.scope.class !== undefined && Math.floor(i / width) !== this.scope.class) continue;
      if (this.scope.level !== undefined && run.levels[i % width] !== this.scope.level) continue;
      found.kept += counts.perCell[i];
      found.all += everything[i];
    }
    return found;
  }

  /** Kept images and effective scale, for all levels and for each. */
  scales() {
    const { counts, everything, run, table } = this.model;
    const method = run.methods[Number(byId("scale-method").value)];
    const scale = method?.scale ?? 0;
    const width = table.levels.length;
    const of = (only) => effectiveScale(counts.perCell, run.hard_counts, scale, width, only);
    byId("scale").textContent = of(null).toFixed(2);
    byId("scale-wanted").textContent = ` of ${scale}`;
    const lines = run.levels.map((level, l) => {
      let kept = 0;
      let all = 0;
      for (let i = l; i < everything.length; i += width)
        [kept, all] = [kept + counts.perCell[i], all + everything[i]];
      return { level, kept, all, scale: of(l) };
    });
    this.fillLevels(lines, scale);
  }

  fillLevels(lines, scale) {
    const body = byId("by-level");
    if (body.children.length !== lines.length) {
      body.replaceChildren(...lines.map((line) => this.levelLine(line)));
    }
    lines.forEach((line, at) => {
      const [, bar, kept, own] = body.children[at].children;
      setStyle(
        bar.firstChild.firstChild,
        "width",
        `${line.all ? (100 * line.kept) / line.all : 0}%`,
      );
      kept.textContent = `${asCount(line.kept)}/${asCount(line.all)}`;
      own.textContent = scale ? line.scale.toFixed(2) : "";
    });
  }

  levelLine({ level }) {
    const button = el("button", {
      type: "button",
      class: "level",
      text: `${level} %`,
      title: "Show the histogram of this level",
      onclick: () => this.choose(`level:${level}`),
    });
    setStyle(button, "border-color", levelColour(level));
    const bar = el("span", { class: "bar" }, el("span"));
    setStyle(bar.firstChild, "background", levelColour(level));
    return el("tr", {}, el("th", { scope: "row" }, button), el("td", {}, bar), el("td"), el("td"));
  }

  /** Classes of which the smallest part is kept. */
  worst() {
    const { counts, everything, run, table } = this.model;
    const width = table.levels.length;
    const found = [];
    for (let c = 0; c < run.classes.length; c++) {
      let kept = 0;
      let all = 0;
      for (let i = c * width; i < (c + 1) * width; i++)
        [kept, all] = [kept + counts.perCell[i], all + everything[i]];
      if (all) found.push({ c, kept, all, share: kept / all });
    }
    found.sort((a, b) => a.share - b.share || a.c - b.c);
    byId("worst").replaceChildren(
      ...found.slice(0, WORST).map(({ c, kept, all, share }) =>
        el(
          "li",
          {},
          el("button", {
            type: "button",
            class: "name",
            text: run.classes[c],
            title: "Show this class",
            onclick: () => this.onClass(c),
          }),
          meter(share),
          el("span", { class: "number", text: `${asCount(kept)}/${asCount(all)}` }),
        ),
      ),
    );
  }

  empty() {
    const { counts, everything, run, table } = this.model;
    const cells = emptyCells(counts.perCell, everything, run.hard_counts, table.levels.length);
    const named = cells.slice(0, NAMED).map(([c, l]) => `${run.classes[c]} at ${run.levels[l]} %`);
    const more = cells.length > NAMED ? `, and ${cells.length - NAMED} more` : "";
    byId("empty").hidden = !cells.length;
    byId("empty").textContent = cells.length
      ? `No image kept: ${named.join(", ")}${more}. Training needs at least one.`
      : "";
  }

  draw() {
    const { canvas, axis, bins } = this;
    const { width, height } = canvas.getBoundingClientRect();
    const ratio = devicePixelRatio || 1;
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    const inner = width - 2 * EDGE;
    const cut = EDGE + ((this.value - axis.low) / (axis.high - axis.low)) * inner;
    const most = Math.max(1, ...bins);
    const bar = inner / BINS;
    for (const [fill, from, to] of [
      [colour("--lost"), 0, cut],
      [colour("--accent"), cut, width],
    ]) {
      pen.save();
      pen.beginPath();
      pen.rect(from, 0, to - from, height);
      pen.clip();
      pen.fillStyle = fill;
      for (let b = 0; b < BINS; b++) {
        const tall = bins[b] ? Math.max(1.5, (bins[b] / most) * (height - 6)) : 0;
        pen.fillRect(EDGE + b * bar, height - tall, Math.max(1, bar - 0.6), tall);
      }
      pen.restore();
    }
    pen.fillStyle = colour("--mark");
    pen.fillRect(cut - 0.75, 0, 1.5, height);
    canvas.setAttribute("aria-label", `Histogram of clip_similarity; ${this.keptWords()}`);
  }

  /** The pictures on both sides of the cut; asked for when the slider rests. */
  nearest() {
    const { table } = this.model;
    const at = belowCut(this.rows, table.score, this.value);
    const below = [...this.rows.subarray(Math.max(0, at - NEAREST), at)];
    const above = [...this.rows.subarray(at, at + NEAREST)];
    byId("nearest-below").replaceChildren(...below.map((row) => this.small(row)));
    byId("nearest-above").replaceChildren(...above.map((row) => this.small(row)));
  }

  small(row) {
    const { table, describe } = this.model;
    const broken = () => picture.parentNode.classList.add("unreadable");
    const picture = el("img", { alt: "", src: imageOf(idOf(table, row)), onerror: broken });
    const button = el(
      "button",
      {
        type: "button",
        class: "small",
        title: describe(row),
        "aria-label": describe(row),
        onclick: () => this.onOpen(row),
      },
      picture,
      el("span", { text: asScore(table.score[row], 3) }),
    );
    return el("li", {}, button);
  }
}

/** Whole per cent; with a decimal where it would read as none or all. */
function asShare(part, all) {
  const share = all ? (100 * part) / all : 0;
  const near = (share > 0 && share < 1) || (share > 99 && share < 100);
  return share.toFixed(near ? 1 : 0);
}

function meter(share) {
  const bar = el("span", { class: "bar" }, el("span"));
  setStyle(bar.firstChild, "width", `${100 * share}%`);
  return bar;
}

function scopeOf(value) {
  const [kind, number] = value.split(":");
  return kind === "all" ? {} : { [kind]: Number(number) };
}
