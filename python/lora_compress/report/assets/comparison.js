// A comparison of decompositions, if the page carries one, and what follows from it in numbers and words.

// The decomposition that the others are measured against, and the mixture of all of them.
const REFERENCE = "ab";
const MIXTURE = "best";
// A tensor is won by a decomposition that leaves this share less than `ab`: less would be a matter of rounding.
const WON = 1e-4;
// Errors closer than this are told as equal.
const EQUAL = 5e-5;

/** The comparison with errors as ratios to `ab`, or null. The names of `series` are in the order of their colours. */
function readComparison() {
  const island = document.getElementById("comparison");
  if (island === null) return null;
  const comparison = JSON.parse(island.textContent);
  const names = [...Object.keys(comparison.decompositions), ...comparison.rows.map((row) => row.decomposition)];
  const others = [...new Set(names)].filter((name) => name !== REFERENCE && name !== MIXTURE).sort();
  const compared = new Set(comparison.rows.map((row) => row.decomposition));
  comparison.series = [REFERENCE, MIXTURE, ...others].filter((name) => compared.has(name));
  comparison.sizes = [...new Set(comparison.rows.map((row) => row.size))];
  for (const row of comparison.rows) {
    const pair = rowOf(comparison, row.size, REFERENCE).error;
    row.ratio = row.error !== null && pair > 0 ? row.error / pair : null;
  }
  comparison.measures = ["kl", "loss"].filter((name) => comparison.rows.some((row) => row[name] !== undefined));
  comparison.tensors = comparison.tensors.map((tensor) => ({ ...tensor, ...takeApart(tensor.name) }));
  return comparison;
}

const rowOf = ({ rows }, label, name) => rows.find((row) => row.size === label && row.decomposition === name);

/** Rows at a size by falling merit, `ab` first among equals and those without an error left out. */
function ranking({ rows }, label, value = "error") {
  const found = rows.filter((row) => row.size === label && row[value] !== null && row[value] !== undefined);
  const last = (row) => row.decomposition !== REFERENCE;
  return found.sort((a, b) => a[value] - b[value] || last(a) - last(b));
}

/** A ratio to `ab` in words. */
function besideReference(ratio) {
  if (Math.abs(ratio - 1) < EQUAL) return "equal to";
  return ratio < 1 ? `${percent(1 - ratio)} below` : `${percent(ratio - 1)} above`;
}

/** The size with bytes nearest to a number of them, as a share. */
function nearest(comparison, bytes) {
  const away = (label) => {
    const allowed = rowOf(comparison, label, REFERENCE).allowed_bytes;
    return Math.abs(Math.log(Math.max(allowed, 1) / Math.max(bytes, 1)));
  };
  return comparison.sizes.reduce((best, label) => (away(label) < away(best) ? label : best));
}

const calledShort = (name) => shortened(name, 40);

/** What the comparison says at a size, in a sentence or two. */
function verdict(comparison, label) {
  const at = `At ${calledShort(label)}`;
  const found = ranking(comparison, label);
  const pair = rowOf(comparison, label, REFERENCE);
  const others = found.filter((row) => row !== pair);
  if (pair.error === 0) return `${at}, ab leaves no error.`;
  const alone = `${at}, ab has an error of ${pair.error.toFixed(4)}; nothing else has been compared.`;
  if (others.length === 0) return alone;
  const [first] = others;
  const second = first.decomposition === MIXTURE ? others[1] : undefined;
  const says = (row) => `${calledShort(row.decomposition)} is ${besideReference(row.ratio)}`;
  const lone = found.length > 2 && first.decomposition !== MIXTURE ? ", the least of all" : "";
  const below = (row) => row.ratio < 1 - EQUAL;
  let text = `${at}, ${says(first)} ab${below(first) ? lone : ""}`;
  if (!below(first) && first.decomposition !== MIXTURE) text += "; nothing is below ab";
  if (second) {
    const single = `${calledShort(second.decomposition)}, is ${besideReference(second.ratio)}`;
    text += `; ${below(second) ? `the best single decomposition, ${single}` : "no single decomposition is below ab"}`;
  }
  return `${text}.${measuredVerdict(comparison, label, pair)}`;
}

/** Who is least by the divergence, where that was measured. */
function measuredVerdict(comparison, label, pair) {
  const [least] = ranking(comparison, label, "kl");
  if (least === undefined || pair.kl === undefined) return "";
  if (least === pair) return ` The KL of ab is the least, ${figures(pair.kl)}.`;
  return ` By KL, ${calledShort(least.decomposition)} is least: ${figures(least.kl)} against ${figures(pair.kl)} of ab.`;
}

/**
 * Of some tensors together, the decomposition that leaves the least at a size, its error and that of `ab`. The mixture
 * takes no part: it is made of the others.
 */
function winner(comparison, label, indices) {
  const candidates = [];
  for (const name of comparison.series) {
    const row = rowOf(comparison, label, name);
    if (name === MIXTURE || row === undefined || row.error === null) continue;
    if (indices.some((index) => row.errors[index] === null)) continue;
    const left = indices.reduce((sum, index) => sum + row.errors[index] ** 2 * comparison.tensors[index].energy, 0);
    candidates.push({ name, left });
  }
  const pair = candidates.find(({ name }) => name === REFERENCE);
  const enough = ({ left }) => !pair || left === pair.left || Math.sqrt(left) < (1 - WON) * Math.sqrt(pair.left);
  // The reference comes first, so of equals it is the one.
  const [best] = candidates.filter(enough).sort((a, b) => a.left - b.left);
  if (best === undefined) return null;
  const energy = indices.reduce((sum, index) => sum + comparison.tensors[index].energy, 0);
  return {
    ...best,
    energy,
    error: energy > 0 ? Math.sqrt(best.left / energy) : 0,
    pair: pair?.left ?? null,
    ratio: pair && pair.left > 0 ? Math.sqrt(best.left / pair.left) : null,
  };
}

/** For every decomposition that wins at a size: how many tensors, with what share of all energy, and to what ratio. */
function winners(comparison, label) {
  const all = comparison.tensors.map((_, index) => winner(comparison, label, [index])).filter((won) => won !== null);
  const energy = all.reduce((sum, won) => sum + won.energy, 0);
  return comparison.series
    .map((name) => ({ name, won: all.filter((won) => won.name === name) }))
    .filter(({ won }) => won.length > 0)
    .map(({ name, won }) => {
      const sum = (key) => won.reduce((total, one) => total + (one[key] ?? 0), 0);
      const ratio = sum("pair") > 0 ? Math.sqrt(sum("left") / sum("pair")) : null;
      return { name, tensors: won.length, share: energy > 0 ? sum("energy") / energy : 0, ratio };
    })
    .sort((a, b) => b.tensors - a.tensors);
}
