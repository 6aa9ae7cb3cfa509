/** One picture large, with its source, its neighbours and all that its row holds. */

import { getJson, imageOf, realOf } from "./api.js";
import { asScore, byId, el, levelColour, setStyle } from "./dom.js";
import { DROP, KEEP, idOf } from "./table.js";

const NEIGHBOURS = 12;

/**
 * The dialog.
 *
 * - `model`: table, run, marks; `onStep(±1)`, `onShow(row)`, `onClose()`.
 */
export class Detail {
  constructor(model, actions) {
    Object.assign(this, { model, actions, row: null, request: null });
    this.dialog = byId("detail");
    this.dialog.addEventListener("close", () => this.closed());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    byId("detail-close").addEventListener("click", () => this.dialog.close());
    byId("detail-before").addEventListener("click", () => actions.onStep(-1));
    byId("detail-after").addEventListener("click", () => actions.onStep(1));
    this.picture = byId("detail-picture");
    this.picture.addEventListener("load", () => this.fit());
    this.picture.addEventListener("error", () => this.unreadable());
    new ResizeObserver(() => this.fit()).observe(byId("detail-stage"));
  }

  get open() {
    return this.dialog.open;
  }

  show(row) {
    this.row = row;
    const { table, run } = this.model;
    const id = idOf(table, row);
    this.id = id;
    byId("detail-broken").hidden = true;
    this.picture.hidden = false;
    this.picture.src = imageOf(id, false);
    this.picture.alt = this.model.describe(row);
    byId("detail-title").textContent = run.classes[table.class[row]];
    const level = byId("detail-level");
    level.textContent = `${table.level[row]} %`;
    setStyle(level, "border-color", levelColour(table.level[row]));
    byId("detail-seed").textContent =
      `seed ${table.seed[row]} · clip_similarity ${asScore(table.score[row], 3)}`;
    this.restyle();
    if (!this.dialog.open) {
      this.dialog.showModal();
      byId("detail-stage").focus();
    }
    this.fill(id);
  }

  /** What may change by hand while the dialog is open. */
  restyle() {
    if (this.row === null) return;
    const { marks, kept } = this.model;
    const { hand, tag, note } = marks.of(this.row);
    const state = byId("detail-state");
    state.textContent = this.model.stateOf(this.row);
    state.className = kept[this.row] ? "state kept" : "state dropped";
    byId("detail-tag").textContent = [tag ? `# ${tag}` : "", note].filter(Boolean).join(" · ");
    byId("detail-keep").setAttribute("aria-pressed", hand === KEEP);
    byId("detail-drop").setAttribute("aria-pressed", hand === DROP);
  }

  /** The picture by whole numbers of pixels where it is smaller than its place. */
  fit() {
    const { naturalWidth: width, naturalHeight: height } = this.picture;
    if (!width) return;
    const box = byId("detail-stage").getBoundingClientRect();
    const most = Math.min((box.width - 16) / width, (box.height - 16) / height);
    const whole = Math.floor(most);
    const scale = whole >= 1 ? Math.min(whole, width >= 256 ? 3 : 16) : most;
    this.picture.classList.toggle("tiny", scale >= 2);
    setStyle(this.picture, "width", `${width * scale}px`);
    setStyle(this.picture, "height", `${height * scale}px`);
  }

  unreadable() {
    this.picture.hidden = true;
    byId("detail-broken").hidden = false;
  }

  async fill(id) {
    this.request?.abort();
    this.request = new AbortController();
    const { signal } = this.request;
    const failed = (box) => (error) => {
      if (error.name !== "AbortError")
        box.replaceChildren(el("p", { class: "soft", text: error.message }));
    };
    const [facts, near] = [byId("detail-facts"), byId("detail-neighbours")];
    await Promise.all([
      getJson(`/api/row/${id}`, signal)
        .then((row) => this.fillRow(row))
        .catch(failed(facts)),
      getJson(`/api/neighbours/${id}?count=${NEIGHBOURS}`, signal)
        .then((found) => near.replaceChildren(...this.neighbours(found)))
        .catch(failed(near)),
    ]);
  }

  fillRow(row) {
    const { source } = row;
    if (row.problem) byId("detail-broken").textContent = row.problem;
    byId("detail-source").replaceChildren(
      source.found
        ? this.thumb(realOf(source.digest), `Source ${source.id}`, null, "source")
        : el("p", { class: "soft", text: "The source is no longer among the real images." }),
    );
    const own = { id: row.id, level: row.level, seed: row.seed, try: row.try };
    const same = (each) => each.seed === row.seed && each.try === row.try;
    const all = [own, ...row.siblings].sort((a, b) => a.level - b.level || a.seed - b.seed);
    byId("detail-source").append(...all.filter(same).map((each) => this.sibling(each)));
    const others = all.filter((each) => !same(each));
    byId("detail-others").hidden = !others.length;
    byId("detail-others-name").textContent = `${others.length} other images of this source`;
    byId("detail-siblings").replaceChildren(...others.map((each) => this.sibling(each)));
    byId("detail-facts").replaceChildren(...facts(row));
  }

  sibling({ id, level, seed }) {
    const node = this.thumb(
      imageOf(id),
      `${level} %, seed ${seed}`,
      this.model.rowOf(id),
      `${level} %`,
    );
    if (id === this.id) node.firstChild.setAttribute("aria-current", "true");
    return node;
  }

  neighbours(found) {
    if (found.missing) {
      const words = "Nearest images are found with the embeddings that this command makes:";
      return [el("h3", { text: words }), el("pre", { text: found.missing })];
    }
    const real = found.real.map((each) =>
      this.thumb(
        realOf(each.digest),
        `${each.class}, ${each.split}, ${each.id}`,
        null,
        asScore(each.similarity),
      ),
    );
    const made = found.synthetic.map((each) =>
      this.thumb(
        imageOf(each.id),
        `${each.class}, ${each.level} %`,
        this.model.rowOf(each.id),
        asScore(each.similarity),
      ),
    );
    return [
      el("h3", { text: "Nearest real images" }),
      el("ul", { class: "thumbs" }, ...real),
      el("h3", { text: "Nearest synthetic images" }),
      el("ul", { class: "thumbs" }, ...made),
    ];
  }

  /** A small picture; a button where its row can be shown. */
  thumb(address, words, row, below = null) {
    const picture = el("img", { src: address, alt: words, loading: "lazy", onload: sized });
    picture.addEventListener("error", () => picture.parentNode.classList.add("unreadable"));
    const caption = below === null ? null : el("span", { text: below });
    if (row === null || row === undefined) {
      return el("li", {}, el("span", { class: "small", title: words }, picture, caption));
    }
    const show = () => this.actions.onShow(row);
    return el(
      "li",
      {},
      el(
        "button",
        { type: "button", class: "small", title: words, onclick: show },
        picture,
        caption,
      ),
    );
  }

  closed() {
    this.request?.abort();
    this.picture.removeAttribute("src");
    this.row = null;
    this.actions.onClose();
  }
}

function sized({ target }) {
  target.classList.toggle("tiny", Math.max(target.naturalWidth, target.naturalHeight) <= 64);
}

const FACTS = {
  prompt: "prompt",
  negative_prompt: "negative prompt",
  verdict: "verdict",
  reason: "reason",
  note: "note",
  methods: "may be drawn by",
  round: "round",
  id: "id",
};

function facts(row) {
  const lines = Object.entries(FACTS).map(([key, name]) => [name, row[key]]);
  lines.push(["source", row.source.id]);
  lines.push(["size", `${row.width} × ${row.height}, ${row.bytes} bytes`]);
  lines.push(...Object.entries(row.made ?? {}));
  const shown = lines.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return shown.flatMap(([name, value]) => [
    el("dt", { text: name }),
    el("dd", { text: words(value) }),
  ]);
}

function words(value) {
  if (Array.isArray(value)) return value.join(", ") || "none";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
