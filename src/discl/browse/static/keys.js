/** What the keys do, in the grid and in the large picture. */

const MOVES = new Set([
  "ArrowLeft",
  "ArrowRight",
  "ArrowUp",
  "ArrowDown",
  "Home",
  "End",
  "PageUp",
  "PageDown",
]);
const DECISIONS = { k: "keep", d: "drop", t: "tag", u: "undo", r: "redo", Backspace: "clear" };

/** Listens to the whole page; `acts` holds a function for each action, the grid and the details. */
export class Keys {
  constructor(acts) {
    this.acts = acts;
    document.addEventListener("keydown", (event) => this.pressed(event));
  }

  pressed(event) {
    const { acts } = this;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const dialog = document.querySelector("dialog[open]");
    if (typing(event.target) || (dialog && dialog.id !== "detail")) {
      if (key === "Escape" && typing(event.target) && !dialog) acts.grid.frame.focus();
      return;
    }
    const undoes = (event.ctrlKey || event.metaKey) && key === "z";
    if (undoes) return done(event, event.shiftKey ? acts.redo : acts.undo);
    if ((event.ctrlKey || event.metaKey) && key === "a" && onGrid(event.target)) {
      return done(event, acts.all);
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog) this.inDetail(event, key);
    else this.inGrid(event, key);
  }

  inDetail(event, key) {
    const { acts } = this;
    if (key === "ArrowLeft" || key === "ArrowUp") done(event, () => acts.step(-1));
    else if (key === "ArrowRight" || key === "ArrowDown") done(event, () => acts.step(1));
    else this.common(event, key);
  }

  inGrid(event, key) {
    const { acts } = this;
    if (!isVisible("page-spectrum")) {
      if (key === "?") this.common(event, key);
      return;
    }
    if (MOVES.has(key)) {
      if (ownsArrows(event.target)) return;
      done(event, () => {
        acts.grid.frame.focus({ preventScroll: true });
        const moved = acts.grid.move(key);
        if (moved && event.shiftKey) acts.extend(moved);
      });
    } else if (key === "Enter" && onGrid(event.target)) done(event, acts.open);
    else if (key === "x" || (key === " " && onGrid(event.target))) done(event, acts.toggle);
    else if (key === "Escape") acts.escape();
    else if (key === "/") done(event, acts.filter);
    else this.common(event, key);
  }

  common(event, key) {
    const name = DECISIONS[key];
    if (name) done(event, this.acts[name]);
    else if (key === "?") done(event, () => document.getElementById("help").showModal());
  }
}

function done(event, act) {
  event.preventDefault();
  act();
}

function typing(target) {
  return target.matches('input:not([type="range"]), select, textarea');
}

const ownsArrows = (target) => target.matches('input, [role="tab"], summary, .scroll');
const onGrid = (target) => target.id === "grid" || target === document.body;
const isVisible = (id) => !document.getElementById(id).hidden;
