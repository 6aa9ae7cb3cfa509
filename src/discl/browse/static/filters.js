/** The filters of the grid, kept in the address so that a reload keeps them. */

import { byId, el, levelColour, setStyle } from "./dom.js";
import { DROP, KEEP } from "./table.js";

const FIELDS = ["search", "class", "prompt", "verdict", "hand", "method", "low", "high"];
const MOST_PROMPTS = 2000;

/** The controls; `onChange` is called after each change. */
export class Filters {
  constructor(model, onChange) {
    Object.assign(this, { model, onChange });
    for (const name of FIELDS) {
      const event = ["search", "low", "high"].includes(name) ? "input" : "change";
      byId(`filter-${name}`).addEventListener(event, () => this.changed());
    }
    byId("filter-reset").addEventListener("click", () => this.reset());
  }

  load() {
    const { run, head } = this.model;
    const wanted = this.values ?? this.fromAddress();
    options(
      "class",
      "all classes",
      run.classes.map((name, i) => [i, name]),
    );
    const prompts = head.prompts.slice(0, MOST_PROMPTS).map((text, i) => [i, text]);
    options("prompt", "all prompts", prompts);
    options("method", "all", run.methods.map((each, i) => [i, each.name]).slice(0, 32));
    const last = run.verdicts.map((text, i) => [`last:${i}`, `last filter: ${text}`]);
    options("verdict", "kept and dropped", [["kept", "kept"], ["dropped", "dropped"], ...last]);
    this.fillHand();
    this.fillLevels(run.levels);
    this.write(wanted);
  }

  fillHand() {
    const tags = this.model.marks.tags.map((tag, i) => [`tag:${i}`, `tag: ${tag}`]).slice(1);
    const chosen = byId("filter-hand").value;
    options("hand", "all", [
      ["any", "by hand"],
      ["keep", "kept by hand"],
      ["drop", "dropped by hand"],
      ["tagged", "with a tag"],
      ...tags,
    ]);
    byId("filter-hand").value = chosen;
  }

  fillLevels(levels) {
    const buttons = levels.map((level) => {
      const button = el("button", {
        type: "button",
        class: "chip",
        text: `${level} %`,
        "aria-pressed": "false",
        onclick: () => {
          button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
          this.changed();
        },
      });
      button.dataset.level = level;
      setStyle(button, "border-color", levelColour(level));
      return button;
    });
    byId("filter-levels").replaceChildren(...buttons);
  }

  get pressed() {
    return [...byId("filter-levels").querySelectorAll('[aria-pressed="true"]')].map((each) =>
      Number(each.dataset.level),
    );
  }

  read() {
    const values = Object.fromEntries(FIELDS.map((name) => [name, byId(`filter-${name}`).value]));
    return { ...values, levels: this.pressed.join(",") };
  }

  write(values) {
    for (const name of FIELDS) {
      const field = byId(`filter-${name}`);
      field.value = values[name] ?? "";
      if (field.selectedIndex === -1) field.value = "";
    }
    const levels = (values.levels ?? "").split(",");
    for (const button of byId("filter-levels").children) {
      button.setAttribute("aria-pressed", levels.includes(button.dataset.level));
    }
    this.values = this.read();
    byId("filter-reset").hidden = !this.active;
  }

  get active() {
    return Object.values(this.values).filter(Boolean).length;
  }

  changed() {
    this.values = this.read();
    byId("filter-reset").hidden = !this.active;
    this.toAddress();
    this.onChange();
  }

  reset() {
    this.write({});
    this.toAddress();
    this.onChange();
  }

  set(change) {
    this.write({ ...this.values, ...change });
    this.toAddress();
    this.onChange();
  }

  fromAddress() {
    return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  }

  toAddress() {
    const filled = Object.entries(this.values).filter(([, value]) => value);
    const text = new URLSearchParams(filled).toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname);
  }

  /** The criteria of `filterRows`. */
  criteria() {
    const { run, head, marks } = this.model;
    const { values } = this;
    const found = { classes: null, levels: null, prompts: null, marks: null, kept: null };
    Object.assign(found, { verdict: null, low: number(values.low), high: number(values.high) });
    found.method = values.method === "" ? null : Number(values.method);
    if (values.class !== "") found.classes = only(run.classes.length, [Number(values.class)]);
    if (values.prompt !== "") found.prompts = only(head.prompts.length, [Number(values.prompt)]);
    if (this.pressed.length) found.levels = only(256, this.pressed);
    if (values.verdict === "kept") found.kept = 1;
    else if (values.verdict === "dropped") found.kept = 0;
    else if (values.verdict) found.verdict = Number(values.verdict.split(":")[1]);
    const tests = [handTest(values.hand, this.model.table), this.searchTest(values.search, marks)];
    const used = tests.filter(Boolean);
    if (used.length) found.marks = (row) => used.every((test) => test(row));
    return found;
  }

  /** Rows whose class, prompt, tag or note holds every word of the search. */
  searchTest(search, marks) {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return null;
    const { run, head, table } = this.model;
    const within = (texts, word) =>
      Uint8Array.from(texts, (text) => text.toLowerCase().includes(word));
    const tables = words.map((word) => [
      within(run.classes, word),
      within(head.prompts, word),
      within(marks.tags, word),
      word,
    ]);
    return (row) =>
      tables.every(
        ([classes, prompts, tags, word]) =>
          classes[table.class[row]] ||
          prompts[table.prompt[row]] ||
          tags[table.tag[row]] ||
          (marks.notes.size && (marks.notes.get(row) ?? "").toLowerCase().includes(word)),
      );
  }
}

function handTest(value, { hand, tag }) {
  if (!value) return null;
  if (value === "any") return (row) => hand[row] || tag[row];
  if (value === "keep") return (row) => hand[row] === KEEP;
  if (value === "drop") return (row) => hand[row] === DROP;
  if (value === "tagged") return (row) => tag[row];
  const wanted = Number(value.split(":")[1]);
  return (row) => tag[row] === wanted;
}

function options(name, all, rest) {
  byId(`filter-${name}`).replaceChildren(
    el("option", { value: "", text: all }),
    ...rest.map(([value, text]) => el("option", { value, text })),
  );
}

function number(text) {
  const value = Number(text.replace(",", "."));
  return text.trim() === "" || Number.isNaN(value) ? null : value;
}

function only(length, wanted) {
  const found = new Uint8Array(length);
  wanted.forEach((each) => (found[each] = 1));
  return found;
}
