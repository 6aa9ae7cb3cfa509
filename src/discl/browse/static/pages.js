/** The pages beside the spectrum: levels, audit and comparison. */

import { getJson, imageOf, realOf } from "./api.js";
import { asScore, byId, counted, el, svg } from "./dom.js";

const SHOWN = 24;
const MOST_COLUMNS = ["all", "many", "medium", "few"];

/** Fills the page of a name; `model` and `actions` are those of the spectrum. */
export async function showPage(name, model, actions) {
  const box = byId(`page-${name}`);
  box.setAttribute("aria-busy", "true");
  try {
    const found = await getJson(`/api/pages/${name}`);
    box.replaceChildren(
      ...(found.missing ? missing(name, found.missing) : PAGES[name](found, model, actions)),
    );
  } catch (error) {
    box.replaceChildren(el("p", { class: "soft", text: error.message }));
  }
  box.removeAttribute("aria-busy");
}

const WHAT = {
  levels: "how alike and how true to their class the images of each level are",
  audit: "copies, leakage, poor pictures and classes that drift",
  comparison: "the results of the methods side by side",
};

function missing(name, command) {
  return [
    el("h2", { text: "Nothing here yet" }),
    el("p", { text: `This page shows ${WHAT[name]}. It is measured by:` }),
    el("pre", { class: "command", text: command }),
  ];
}

/* Levels */

const PANELS = [
  ["image_similarity", "Image–image", "cosine with the source; the lower, the more diverse"],
  ["text_similarity", "Image–text", "cosine with the plain text of the class"],
];

function levelsPage(found) {
  const { proposal, real } = found;
  const levels = `spectrum:\n  levels: [${proposal.levels.join(", ")}]\n`;
  const lines = `${levels}filter:\n  threshold: ${proposal.threshold}`;
  const marks = {
    image_similarity: [
      [proposal.bound, "too alike above"],
      [real.pair_similarity, "two real images of a class"],
    ],
    text_similarity: [
      [real.text_similarity.median, "real images"],
      [proposal.threshold, "proposed threshold"],
    ],
  };
  const charts = PANELS.map(([key, title, note]) => chart(found, key, title, note, marks[key]));
  return [
    el("h2", { text: "Similarity over λ" }),
    el("p", {
      text:
        `${counted(found.sources, "hard image")}, ${counted(found.seeds, "seed")} at each level; ` +
        `cosines by ${found.clip}. Line: mean. Band: middle half. Large dots: proposed levels.`,
    }),
    el("div", { class: "charts" }, ...charts),
    el("h2", { text: "Proposal" }),
    el("ul", {}, ...proposal.reasons.map((text) => el("li", { text }))),
    copyable(lines),
    el("h2", { text: "Figures" }),
    levelsTable(found),
  ];
}

function levelsTable(found) {
  const percent = (value) => `${Math.round(100 * value)} %`;
  const { threshold, proposal, real } = found;
  const head = ["level", "steps", "images", "image–image", "image–text"];
  head.push(`kept at ${threshold}`, `kept at ${proposal.threshold}`);
  const rows = found.levels.map((each) => [
    `${each.level} %`,
    each.steps,
    each.images,
    asScore(each.image_similarity.mean, 3),
    asScore(each.text_similarity.mean, 3),
    percent(each.kept),
    percent(each.kept_at_proposal),
  ]);
  rows.push([
    "real",
    "",
    "",
    "1.000",
    asScore(real.text_similarity.mean, 3),
    percent(real.kept),
    "",
  ]);
  return table(head, rows);
}

/** Mean and middle half over the levels, with horizontal marks. */
function chart(found, key, title, note, marks) {
  const rows = found.levels;
  const drawn = marks.filter(([value]) => value !== null && value !== undefined);
  const values = [
    ...rows.flatMap((row) => Object.values(row[key])),
    ...drawn.map(([value]) => value),
  ];
  const pad = 0.06 * (Math.max(...values) - Math.min(...values) || 0.1);
  const [low, high] = [Math.min(...values) - pad, Math.max(...values) + pad];
  const last = Math.max(...rows.map((row) => row.level), 10);
  const x = (level) => 44 + (level / last) * 300;
  const y = (value) => 8 + ((high - value) / (high - low)) * 150;
  const line = (part) =>
    rows.map((row) => `${x(row.level).toFixed(1)},${y(row[key][part]).toFixed(1)}`);
  const band = [...line("quarter"), ...line("three_quarters").reverse()].join(" ");
  const ticks = [0, 1, 2, 3].map((step) => low + ((high - low) * (step + 0.5)) / 4);
  const picture = svg(
    "svg",
    {
      viewBox: "0 0 360 190",
      role: "img",
      "aria-label": `${title} over λ; the figures are in the table`,
    },
    ...ticks.flatMap((value) => [
      svg("path", { class: "rule", d: `M44 ${y(value)}h300` }),
      svg("text", { x: 38, y: y(value) + 4, class: "tick end", text: value.toFixed(2) }),
    ]),
    svg("polygon", { class: "band", points: band }),
    svg("polyline", { class: "line", points: line("mean").join(" ") }),
    ...rows.map((row) =>
      svg("circle", {
        class: "dot",
        cx: x(row.level),
        cy: y(row[key].mean),
        r: found.proposal.levels.includes(row.level) ? 5.5 : 2.5,
      }),
    ),
    ...rows.map((row) =>
      svg("text", { x: x(row.level), y: 178, class: "tick middle", text: row.level }),
    ),
    ...markLines(drawn, y),
  );
  return el("figure", {}, el("figcaption", {}, el("strong", { text: title }), ` ${note}`), picture);
}

/** Lines with their names, the higher one above its line and the lower below. */
function markLines(marks, y) {
  const sorted = [...marks].sort((a, b) => b[0] - a[0]);
  return sorted.flatMap(([value, name], at) => [
    svg("path", { class: "mark", d: `M44 ${y(value)}h300` }),
    svg("text", {
      x: 344,
      y: y(value) + (at ? 12 : -4),
      class: "tick end",
      text: `${name} ${value.toFixed(2)}`,
    }),
  ]);
}

/* Audit */

function auditPage(found, model, actions) {
  const kinds = grouped(found.findings);
  const parts = [];
  if (found.outdated) {
    parts.push(
      el("p", { class: "caution", text: "The images have changed since the audit; run it again." }),
    );
  }
  if (!found.findings.length)
    parts.push(
      el("h2", { text: "Nothing found" }),
      el("p", { text: "No image or class is conspicuous." }),
    );
  for (const [kind, findings] of kinds) parts.push(auditKind(kind, findings, model, actions));
  return parts;
}

function auditKind(kind, findings, model, actions) {
  const made = findings.filter((each) => each.split === "synthetic" && each.id);
  const rows = made.map((each) => model.rowOf(each.id)).filter((row) => row !== undefined);
  const list = el("ul", { class: "findings" });
  const more = el("button", { type: "button" });
  let shown = 0;
  const show = () => {
    list.append(
      ...findings.slice(shown, shown + SHOWN).map((each) => finding(each, model, actions)),
    );
    shown = Math.min(findings.length, shown + SHOWN);
    more.hidden = shown >= findings.length;
    const next = Math.min(SHOWN, findings.length - shown);
    more.textContent = `Show ${next} more of ${findings.length}`;
  };
  more.addEventListener("click", show);
  show();
  const drop = el("button", {
    type: "button",
    text: `Drop ${counted(rows.length, "synthetic image")} by hand`,
    onclick: () => actions.onDrop(rows, kind),
  });
  return el(
    "section",
    { class: "card" },
    el("h2", { text: `${title(kind)} ` }, el("span", { class: "soft", text: findings.length })),
    el("p", { text: findings[0].text }),
    list,
    el("p", { class: "buttons" }, more, rows.length ? drop : null),
  );
}

function finding(each, model, actions) {
  const pictures = [];
  const address = (split, id, digest) =>
    split === "synthetic" ? imageOf(id) : digest ? realOf(digest) : null;
  const row = each.split === "synthetic" ? model.rowOf(each.id) : undefined;
  const own = each.id ? address(each.split, each.id, each.digest) : null;
  const other = each.other ? address(each.other_split, each.other, each.other_digest) : null;
  for (const source of [own, other].filter(Boolean)) pictures.push(pictureOf(source));
  const label = typeof each.class === "number" ? model.run.classes[each.class] : each.class;
  const where =
    each.split === "synthetic" && each.level !== null
      ? `${label}, ${each.level} %`
      : `${label}, ${each.split}`;
  const words = [
    where,
    each.value === null ? "" : each.value.toFixed(2),
    each.other ? `like ${each.other_split} ${each.other}` : "",
  ];
  const caption = el("span", { class: "caption", text: words.filter(Boolean).join(" · ") });
  if (row === undefined)
    return el("li", {}, el("span", { class: "finding" }, ...pictures, caption));
  const open = () => actions.onOpen(row);
  return el(
    "li",
    {},
    el("button", { type: "button", class: "finding", onclick: open }, ...pictures, caption),
  );
}

function pictureOf(source) {
  const frame = el("span", { class: "frame" });
  const picture = el("img", { src: source, alt: "", loading: "lazy" });
  picture.addEventListener("load", () =>
    picture.classList.toggle("tiny", picture.naturalWidth <= 64),
  );
  picture.addEventListener("error", () => frame.classList.add("unreadable"));
  frame.append(picture);
  return frame;
}

function grouped(findings) {
  const groups = new Map();
  for (const each of findings) groups.set(each.kind, [...(groups.get(each.kind) ?? []), each]);
  return groups;
}

const title = (kind) => kind[0].toUpperCase() + kind.slice(1).replaceAll("-", " ");

/* Comparison */

function comparisonPage(found) {
  return found.rows ? comparedPage(found) : resultsPage(found.results);
}

/** Mean over the seeds of each row, with the difference from the baseline. */
function comparedPage(found) {
  const names = Object.keys(found.rows);
  const columns = Object.keys(found.rows[names[0]]?.figures ?? {});
  const best = columns.map((column) =>
    Math.max(...names.map((name) => mean(found.rows[name].figures[column]))),
  );
  const rows = Object.values(found.rows);
  const controls = [...new Set(rows.flatMap((row) => Object.keys(row.controls ?? {})))];
  const lines = names.map((name) => [
    name,
    ...columns.map((column, at) => cellOf(found.rows[name], column, best[at])),
    ...controls.map((control) => controlCell(found.rows[name].controls?.[control])),
  ]);
  return [
    el("h2", { text: "Methods" }),
    el("p", {
      text:
        `${title(found.split)} split, per cent, mean ± standard deviation over ` +
        `${counted(found.seeds.length, "seed")}. Below: the difference from ` +
        `${found.baseline}, with its 95 % interval.`,
    }),
    table(["method", ...columns, ...controls], lines),
    ...(found.controls?.notes ?? []).map((text) => el("p", { class: "soft", text })),
    ...notes(found.notes),
  ];
}

function cellOf(row, column, best) {
  const values = row.figures[column];
  if (!values?.length) return "–";
  const own = mean(values);
  const spread = values.length > 1 ? ` ± ${deviation(values).toFixed(1)}` : "";
  const interval = row.intervals?.[column];
  const below = interval ? `${signed(interval[0])} ${limits(interval)}` : "";
  return el(
    "span",
    { class: own === best ? "figure best" : "figure" },
    `${own.toFixed(1)}${spread}`,
    el("small", { text: below }),
  );
}

const limits = ([, low, high]) => `[${signed(low)}, ${signed(high)}]`;

function controlCell(interval) {
  if (!interval) return "–";
  const below = el("small", { text: limits(interval) });
  return el("span", { class: "figure" }, signed(interval[0]), below);
}

function resultsPage(results) {
  const names = Object.keys(results);
  const split = results[names[0]]?.test ? "test" : "validation";
  const columns = MOST_COLUMNS.filter((column) =>
    names.some((name) => figure(results, name, split, column) !== null),
  );
  const best = columns.map((column) =>
    Math.max(...names.map((name) => figure(results, name, split, column) ?? 0)),
  );
  const lines = names.map((name) => [
    name,
    ...columns.map((column, at) => {
      const value = figure(results, name, split, column);
      if (value === null) return "–";
      return el("span", {
        class: value === best[at] ? "figure best" : "figure",
        text: (100 * value).toFixed(1),
      });
    }),
  ]);
  return [
    el("h2", { text: "Results of this run" }),
    el("p", {
      text:
        `Accuracy on the ${split} split in per cent; one seed. ` +
        "`discl compare` measures several.",
    }),
    table(["method", ...columns], lines),
  ];
}

function figure(results, name, split, column) {
  const found = results[name]?.[split]?.[column === "all" ? "accuracy" : column];
  return typeof found === "number" ? found : null;
}

const mean = (values) => (100 * values.reduce((a, b) => a + b, 0)) / values.length;

function deviation(values) {
  const middle = mean(values);
  const sum = values.reduce((total, value) => total + (100 * value - middle) ** 2, 0);
  return Math.sqrt(sum / (values.length - 1));
}

const signed = (points) => `${points >= 0 ? "+" : "−"}${Math.abs(points).toFixed(1)}`;

function notes(lines) {
  return lines?.length
    ? [el("h2", { text: "Notes" }), el("ul", {}, ...lines.map((text) => el("li", { text })))]
    : [];
}

/* Shared */

/** A table; cells are texts, numbers or elements. */
function table(head, rows) {
  const cell = (tag, content, more = {}) =>
    content instanceof Node ? el(tag, more, content) : el(tag, { ...more, text: content });
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Figures" },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...head.map((text) => cell("th", text, { scope: "col" })))),
      el(
        "tbody",
        {},
        ...rows.map(([first, ...rest]) =>
          el(
            "tr",
            {},
            cell("th", first, { scope: "row" }),
            ...rest.map((each) => cell("td", each)),
          ),
        ),
      ),
    ),
  );
}

/** Lines to copy. */
export function copyable(text) {
  const button = el("button", { type: "button", text: "Copy" });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  });
  return el("div", { class: "copyable" }, el("pre", { text }), button);
}

const PAGES = { levels: levelsPage, audit: auditPage, comparison: comparisonPage };
