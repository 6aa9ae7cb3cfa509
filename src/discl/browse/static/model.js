/** All that the parts of the page share: the rows, the thresholds and the marks. */

import { asScore } from "./dom.js";
import { Marks } from "./marks.js";
import { countCells, handOf, idOf, judge, limitsOf, makeTable, rowsById } from "./table.js";
import { NEVER, settledOf } from "./table.js";

export class Model {
  selected = new Set();

  /** - `onMarks(rows, refused)`: called after marks changed, with words if they were refused. */
  constructor(onMarks) {
    this.onMarks = onMarks;
  }

  /** Takes what the server sent; a threshold that is being tried and the undo list stay. */
  take(run, decoded, overrides) {
    const tried = this.thresholds && !this.thresholdsAreSaved() ? this.thresholds : null;
    const old = this.marks;
    Object.assign(this, { run, head: decoded.head, table: makeTable(decoded, run), ids: null });
    this.settled = settledOf(run.verdicts);
    this.applied = handOf(run.verdicts);
    this.kept = new Uint8Array(this.table.rows);
    this.everything = countCells(this.table);
    this.saved = savedThresholds(run);
    this.thresholds = tried ?? copyOf(this.saved);
    this.marks = new Marks(this.table, this.head.tags, this.notesOf(overrides), this.onMarks);
    if (old) this.marks.carryOn(old, (row) => this.rowOf(idOf(old.table, row)));
    this.selected.clear();
    this.judge();
  }

  notesOf(overrides) {
    const noted = overrides.filter((each) => each.reason);
    const rows = noted.map((each) => [this.rowOf(each.id), each.reason]);
    return new Map(rows.filter(([row]) => row !== undefined));
  }

  /** Decides every row again, by hand and at the thresholds. */
  judge() {
    const limits = limitsOf(this.thresholds, this.table);
    this.counts = judge(this.table, limits, this.table.hand, this.settled, this.kept);
  }

  /** Row of an id, or undefined. */
  rowOf(id) {
    this.ids ??= rowsById(this.table);
    return this.ids.get(id);
  }

  /** Decisions by hand that the last `discl filter` has not taken over. */
  get waiting() {
    const { hand, verdict } = this.table;
    let found = 0;
    for (let i = 0; i < hand.length; i++) {
      const differs = hand[i] !== this.applied[verdict[i]];
      if (differs && this.settled[verdict[i]] !== NEVER) found++;
    }
    return found;
  }

  resetThresholds() {
    this.thresholds = copyOf(this.saved);
  }

  thresholdsAreSaved() {
    return JSON.stringify(this.plain(this.thresholds)) === JSON.stringify(this.plain(this.saved));
  }

  /** Thresholds as the server takes them. */
  plain({ all, levels, classes } = this.thresholds) {
    const found = { threshold: all };
    if (this.run.level_thresholds === undefined) return found;
    const ordered = (map) => [...map].sort(([a], [b]) => a - b);
    const named = ordered(classes).map(([label, value]) => [this.run.classes[label], value]);
    found.level_thresholds = Object.fromEntries(ordered(levels));
    found.class_thresholds = Object.fromEntries(named);
    return found;
  }

  /** An image in words, for titles and screen readers. */
  describe = (row) => {
    const { table, run } = this;
    const words = [run.classes[table.class[row]], `${table.level[row]} %`];
    words.push(`seed ${table.seed[row]}`, table.try[row] ? `try ${table.try[row]}` : "");
    words.push(`clip_similarity ${asScore(table.score[row], 3)}`, this.stateOf(row));
    const { tag } = this.marks.of(row);
    return [...words, tag ? `tag ${tag}` : ""].filter(Boolean).join(", ");
  };

  /** "kept", "dropped by hand", "dropped: copies a held-out image" … */
  stateOf(row) {
    const { hand, verdict, score } = this.table;
    const state = this.kept[row] ? "kept" : "dropped";
    const settled = this.settled[verdict[row]];
    if (hand[row] && settled !== NEVER) return `${state} by hand`;
    if (settled) return `dropped: ${this.run.verdicts[verdict[row]]}`;
    return Number.isNaN(score[row]) ? "without a score" : state;
  }
}

function savedThresholds(run) {
  const levels = Object.entries(run.level_thresholds ?? {}).map(([k, v]) => [Number(k), v]);
  const label = (name) => run.classes.indexOf(name);
  const classes = Object.entries(run.class_thresholds ?? {}).map(([k, v]) => [label(k), v]);
  return { all: run.threshold, levels: new Map(levels), classes: new Map(classes) };
}

function copyOf({ all, levels, classes }) {
  return { all, levels: new Map(levels), classes: new Map(classes) };
}
