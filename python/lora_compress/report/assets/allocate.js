// Ranks for a budget, as `rust/core/src/rank/allocate.rs` and `Plan.choose` find them: same steps, same order, same sums,
// so that the page and the command agree to the byte.

/**
 * Allowed ranks above 0 for a tensor that can use `limit`, ascending. The last one may be beyond the limit, padded with zeros,
 * where a smaller one would lose directions.
 */
function ladder(choice, limit) {
  const { ranks_allowed: allowed, multiple } = choice;
  const cap = choice.max_rank ?? Infinity;
  const last = allowed.length ? Math.max(...allowed) : Math.ceil(limit / multiple) * multiple;
  const multiples = Array.from({ length: Math.floor(Math.min(last, cap) / multiple) }, (_, at) => (at + 1) * multiple);
  const rungs = allowed.length ? allowed.filter((rank) => rank <= cap) : multiples;
  const end = rungs.findIndex((rank) => rank >= limit);
  return end < 0 ? rungs : rungs.slice(0, end + 1);
}

/** Steps of all tensors by falling worth: each takes a tensor to its next allowed rank. */
function orderedSteps(tensors, choice) {
  const whole = tensors.reduce((sum, tensor) => sum + tensor.weight * tensor.energy, 0);
  const steps = [];
  tensors.forEach((tensor, index) => {
    let from = 0;
    let worth = Infinity;
    for (const rank of tensor.ladder ?? ladder(choice, tensor.useful)) {
      if (!tensor.complete && rank > tensor.known) break;
      if (rank <= from || whole <= 0) continue;
      const bytes = tensor.unit * (rank - from);
      const most = worth * Math.max(bytes, 1);
      const gain = Math.min((tensor.weight * (rest(tensor, from) - rest(tensor, rank))) / whole, most);
      if (gain <= 0) break;
      worth = gain / Math.max(bytes, 1);
      steps.push({ index, rank, bytes, gain, worth });
      from = rank;
    }
  });
  return steps.sort((a, b) => b.worth - a.worth || a.index - b.index || a.rank - b.rank);
}

/** ‖ΔW − ΔW_k‖²: the energy beyond the first `rank` directions (the known ones, where that is more). */
function rest(tensor, rank) {
  return Math.max(tensor.energy - tensor.captured[Math.min(rank, tensor.known)], 0);
}

/** Shares budgets out among the tensors of one plan. */
class Allocation {
  constructor(plan) {
    this.tensors = plan.lowRank;
    this.choice = plan.choice;
    this.least = plan.leastBytes;
    this.uniform = plan.choice.layout === "uniform";
    this.unit = this.tensors.reduce((sum, tensor) => sum + tensor.unit, plan.zeroUnit);
    this.limit = Math.max(0, ...this.tensors.map((tensor) => tensor.useful));
    const unknown = this.tensors.some((tensor) => !tensor.complete);
    this.known = unknown ? Math.max(0, ...this.tensors.map((tensor) => tensor.known)) : Infinity;
    this.ladder = this.limit > 0 ? ladder(this.choice, this.limit) : [0];
    this.steps = this.uniform ? [] : orderedSteps(this.tensors, this.choice);
  }

  /** The smallest budget that can be met, and the one beyond which nothing more is known to buy. */
  get range() {
    if (this.uniform) {
      const top = this.ladder.findLast((rank) => rank <= this.known) ?? this.ladder[0];
      return [this.least + this.ladder[0] * this.unit, this.least + top * this.unit];
    }
    return [this.least, this.least + this.steps.reduce((sum, step) => sum + step.bytes, 0)];
  }

  /** The rank of every tensor under a budget in bytes, or null when it holds too little. */
  ranks(budget) {
    const room = budget - this.least;
    if (room < 0) return null;
    if (this.uniform) {
      const rank = this.ladder.findLast((allowed) => allowed * this.unit <= room);
      return rank ? this.tensors.map(() => rank) : null;
    }
    const ranks = this.tensors.map(() => 0);
    const closed = this.tensors.map(() => false);
    let left = room;
    for (const step of this.steps) {
      if (closed[step.index]) continue;
      // What does not fit closes its tensor; smaller steps of others may still fit.
      if (step.bytes > left) {
        closed[step.index] = true;
        continue;
      }
      left -= step.bytes;
      ranks[step.index] = step.rank;
    }
    return ranks;
  }

  /** Tensors whose rank is all that the plan knows of them: with more σ the allocation could differ. */
  unsettled(ranks) {
    return this.tensors.filter((tensor, index) => {
      if (tensor.complete || tensor.known >= Math.min(tensor.useful, this.choice.max_rank ?? Infinity)) return false;
      if (this.uniform) return tensor.known < Math.min(ranks[index], tensor.useful);
      const usable = ladder(this.choice, tensor.useful).filter((rank) => rank <= tensor.known);
      return ranks[index] === Math.max(0, ...usable);
    });
  }

  /** Ranks along the size–error curve: at most `count` of them, evenly spread over the logarithm of the size. */
  *curve(count) {
    if (this.uniform) {
      for (const rank of this.ladder) if (rank <= this.known) yield this.tensors.map(() => rank);
      return;
    }
    const ranks = this.tensors.map(() => 0);
    const total = this.steps.reduce((sum, step) => sum + step.bytes, 0);
    const factor = this.steps.length ? (total / this.steps[0].bytes) ** (1 / count) : 1;
    let [taken, next] = [0, 0];
    for (const [position, step] of this.steps.entries()) {
      ranks[step.index] = step.rank;
      taken += step.bytes;
      if (taken < next && position < this.steps.length - 1) continue;
      next = taken * factor;
      yield [...ranks];
    }
  }
}
