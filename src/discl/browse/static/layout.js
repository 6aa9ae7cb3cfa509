/** Where each image is drawn. Pure functions; positions in CSS pixels. */

export const LABEL = 20;
export const SCORE = 18;
const GAP = 6;
const GROUP_GAP = 16;
const BLOCK_GAP = 22;
const CAPTION = 44;

/**
 * A plain grid of rows.
 *
 * Returns `{xs, ys, height, blocks}`: the place of each row in its order, the height of all, and
 * no block.
 */
export function flatLayout(rows, width, cell) {
  const step = cell + GAP;
  const perLine = Math.max(1, Math.floor((width + GAP) / step));
  const line = cell + SCORE + GAP;
  const { xs, ys } = places(rows.length);
  for (let at = 0; at < rows.length; at++) {
    xs[at] = (at % perLine) * step;
    ys[at] = Math.floor(at / perLine) * line;
  }
  return { xs, ys, height: Math.ceil(rows.length / perLine) * line, blocks: [], cell };
}

/**
 * A block for each source: the real image at the left, its images by level beside it.
 *
 * Levels follow one another on a line where they fit; a longer one is broken into lines. Rows must
 * be ordered by source and level. A block is `{first, end, top, height, source}`.
 */
export function spectrumLayout(rows, table, width, cell) {
  const real = realSize(width, cell);
  const left = real + GROUP_GAP;
  const { xs, ys } = places(rows.length);
  const blocks = [];
  let top = 0;
  for (let first = 0, end = 0; first < rows.length; first = end) {
    end = endOfRun(rows, table.source, first);
    const bottom = placeBlock({ rows, table, xs, ys, first, end, left, top, width, cell });
    const height = Math.max(bottom - top, LABEL + real + CAPTION);
    blocks.push({ first, end, top, height, source: table.source[rows[first]] });
    top += height + BLOCK_GAP;
  }
  return { xs, ys, height: Math.max(0, top - BLOCK_GAP), blocks, real, left, cell };
}

function placeBlock({ rows, table, xs, ys, first, end, left, top, width, cell }) {
  const step = cell + GAP;
  const line = LABEL + cell + SCORE + GAP;
  let x = left;
  let y = top + LABEL;
  for (let from = first, to = first; from < end; from = to) {
    to = Math.min(end, endOfRun(rows, table.level, from));
    const whole = (to - from) * step - GAP;
    if (x > left && x + whole > width) [x, y] = [left, y + line];
    for (let at = from; at < to; at++) {
      if (x > left && x + cell > width) [x, y] = [left, y + line];
      xs[at] = x;
      ys[at] = y;
      x += step;
    }
    x += GROUP_GAP - GAP;
  }
  return y + cell + SCORE;
}

function endOfRun(rows, column, first) {
  const value = column[rows[first]];
  let end = first + 1;
  while (end < rows.length && column[rows[end]] === value) end++;
  return end;
}

function places(length) {
  return { xs: new Float32Array(length), ys: new Float64Array(length) };
}

/** Side of the real image of a block. */
export function realSize(width, cell) {
  return width < 560 ? Math.min(cell, 76) : Math.round(cell * 1.5);
}

/** The rows of a layout, from and to, that are drawn between two heights. */
export function visibleRows(layout, from, to) {
  const tall = layout.cell + SCORE;
  return [firstAtLeast(layout.ys, from - tall), firstAtLeast(layout.ys, to)];
}

/** The blocks of a layout, from and to, between two heights. */
export function visibleBlocks({ blocks }, from, to) {
  const first = blocks.findIndex !== undefined ? lowerBlock(blocks, from) : 0;
  let end = first;
  while (end < blocks.length && blocks[end].top < to) end++;
  return [first, end];
}

function lowerBlock(blocks, from) {
  let low = 0;
  let high = blocks.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (blocks[middle].top + blocks[middle].height < from) low = middle + 1;
    else high = middle;
  }
  return low;
}

function firstAtLeast(values, wanted) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The place in the order that an arrow key leads to. */
export function neighbour({ xs, ys }, at, key) {
  const last = xs.length - 1;
  if (key === "ArrowLeft") return Math.max(0, at - 1);
  if (key === "ArrowRight") return Math.min(last, at + 1);
  if (key === "Home") return 0;
  if (key === "End") return last;
  const down = key === "ArrowDown" || key === "PageDown";
  let lines = key.startsWith("Page") ? 4 : 1;
  let found = at;
  while (lines-- > 0) found = nextLine(xs, ys, found, down, xs[at]);
  return found;
}

function nextLine(xs, ys, at, down, wanted) {
  let edge = at;
  if (down) {
    while (edge < ys.length && ys[edge] === ys[at]) edge++;
    if (edge === ys.length) return at;
  } else {
    while (edge >= 0 && ys[edge] === ys[at]) edge--;
    if (edge < 0) return at;
  }
  const line = ys[edge];
  let best = edge;
  for (let i = edge; i >= 0 && i < ys.length && ys[i] === line; i += down ? 1 : -1) {
    if (Math.abs(xs[i] - wanted) < Math.abs(xs[best] - wanted)) best = i;
  }
  return best;
}
