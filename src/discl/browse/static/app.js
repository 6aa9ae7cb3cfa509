/** The page of `discl browse`: puts its parts together, and takes keys. */

import { getBytes, getJson, postJson } from "./api.js";
import { Detail } from "./detail.js";
import { afterRest, asCount, byId, counted, eachFrame, el, say } from "./dom.js";
import { Filters } from "./filters.js";
import { Grid } from "./grid.js";
import { Keys } from "./keys.js";
import { Model } from "./model.js";
import { copyable, showPage } from "./pages.js";
import { DROP, KEEP, decodeColumns, filterRows, idOf } from "./table.js";
import { ThresholdPanel } from "./threshold.js";

const POLL = 3000;

const model = new Model((rows, refused) => changed(rows, refused));
const filters = new Filters(model, () => refilter());
const grid = new Grid(byId("grid"), model, {
  onOpen: (at) => openAt(at),
  onToggle: (row) => toggle(row),
  onRange: (from, to) => selectRange(from, to),
});
const restyle = eachFrame(() => grid.restyle());
const panel = new ThresholdPanel(model, {
  onMove: () => thresholdMoved(),
  onOpen: (row) => openRow(row),
  onClass: (label) => filters.set({ class: String(label) }),
});
const detail = new Detail(model, {
  onStep: (by) => step(by),
  onShow: (row) => openRow(row),
  onClose: () => grid.frame.focus(),
});

/* Loading */

async function load() {
  await model.marks?.sending;
  const [run, bytes, saved] = await Promise.all([
    getJson("/api/run"),
    getBytes("/api/columns"),
    getJson("/api/overrides"),
  ]);
  model.take(run, decodeColumns(bytes), saved.overrides);
  model.marks.stamp = saved.overrides_stamp;
  model.stamp = run.stamp;
  byId("title").textContent = run.name;
  document.title = `${run.name} · discl browse`;
  byId("folder").textContent = run.folder;
  byId("notes").replaceChildren(...run.notes.map((text) => el("li", { text })));
  filters.load();
  panel.load();
  refilter();
  byId("news").hidden = true;
  document.body.classList.add("loaded");
}

async function reload(words = "") {
  const old = grid.rows[grid.cursor];
  const id = old === undefined ? null : idOf(model.table, old);
  await load();
  const row = id === null ? undefined : model.rowOf(id);
  const at = row === undefined ? -1 : grid.rows.indexOf(row);
  if (at >= 0) grid.moveTo(at);
  if (words) say(words);
}

/* What is shown */

function refilter() {
  const { table, kept } = model;
  const sort = byId("sort").value;
  const order = sort === "spectrum" ? table.order : table.byScore;
  let rows = filterRows(table, order, filters.criteria(), kept);
  if (sort === "high") rows = rows.slice().reverse();
  grid.show(rows, sort === "spectrum" ? "spectrum" : "flat");
  countShown();
}

function countShown() {
  const { length } = grid.rows;
  const all = model.table.rows;
  const words =
    length === all ? counted(all, "image") : `${asCount(length)} of ${counted(all, "image")}`;
  byId("shown").textContent = words;
  byId("nothing").hidden = length > 0;
  byId("nothing-words").textContent = all
    ? "No image passes these filters."
    : "This run has no images yet. They appear here while `discl generate` makes them.";
  byId("nothing-reset").hidden = !all;
  const { size } = model.selected;
  byId("selected").textContent = size ? `${asCount(size)} selected` : "";
  byId("clear").hidden = !size;
  countPending();
}

/** Decisions by hand count with the next `discl filter`; here they can be applied at once. */
function countPending() {
  const { waiting } = model;
  byId("pending").hidden = !waiting;
  byId("pending-words").textContent = `${counted(waiting, "decision")} by hand not yet applied`;
}

function thresholdMoved() {
  model.judge();
  if (filters.criteria().kept !== null) refilter();
  else restyle();
  detail.restyle();
}

/** After marks changed, here or elsewhere, or were refused. */
function changed(rows, refused) {
  model.judge();
  panel.refresh();
  filters.fillHand();
  const { values } = filters;
  if (values.hand || values.search || values.verdict) refilter();
  else {
    grid.restyle();
    countShown();
  }
  detail.restyle();
  if (refused) say(`Not saved, taken back: ${refused}`, "bad");
}

/* Selection and decisions */

function toggle(row) {
  if (!model.selected.delete(row)) model.selected.add(row);
  grid.restyle();
  countShown();
}

function selectRange(from, to) {
  const [first, end] = from < to ? [from, to] : [to, from];
  for (let at = first; at <= end; at++) model.selected.add(grid.rows[at]);
  grid.restyle();
  countShown();
}

function clearSelection() {
  model.selected.clear();
  grid.restyle();
  countShown();
}

/** The rows that a key acts on: the open picture, the selected ones, or that at the cursor. */
function targets() {
  if (detail.open) return [detail.row];
  if (model.selected.size) return [...model.selected];
  const row = grid.rows[grid.cursor];
  return row === undefined ? [] : [row];
}

function decide(hand, rows = targets(), note = null) {
  if (!rows.length) return;
  const word = { [KEEP]: "kept by hand", [DROP]: "dropped by hand", 0: "decided by the filter" }[
    hand
  ];
  const name = `${counted(rows.length, "image")} ${word}`;
  const change = note === null ? { hand } : { hand, note };
  say(model.marks.set(rows, change, name) ? `${name}. U takes it back.` : `${name} already.`);
}

function askTag() {
  const rows = targets();
  if (!rows.length) return;
  const field = byId("tag-name");
  const { tags } = model.marks;
  byId("tag-for").textContent = counted(rows.length, "image");
  byId("tags").replaceChildren(...tags.slice(1).map((value) => el("option", { value })));
  field.value = model.marks.of(rows[0]).tag;
  byId("tag-dialog").returnValue = "";
  byId("tag-dialog").onclose = () => {
    if (byId("tag-dialog").returnValue !== "save") return;
    const tag = field.value.trim();
    const name = `${counted(rows.length, "image")} ${tag ? `tagged ${tag}` : "without tag"}`;
    if (model.marks.set(rows, { tag }, name)) say(`${name}. U takes it back.`);
  };
  byId("tag-dialog").showModal();
  field.select();
}

/* The large picture */

function openAt(at) {
  grid.cursor = at;
  detail.show(grid.rows[at]);
}

function openRow(row) {
  const at = grid.rows.indexOf(row);
  if (at >= 0) grid.moveTo(at);
  detail.show(row);
}

function step(by) {
  const at = grid.rows.indexOf(detail.row);
  const next = Math.max(0, Math.min(grid.rows.length - 1, (at < 0 ? grid.cursor : at) + by));
  if (grid.rows[next] === undefined) return;
  grid.moveTo(next);
  detail.show(grid.rows[next]);
}

/* Thresholds into the recipe */

async function askUse() {
  const box = byId("use-lines");
  const body = model.plain();
  box.replaceChildren(el("p", { class: "soft", text: "…" }));
  byId("use-said").textContent = "";
  byId("use-dialog").showModal();
  try {
    const { lines, command } = await postJson("/api/threshold", { ...body, apply: false });
    box.replaceChildren(
      el("p", { text: "These lines of the recipe:" }),
      copyable(lines),
      el("p", { text: "Or this command, which changes the run:" }),
      copyable(command),
    );
  } catch (error) {
    box.replaceChildren(el("p", { class: "bad", text: error.message }));
  }
}

async function apply(body, button, words) {
  button.disabled = true;
  words.textContent = "Filtering…";
  words.className = "soft";
  try {
    await model.marks.sending;
    const { kept } = await postJson("/api/threshold", { ...body, apply: true });
    words.textContent = "";
    if (body.threshold !== undefined) model.thresholds = null;
    byId("use-dialog").close();
    await reload(`Applied: ${counted(kept, "image")} kept.`);
  } catch (error) {
    words.textContent = error.message;
    words.className = "bad";
    if (!byId("use-dialog").open) say(error.message, "bad");
  } finally {
    button.disabled = false;
  }
}

/* News from the run folder and from other tabs */

async function poll() {
  if (document.hidden || !model.stamp) return;
  try {
    const stamps = await getJson("/api/stamp");
    document.body.classList.remove("offline");
    if (stamps.stamp !== model.stamp && !model.marks.waiting) await news(stamps);
  } catch {
    document.body.classList.add("offline");
  }
}

async function news(stamps) {
  const { marks } = model;
  const { sent } = marks;
  if (stamps.overrides_stamp !== marks.stamp) {
    const saved = await getJson("/api/overrides");
    if (marks.waiting || marks.sent !== sent) return;
    model.rowOf("");
    const others = marks.merge(saved.overrides, model.ids);
    marks.stamp = saved.overrides_stamp;
    if (others) say(`${counted(others, "image")} changed by another tab or person.`);
  }
  if (stamps.rows_stamp !== model.head.rows_stamp) {
    const { counts } = await getJson("/api/run");
    const fresh = counts.stored - model.run.counts.stored;
    byId("news-words").textContent =
      fresh > 0 ? counted(fresh, "new image") : "The run has changed";
    byId("news").hidden = false;
  }
  model.stamp = stamps.stamp;
}

/* Tabs */

function showTab(name) {
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    const chosen = tab.dataset.page === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    byId(`page-${tab.dataset.page}`).hidden = !chosen;
  }
  if (name === "spectrum") grid.draw();
  else {
    showPage(name, model, {
      onOpen: (row) => openRow(row),
      onDrop: (rows, kind) => decide(DROP, rows, `audit: ${kind}`),
    });
  }
}

for (const tab of document.querySelectorAll('[role="tab"]')) {
  tab.addEventListener("click", () => showTab(tab.dataset.page));
}
byId("tabs").addEventListener("keydown", (event) => {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  event.stopPropagation();
  const next = tabs[(tabs.indexOf(document.activeElement) + by + tabs.length) % tabs.length];
  next.focus();
  showTab(next.dataset.page);
});

/* Wiring */

const undo = () => say(model.marks.undo());
const redo = () => say(model.marks.redo());
const actions = {
  keep: () => decide(KEEP),
  drop: () => decide(DROP),
  clear: () => decide(0),
  tag: askTag,
  undo,
  redo,
};
for (const button of document.querySelectorAll("[data-act]")) {
  button.addEventListener("click", () => actions[button.dataset.act]());
}
byId("sort").addEventListener("change", () => {
  refilter();
  grid.moveTo(0);
});
byId("size").addEventListener("input", (event) => {
  grid.target = Number(event.target.value);
  grid.arrange();
});
byId("clear").addEventListener("click", clearSelection);
byId("nothing-reset").addEventListener("click", () => filters.reset());
byId("news-reload").addEventListener("click", () => reload("Up to date."));
byId("use").addEventListener("click", askUse);
byId("use-apply").addEventListener("click", (event) =>
  apply(model.plain(), event.target, byId("use-said")),
);
byId("pending-apply").addEventListener("click", (event) =>
  apply({}, event.target, byId("pending-words")),
);
byId("help-button").addEventListener("click", () => byId("help").showModal());
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
new Keys({
  ...actions,
  grid,
  detail,
  toggle: () => grid.rows.length && toggle(grid.rows[grid.cursor]),
  extend: ([from, to]) => selectRange(from, to),
  open: () => grid.rows.length && openAt(grid.cursor),
  step,
  escape: clearSelection,
  filter: () => byId("filter-search").focus(),
  all: () => selectRange(0, grid.rows.length - 1),
});
if (matchMedia("(max-width: 860px)").matches) {
  document.querySelectorAll("aside > details").forEach((each) => (each.open = false));
}
setInterval(poll, POLL);
document.addEventListener("visibilitychange", afterRest(poll, 50));
load().catch((error) => {
  document.body.classList.add("loaded");
  say(error.message, "bad");
  byId("nothing").hidden = false;
  byId("nothing-words").textContent = error.message;
});
