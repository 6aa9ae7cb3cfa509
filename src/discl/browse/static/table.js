/** The rows of a run as typed arrays, and what is counted over them. Pure functions. */

export const KEEP = 1;
export const DROP = 2;
/** Dropped whatever a person says: a copy of a held-out image. */
export const NEVER = 3;
export const HANDS = ["none", "keep", "drop"];
const KINDS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f32: Float32Array };
const ID = 32;

/** The head and the columns of `/api/columns`, without a copy. */
export function decodeColumns(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const columns = {};
  for (const { name, dtype, offset, length: items } of head.columns) {
    columns[name] = new KINDS[dtype](buffer, 4 + length + offset, items);
  }
  return { head, columns };
}

/**
 * The table that all other functions take.
 *
 * - `cell`: class × levels + index of the level, one number for each row.
 * - `order`: rows by class, source, level, seed and try.
 * - `byScore`: rows by score, those without one last.
 */
export function makeTable({ head, columns }, run) {
  const { rows, sources } = head;
  const at = new Uint8Array(256);
  run.levels.forEach((level, index) => (at[level] = index));
  const width = run.levels.length;
  const cell = new Uint32Array(rows);
  for (let i = 0; i < rows; i++) cell[i] = columns.class[i] * width + at[columns.level[i]];
  const table = { rows, ...columns, cell, levels: run.levels, classes: run.classes.length };
  return { ...table, order: spectrumOrder(table, sources), byScore: scoreOrder(columns.score) };
}

/** Id of a row. */
export const idOf = (table, row) => textAt(table.id, row);

/** Digest of the pixels of a source. */
export const digestOf = (table, source) => textAt(table.source_digest, source);

function textAt(bytes, at) {
  let end = (at + 1) * ID;
  while (end > at * ID && !bytes[end - 1]) end--;
  return String.fromCharCode.apply(null, bytes.subarray(at * ID, end));
}

/** `{id: row}` of all rows. */
export function rowsById(table) {
  const letters = new TextDecoder("latin1").decode(table.id);
  const found = new Map();
  for (let i = 0; i < table.rows; i++) {
    found.set(letters.slice(i * ID, (i + 1) * ID).replace(/\0+$/, ""), i);
  }
  return found;
}

/** The server sends rows by source, seed and try; three stable sorts without comparisons. */
function spectrumOrder({ rows, source, level, class: label, classes }, sources) {
  const classOf = new Uint32Array(sources);
  for (let i = 0; i < rows; i++) classOf[source[i]] = label[i];
  const byClass = stableSort(upTo(sources), classOf, classes);
  const rank = new Uint32Array(sources);
  for (let i = 0; i < sources; i++) rank[byClass[i]] = i;
  const rankOf = new Uint32Array(rows);
  for (let i = 0; i < rows; i++) rankOf[i] = rank[source[i]];
  return stableSort(stableSort(upTo(rows), level, 256), rankOf, sources);
}

/** Scores as integers of the same order, sorted half by half. */
function scoreOrder(score) {
  const bits = new Uint32Array(score.slice().buffer);
  const low = new Uint16Array(bits.length);
  const high = new Uint16Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    let key = bits[i] & 0x80000000 ? ~bits[i] : bits[i] | 0x80000000;
    if (Number.isNaN(score[i])) key = 0xffffffff;
    low[i] = key & 0xffff;
    high[i] = key >>> 16;
  }
  return stableSort(stableSort(upTo(bits.length), low, 65536), high, 65536);
}

function upTo(length) {
  const numbers = new Uint32Array(length);
  for (let i = 0; i < length; i++) numbers[i] = i;
  return numbers;
}

function stableSort(order, key, buckets) {
  const next = new Uint32Array(buckets + 1);
  for (let at = 0; at < order.length; at++) next[key[order[at]] + 1]++;
  for (let b = 0; b < buckets; b++) next[b + 1] += next[b];
  const sorted = new Uint32Array(order.length);
  for (let at = 0; at < order.length; at++) sorted[next[key[order[at]]]++] = order[at];
  return sorted;
}

/** For each verdict 0 where the threshold decides, DROP where another rule does, or NEVER. */
export function settledOf(verdicts) {
  const others = { "copies a held-out image": NEVER, "dropped by another rule": DROP };
  return verdicts.map((name) => others[name] ?? 0);
}

/** What each verdict of the last filter was by hand: 0, KEEP or DROP. */
export function handOf(verdicts) {
  return verdicts.map((name) => ({ "kept by hand": KEEP, "dropped by hand": DROP })[name] ?? 0);
}

/** The threshold of each class and level, `[classes × levels]`: a class before a level. */
export function limitsOf(thresholds, table) {
  const { levels, classes } = table;
  const limits = new Float64Array(classes * levels.length);
  const row = levels.map((level) => thresholds.levels.get(level) ?? thresholds.all);
  for (let c = 0; c < classes; c++) {
    const own = thresholds.classes.get(c);
    for (let l = 0; l < row.length; l++) limits[c * row.length + l] = own ?? row[l];
  }
  return limits;
}

/**
 * Which rows are kept at these thresholds, in one pass.
 *
 * - `hand`: what was decided by hand, 0, KEEP or DROP.
 * - `settled`: what `settledOf` says about the verdicts of the run.
 *
 * Fills `kept` and returns how many are kept of each class and level, and in all.
 */
export function judge(table, limits, hand, settled, kept) {
  const { rows, score, verdict, cell } = table;
  const perCell = new Uint32Array(limits.length);
  let total = 0;
  for (let i = 0; i < rows; i++) {
    const fixed = settled[verdict[i]] === NEVER ? NEVER : hand[i] || settled[verdict[i]];
    const keep = fixed ? (fixed === KEEP ? 1 : 0) : score[i] >= limits[cell[i]] ? 1 : 0;
    kept[i] = keep;
    perCell[cell[i]] += keep;
    total += keep;
  }
  return { perCell, total };
}

/** Images of each class and level, `[classes × levels]`. */
export function countCells(table) {
  const all = new Uint32Array(table.classes * table.levels.length);
  for (let i = 0; i < table.rows; i++) all[table.cell[i]]++;
  return all;
}

/**
 * Distinct synthetic images per hard image in one pass over them, as training draws it.
 *
 * - `perCell`: kept images of each class and level.
 * - `hard`: hard images of each class.
 * - `scale`: synthetic images wanted for each hard one.
 * - `only`: index of the one level that is drawn; by default all.
 */
export function effectiveScale(perCell, hard, scale, width, only = null) {
  let drawn = 0;
  let wanted = 0;
  for (let c = 0; c < hard.length; c++) {
    if (!hard[c]) continue;
    let available = 0;
    for (let l = 0; l < width; l++)
      if (only === null || l === only) available += perCell[c * width + l];
    drawn += Math.min(available, roundHalfEven(scale * hard[c]));
    wanted += hard[c];
  }
  return wanted ? drawn / wanted : 0;
}

/** Rounds as Python and numpy do: a half goes to the even number. */
export function roundHalfEven(value) {
  const low = Math.floor(value);
  const rest = value - low;
  if (rest !== 0.5) return Math.round(value);
  return low % 2 ? low + 1 : low;
}

/** Classes and levels that hold images of which none is kept: `[[class, level index]]`. */
export function emptyCells(perCell, all, hard, width) {
  const empty = [];
  for (let i = 0; i < perCell.length; i++) {
    if (all[i] && !perCell[i] && hard[Math.floor(i / width)])
      empty.push([Math.floor(i / width), i % width]);
  }
  return empty;
}

/**
 * The rows of an order that meet all criteria; a criterion that is null lets all pass.
 *
 * - `classes`, `levels`, `prompts`: 1 for each that passes, by class, per cent and prompt.
 * - `kept`: 1 or 0; `verdict`: that of the last `discl filter`.
 * - `method`: bit of the method that must use the row.
 * - `low`, `high`: bounds of the score.
 * - `marks`: a function of a row, for what was done by hand.
 */
export function filterRows(table, order, criteria, kept) {
  const { classes, levels, prompts, low, high, method, marks } = criteria;
  const { verdict, score, level, prompt, used, class: label } = table;
  const found = new Uint32Array(order.length);
  let n = 0;
  for (let at = 0; at < order.length; at++) {
    const i = order[at];
    if (classes && !classes[label[i]]) continue;
    if (levels && !levels[level[i]]) continue;
    if (prompts && !prompts[prompt[i]]) continue;
    if (criteria.kept !== null && kept[i] !== criteria.kept) continue;
    if (criteria.verdict !== null && verdict[i] !== criteria.verdict) continue;
    if (low !== null && !(score[i] >= low)) continue;
    if (high !== null && !(score[i] <= high)) continue;
    if (method !== null && !((used[i] >>> method) & 1)) continue;
    if (marks && !marks(i)) continue;
    found[n++] = i;
  }
  return found.subarray(0, n);
}

/** The rows of a scope by score, those without a score left out; typed, lowest first. */
export function scopeRows(table, scope, thresholds) {
  const { byScore, score, level, class: label } = table;
  const found = new Uint32Array(byScore.length);
  const single = { level: null, class: null, ...scope };
  let n = 0;
  for (const i of byScore) {
    if (Number.isNaN(score[i])) break;
    if (single.class !== null && label[i] !== single.class) continue;
    if (single.class === null && thresholds.classes.has(label[i])) continue;
    if (single.level !== null && level[i] !== single.level) continue;
    if (single.class === null && single.level === null && thresholds.levels.has(level[i])) continue;
    found[n++] = i;
  }
  return found.subarray(0, n);
}

/** How many rows of an order by score are below a cut. */
export function belowCut(rows, score, cut) {
  let low = 0;
  let high = rows.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (score[rows[middle]] < cut) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Counts of scores in equal bins between `low` and `high`, of rows ordered by score. */
export function histogram(rows, score, low, high, bins) {
  const counts = new Uint32Array(bins);
  const perBin = bins / (high - low || 1);
  for (const i of rows) {
    counts[Math.max(0, Math.min(bins - 1, Math.floor((score[i] - low) * perBin)))]++;
  }
  return counts;
}

/** The ends of an axis over all scores, in round steps; 0 to 1 where there is no score. */
export function scoreAxis(table, cuts) {
  const { byScore, score } = table;
  let last = byScore.length - 1;
  while (last >= 0 && Number.isNaN(score[byScore[last]])) last--;
  const ends = last < 0 ? [0, 1] : [score[byScore[0]], score[byScore[last]]];
  const low = Math.min(ends[0], ...cuts);
  const high = Math.max(ends[1], ...cuts);
  return { low: Math.floor(low * 50 - 0.5) / 50, high: Math.ceil(high * 50 + 0.5) / 50 };
}
