// One tensor: what its two charts show, and what can be said of the σ that are not known.

/** Lowest and highest share of ‖ΔW‖² that `rank` directions can hold: equal up to the σ known, then what others allow. */
function heldShare(tensor, rank) {
  const { known, limit, energy, captured, sigma } = tensor;
  if (energy <= 0) return [1, 1];
  if (rank <= known) return Array(2).fill(Math.min(captured[rank] / energy, 1));
  if (tensor.complete) return [1, 1];
  const held = Math.min(captured[known] / energy, 1);
  const last = known > 0 ? sigma[known - 1] ** 2 / energy : 1;
  // σ descend: what is left is spread evenly at worst, and no direction holds more than the last one known.
  return [held + ((1 - held) * (rank - known)) / (limit - known), Math.min(held + last * (rank - known), 1)];
}

/** The first and the last rank that may be the one at which a share is reached. */
function rankOf(tensor, share) {
  const first = (side) => {
    let [low, high] = [0, tensor.limit];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (heldShare(tensor, middle)[side] >= share * (1 - 1e-12)) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  return [first(1), first(0)];
}

function cutAt(rank, last) {
  if (rank < 1) return [];
  const right = rank > last * 0.6;
  return [{ k: rank, label: `rank ${rank}`, align: right ? "right" : "left", dx: right ? -6 : 6 }];
}

function spectrumData(tensor, rank) {
  // A floor for σ that are rounding of the sums: a logarithm has no place for 0.
  const floor = (tensor.sigma[0] ?? 0) * 1e-9;
  const sigma = tensor.sigma
    .map((value, at) => ({ k: at + 1, sigma: value, kept: at < rank, tip: `σ${at + 1} = ${value.toPrecision(4)}` }))
    .filter((row) => row.sigma > floor);
  const least = sigma.at(-1)?.sigma ?? 1;
  const noise = tensor.noise_edge;
  const edge = noise > 0 && noise > least / 20 ? [{ sigma: noise, label: "noise edge" }] : [];
  return { sigma, edge, cut: cutAt(rank, sigma.length) };
}

function spectrumNote(tensor) {
  const unknown = tensor.limit - tensor.known;
  const last = tensor.sigma.at(-1) ?? 0;
  const parts = [
    tensor.complete
      ? `All ${tensor.known} σ above 0 are known.`
      : `${tensor.known} of ${tensor.limit} σ are known; the other ${unknown} are at most ${figures(last)}.`,
  ];
  const edge = tensor.noise_edge;
  if (edge > 0 && edge <= last / 20) parts.push(`Rounding noise ends far below, at ${figures(edge)}.`);
  if (tensor.low_rank !== null) parts.push(`A cliff after rank ${tensor.low_rank}: low-rank but for noise.`);
  return parts.join(" ");
}

const LEVELS = [0.5, 0.9, 0.99];

function energyData(tensor, rank) {
  const curve = tensor.sigma.map((_, at) => ({ k: at + 1, share: heldShare(tensor, at + 1)[0] }));
  const unknown = [];
  if (!tensor.complete) {
    const factor = Math.max((tensor.limit / tensor.known) ** (1 / 60), 1.0001);
    for (let k = tensor.known; k < tensor.limit; k = Math.max(k + 1, Math.ceil(k * factor))) unknown.push(k);
    unknown.push(tensor.limit);
  } else if (tensor.known < tensor.limit) {
    curve.push({ k: tensor.limit, share: 1 });
  }
  const marks = LEVELS.map((share) => [share, ...rankOf(tensor, share)])
    .filter(([, first, last]) => first === last && first > 0)
    .map(([level, k]) => ({ k, share: heldShare(tensor, k)[0], tip: `${percent(level)} at rank ${k}` }));
  return {
    known: curve,
    unknown: unknown.map((k) => ({ k, low: heldShare(tensor, k)[0], high: heldShare(tensor, k)[1] })),
    marks,
    cut: cutAt(rank, Math.sqrt(tensor.limit)),
  };
}

function energyNote(tensor) {
  const parts = LEVELS.map((share) => {
    const [first, last] = rankOf(tensor, share);
    return `${percent(share)} ${first === last ? `at rank ${first}` : `between rank ${first} and ${last}`}`;
  });
  const left = rest(tensor, tensor.known) / tensor.energy;
  const unknown = tensor.complete ? "" : ` The σ not computed hold ${percent(left)}: grey is where the curve can run.`;
  return `${parts.join("; ")}.${unknown}`;
}

/** Tensors worth a look, by what they are notable for. */
function notable(plan, ranks) {
  const best = (value) => {
    const values = plan.lowRank.map(value);
    return values.indexOf(Math.max(...values));
  };
  const error = (tensor, index) => (tensor.energy > 0 ? rest(tensor, ranks[index]) / tensor.energy : 0);
  return [
    ["largest change", best((tensor) => tensor.relative ?? 0)],
    ["most energy", best((tensor) => tensor.energy)],
    ["highest rank", best((_, index) => ranks[index])],
    ["largest error", best(error)],
    ["most noise", best((tensor) => tensor.noise)],
  ];
}

function tensorNote(tensor, rank) {
  const error = tensor.energy > 0 ? Math.sqrt(rest(tensor, rank) / tensor.energy) : 0;
  return [
    `${tensor.shape.join(" × ")} ${tensor.dtype}`,
    ...(tensor.relative === null ? [] : [`‖ΔW‖/‖W‖ ${percent(tensor.relative)}`]),
    `rank ${rank}, ${size(tensor.fixed + tensor.unit * rank)}, error ${error.toFixed(3)}`,
    `stable rank ${figures(tensor.stable_rank)}`,
    `effective rank ${tensor.complete ? "" : "≤ "}${figures(tensor.effective_rank)}`,
    `rounding noise ${percent(tensor.noise)}`,
  ].join(" · ");
}
