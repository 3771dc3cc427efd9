// The plan of the data island, with what the page derives from it: energies, names taken apart, sums by treatment.

// Words that numbered layers go by in the names of checkpoints.
const LAYERS = /^(layers?|h|blocks?|decoder_layers?|encoder_layers?|transformer_blocks|resblocks|block_list)$/;

/** Stack, layer and module of a tensor name; the layer is null where it has none. */
function takeApart(name) {
  const parts = name.replace(/\.weight$/, "").split(".");
  const isNumber = (part) => /^\d{1,6}$/.test(part);
  let at = parts.findIndex((part, index) => index > 0 && isNumber(part) && LAYERS.test(parts[index - 1]));
  if (at < 0) at = parts.findIndex(isNumber);
  if (at < 0 || at === parts.length - 1) return { stack: "", layer: null, module: parts.join(".") };
  // Further numbers count experts and the like: they share a cell.
  const module = parts.slice(at + 1).map((part) => (isNumber(part) ? "*" : part));
  return { stack: parts.slice(0, at).join("."), layer: Number(parts[at]), module: module.join(".") };
}

function readTensor(row) {
  const tensor = { ...row, ...takeApart(row.name), energy: row.delta_energy ?? 0 };
  tensor.relative = row.delta_energy !== null && row.base_energy > 0 ? Math.sqrt(tensor.energy / row.base_energy) : null;
  if (row.sigma === undefined) return tensor;
  let sum = 0;
  tensor.captured = [0, ...row.sigma.map((sigma) => (sum += sigma * sigma))];
  tensor.known = row.sigma.length;
  tensor.limit = Math.min(...row.shape);
  tensor.noise = tensor.energy > 0 ? Math.min(row.rounding_energy / tensor.energy, 1) : 0;
  tensor.complete = tensor.known === tensor.limit || rest(tensor, tensor.known) <= 1e-9 * tensor.energy;
  // No budget buys what cannot be told from rounding noise.
  const above = row.sigma.filter((value) => value > row.noise_edge).length;
  const settled = above < tensor.known || tensor.complete;
  tensor.useful = row.low_rank ?? (settled ? above : tensor.limit);
  return tensor;
}

function readPlan() {
  const plan = JSON.parse(document.getElementById("plan").textContent);
  plan.tensors = plan.tensors.map(readTensor);
  plan.lowRank = plan.tensors.filter((tensor) => tensor.sigma !== undefined);
  // Matrices that did not change and get zeros where all have one rank.
  const zeros = plan.tensors.filter((tensor) => tensor.sigma === undefined && plan.choice.layout === "uniform");
  plan.zeroUnit = zeros.reduce((sum, tensor) => sum + (tensor.unit ?? 0), 0);
  plan.leastBytes = plan.totals.least_bytes;
  plan.fixed = plan.tensors.reduce((sum, tensor) => sum + tensor.fixed, 0);
  plan.energy = plan.totals.delta_energy;
  plan.lost = plan.tensors.reduce((sum, tensor) => sum + (tensor.treatment === "excluded" ? tensor.energy : 0), 0);
  return plan;
}

/** Size, error and largest rank of the adapter with these ranks. */
function totals(plan, ranks) {
  let [bytes, left, largest] = [plan.fixed, plan.lost, 0];
  plan.lowRank.forEach((tensor, index) => {
    bytes += tensor.unit * ranks[index];
    left += rest(tensor, ranks[index]);
    largest = Math.max(largest, ranks[index]);
  });
  bytes += plan.zeroUnit * largest;
  return { bytes, error: plan.energy > 0 ? Math.sqrt(left / plan.energy) : 0, largest };
}

/** What the fine-tune is, in a sentence or two. */
function recognised(plan) {
  if (isOfGradients(plan)) return "Ranks to train with: what is said of ΔW below is meant of gradients.";
  const energy = plan.lowRank.reduce((sum, tensor) => sum + tensor.energy, 0);
  if (energy === 0) return "No matrix changed: the adapter stores exact tensors only.";
  const base = plan.lowRank.reduce((sum, tensor) => sum + (tensor.base_energy ?? 0), 0);
  const noise = plan.lowRank.reduce((sum, tensor) => sum + tensor.noise * tensor.energy, 0) / energy;
  const merged = plan.lowRank.every((tensor) => tensor.low_rank !== null);
  const dtypes = [...new Set(plan.lowRank.map((tensor) => tensor.dtype))].sort().join(" and ");
  const kind = merged
    ? `A merged LoRA: every ΔW has rank ${Math.max(...plan.lowRank.map((tensor) => tensor.low_rank))} or less.`
    : "A full fine-tune: the spectra fall off without a cliff.";
  const moved = base > 0 ? ` ‖ΔW‖ is ${percent(Math.sqrt(energy / base))} of ‖W‖ over the matrices;` : " Of ‖ΔW‖²";
  return `${kind}${moved} rounding to ${dtypes} explains ${percent(noise)}${base > 0 ? " of ‖ΔW‖²" : ""}.`;
}

const TREATMENTS = {
  "low-rank": "A pair of factors stands for ΔW; its rank decides size and error.",
  exact: "Norms, biases and other small tensors are stored as they are: factors would save nothing.",
  excluded: "Left out as asked: the base's values stay, and their whole change is lost.",
  unchanged: "Equal in base and tuned: nothing to store.",
  missing: "Only one of the models has them, so there is no difference to store.",
  tied: "Share another tensor's values and are restored with it.",
};

/** Tensors, energy and bytes of every treatment that occurs. */
function accounting(plan, ranks) {
  const rank = new Map(plan.lowRank.map((tensor, index) => [tensor, ranks[index]]));
  const rows = new Map();
  for (const tensor of plan.tensors) {
    const row = rows.get(tensor.treatment) ?? { treatment: tensor.treatment, tensors: 0, energy: 0, bytes: 0 };
    row.tensors += 1;
    row.energy += tensor.energy;
    const padded = plan.zeroUnit > 0 ? Math.max(0, ...ranks) : 0;
    row.bytes += tensor.fixed + (tensor.unit ?? 0) * (rank.get(tensor) ?? padded);
    rows.set(tensor.treatment, row);
  }
  const order = Object.keys(TREATMENTS);
  return [...rows.values()].sort((a, b) => order.indexOf(a.treatment) - order.indexOf(b.treatment));
}

/** The plan's own choice in words. */
function choiceInWords({ rule, value, ranks_allowed: allowed, multiple, max_rank: cap, layout, weights }) {
  const rules = {
    auto:
      "the bytes that the directions standing out of each matrix's noise would take, spent where they lower the error most",
    budget: `${size(value)}, spent where it lowers the weighted error most`,
    "total-error": `the smallest adapter with a relative error of at most ${figures(value)} over all tensors`,
    rank: `rank ${value} for every matrix`,
    energy: `in every matrix the directions that hold ${percent(value)} of ‖ΔW‖²`,
    error: `in every matrix a relative error of at most ${figures(value)}`,
    threshold: `every direction with σ above ${figures(value)}`,
    ratio: `every direction with σ of at least σ₁ / ${figures(value)}`,
    "bulk-edge": "every direction that stands out of white noise with the energy of its ΔW",
    "noise-edge": "every direction above what rounding noise alone would have",
    "hard-threshold": "the directions above the optimal hard threshold (Gavish & Donoho) for rounding noise",
    knee: "the directions before the knee of each spectrum",
  };
  const limits = [];
  if (allowed.length) limits.push(`ranks from ${allowed.join(", ")}`);
  if (multiple > 1) limits.push(`multiples of ${multiple}`);
  if (cap !== null) limits.push(`no rank above ${cap}`);
  if (layout === "uniform") limits.push("one rank for all");
  if (["auto", "budget", "total-error"].includes(rule)) limits.push(`weights “${weights}”`);
  return `${rules[rule] ?? rule}${limits.length ? ` (${limits.join("; ")})` : ""}`;
}

// Rules that take a value.
const VALUED = ["energy", "error", "threshold", "ratio"];

// Spectra of gradients (`lora_compress.torch.suggest`): nothing is there to extract.
const isOfGradients = (plan) => plan.options.spectra === "gradients";

/**
 * The words of the command that extracts this adapter, each quoted for a shell, or that plans the ranks to train with;
 * `budget` is a size as text, or null for the plan's own choice.
 */
function command(plan, budget) {
  const { rule, value, weights, ranks_allowed: allowed, multiple, max_rank: cap, layout } = plan.choice;
  const options = plan.options;
  const words = isOfGradients(plan)
    ? ["lora-compress", "plan", "plan.json", "-o", "ranks.json"]
    : ["lora-compress", "extract", path(plan.base), path(plan.tuned), "-o", "adapter/"];
  if (budget !== null) words.push("--budget", budget);
  else if (rule === "budget") words.push("--budget", String(value));
  else if (rule === "total-error") words.push("--error", String(value));
  else words.push("--rank", rule === "rank" ? String(value) : VALUED.includes(rule) ? `${rule}=${value}` : rule);
  const usual = budget === null && rule === "total-error" ? "delta" : "balanced";
  if (weights !== usual) words.push("--weights", quoted(weights));
  if (allowed.length) words.push("--ranks-allowed", allowed.join(","));
  if (multiple > 1) words.push("--ranks-allowed", `${multiple}x`);
  if (cap !== null) words.push("--max-rank", String(cap));
  if (layout !== "peft") words.push("--layout", quoted(layout));
  // A saved plan says the rest itself.
  if (isOfGradients(plan)) return words;
  for (const [flag, key] of [["--include", "include"], ["--exclude", "exclude"], ["--embedding", "embeddings"]]) {
    // With `=`, a pattern that starts with a hyphen is not taken for an option.
    for (const pattern of options[key] ?? []) words.push(quoted(`${flag}=${pattern}`));
  }
  if (options.skip_missing) words.push("--skip-missing");
  if (options.tied_head === false) words.push("--no-tied-head");
  if ((options.format ?? "peft") !== "peft") words.push("--format", quoted(options.format));
  if ((options.dtype ?? "BF16") !== "BF16") words.push("--dtype", quoted(options.dtype));
  if (options.seed) words.push("--seed", String(options.seed));
  return words;
}
