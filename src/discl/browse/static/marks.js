/** What is decided by hand: keep, drop and tags, with undo and redo, saved as it happens. */

import { postJson } from "./api.js";
import { HANDS, idOf } from "./table.js";

const MOST_SENT = 2000;

/**
 * The marks of all rows.
 *
 * - `table`: its columns `hand` and `tag` are changed in place.
 * - `tags`: names of the tags; the first is none.
 * - `notes`: `{row: reason}` of `overrides.csv`.
 * - `onChange`: called after every change with its rows, and with words if it was refused.
 */
export class Marks {
  constructor(table, tags, notes, onChange, post = postJson) {
    Object.assign(this, { table, notes, onChange, post });
    this.tags = tags.length ? [...tags] : [""];
    this.done = [];
    this.undone = [];
    this.sending = Promise.resolve();
    this.waiting = 0;
    this.sent = 0;
  }

  /** Takes over the undo list of other marks; `rowOf` gives today's row of one of theirs. */
  carryOn(old, rowOf) {
    const moved = (batch) => ({ ...batch, rows: batch.rows.map(rowOf) });
    const whole = (batch) => !batch.rows.includes(undefined);
    this.done = old.done.map(moved).filter(whole);
    this.undone = old.undone.map(moved).filter(whole);
  }

  of(row) {
    const { hand, tag } = this.table;
    return { hand: hand[row], tag: this.tags[tag[row]], note: this.notes.get(row) ?? "" };
  }

  /** Changes rows; `change` holds what differs, for example `{hand: KEEP}`. */
  set(rows, change, name) {
    const before = rows.map((row) => this.of(row));
    const after = before.map((mark) => whole({ ...mark, ...change }));
    const batch = { rows, before, after, name };
    if (!before.some((mark, i) => !same(mark, after[i]))) return false;
    this.done.push(batch);
    this.undone = [];
    this.write(rows, after);
    this.send(batch, after, before, () => remove(this.done, batch));
    return true;
  }

  /** Takes the last change back; returns what is said about it. */
  undo() {
    return this.move(this.done, this.undone, "after", "before", "Undone");
  }

  redo() {
    return this.move(this.undone, this.done, "before", "after", "Redone");
  }

  move(from, to, expected, wanted, word) {
    const batch = from.pop();
    if (!batch) return `Nothing to ${word === "Undone" ? "undo" : "redo"}.`;
    const still = batch.rows.map((row, i) => same(this.of(row), batch[expected][i]));
    const rows = batch.rows.filter((_, i) => still[i]);
    const values = batch[wanted].filter((_, i) => still[i]);
    const old = batch[expected].filter((_, i) => still[i]);
    to.push(batch);
    this.write(rows, values);
    this.send({ rows }, values, old, () => {
      remove(to, batch);
      from.push(batch);
    });
    const others = batch.rows.length - rows.length;
    return `${word}: ${batch.name}.${others ? ` ${others} changed elsewhere and stay.` : ""}`;
  }

  /** Takes over what others have saved, unless changes of this page are on the way. */
  merge(overrides, rowOf) {
    if (this.waiting) return false;
    const found = new Map();
    for (const each of overrides) {
      const row = rowOf.get(each.id);
      if (row !== undefined) found.set(row, each);
    }
    const changed = [];
    for (let row = 0; row < this.table.rows; row++) {
      const saved = found.get(row);
      const mark = saved
        ? { hand: HANDS.indexOf(saved.verdict), tag: saved.tag, note: saved.reason }
        : { hand: 0, tag: "", note: "" };
      if (!same(this.of(row), mark)) {
        this.write([row], [mark], false);
        changed.push(row);
      }
    }
    if (changed.length) this.onChange(changed);
    return changed.length;
  }

  write(rows, marks, announce = true) {
    rows.forEach((row, i) => {
      this.table.hand[row] = Math.max(0, marks[i].hand);
      this.table.tag[row] = this.numberOf(marks[i].tag);
      if (marks[i].note) this.notes.set(row, marks[i].note);
      else this.notes.delete(row);
    });
    if (announce && rows.length) this.onChange(rows);
  }

  numberOf(tag) {
    const known = this.tags.indexOf(tag);
    return known >= 0 ? known : this.tags.push(tag) - 1;
  }

  /** Sends one change after another; takes it back where it is refused. */
  send({ rows }, values, old, forget) {
    const lines = rows.map((row, i) => ({
      id: idOf(this.table, row),
      verdict: HANDS[values[i].hand],
      tag: values[i].tag,
      reason: values[i].note,
    }));
    this.waiting++;
    this.sent++;
    this.sending = this.sending.then(async () => {
      try {
        for (let at = 0; at < lines.length; at += MOST_SENT) {
          const saved = await this.post("/api/overrides", lines.slice(at, at + MOST_SENT));
          this.stamp = saved.overrides_stamp;
        }
      } catch (error) {
        const still = rows.map((row, i) => same(this.of(row), values[i]));
        forget();
        this.write(
          rows.filter((_, i) => still[i]),
          old.filter((_, i) => still[i]),
          false,
        );
        this.onChange(rows, error.message);
      } finally {
        this.waiting--;
      }
    });
  }
}

/** A note without verdict and tag is not kept. */
function whole(mark) {
  return mark.hand || mark.tag ? mark : { ...mark, note: "" };
}

function same(a, b) {
  return a.hand === b.hand && a.tag === b.tag && a.note === b.note;
}

function remove(list, item) {
  const at = list.indexOf(item);
  if (at >= 0) list.splice(at, 1);
}
