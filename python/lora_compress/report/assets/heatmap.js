// The heat map: layers across, modules down, one block for each stack of layers and one for tensors outside of them.

const METRICS = {
  rank: {
    label: "rank",
    note: "Rank of every low-rank ΔW.",
    scale: { type: "sqrt", zero: true, nice: false },
    format: "d",
    text: String,
  },
  error: {
    label: "error",
    note: "Relative error ‖ΔW − BA‖ / ‖ΔW‖.",
    scale: { domain: [0, 1] },
    format: ".1f",
    text: (error) => error.toFixed(2),
  },
  relative: {
    label: "‖ΔW‖/‖W‖",
    note: "How far each tensor moved from the base.",
    scale: { type: "log", nice: false },
    format: "~g",
    text: percent,
  },
  noise: {
    label: "noise",
    note: "Share of ‖ΔW‖² that rounding alone explains.",
    scale: { domain: [0, 1] },
    format: ".0%",
    text: percent,
  },
};

// Without it rounding can put the first cell a hair outside of its axis, which then has no label for it.
const OUTER = 0.02;

/** Cells and blocks of a plan: tensors that differ only in the number of an expert share a cell. */
function layOut(plan) {
  const cells = new Map();
  const blocks = new Map();
  plan.lowRank.forEach((tensor, index) => {
    const outside = tensor.layer === null;
    const block = outside ? "\u0000" : tensor.stack;
    const key = JSON.stringify([block, tensor.layer, tensor.module]);
    const module = shortened(tensor.module, 44);
    const cell = cells.get(key) ?? { block, layer: outside ? "" : tensor.layer, module, indices: [] };
    cell.indices.push(index);
    cells.set(key, cell);
    const shape = blocks.get(block) ?? { outside, modules: new Set(), layers: new Set() };
    shape.modules.add(module);
    shape.layers.add(cell.layer);
    blocks.set(block, shape);
  });
  const ordered = [...blocks.entries()].sort((a, b) => a[1].outside - b[1].outside);
  ordered.forEach(([name, shape], number) => Object.assign(shape, { name, number }));
  for (const cell of cells.values()) cell.block = blocks.get(cell.block).number;
  return { cells: [...cells.values()], blocks: ordered.map(([, shape]) => shape) };
}

/** What a cell shows: rank, error, relative change and noise of its tensors together. */
function measure(plan, cell, ranks) {
  let [energy, left, base, noise, rank] = [0, 0, 0, 0, 0];
  for (const index of cell.indices) {
    const tensor = plan.lowRank[index];
    energy += tensor.energy;
    left += rest(tensor, ranks[index]);
    base += tensor.base_energy ?? 0;
    noise += tensor.noise * tensor.energy;
    rank = Math.max(rank, ranks[index]);
  }
  return {
    rank,
    error: energy > 0 ? Math.sqrt(left / energy) : 0,
    relative: base > 0 && energy > 0 ? Math.sqrt(energy / base) : null,
    noise: energy > 0 ? noise / energy : 0,
  };
}

function cellTip(plan, cell, values) {
  const first = shortened(plan.lowRank[cell.indices[0]].name, 120);
  const others = cell.indices.length > 1 ? ` and ${cell.indices.length - 1} more` : "";
  const moved = values.relative === null ? "" : `\n‖ΔW‖/‖W‖ ${percent(values.relative)}, noise ${percent(values.noise)}`;
  return `${first}${others}\nrank ${values.rank}, error ${values.error.toFixed(3)}${moved}`;
}

/** The heat map; `state` gives ranks, metric and selected index, `select` takes the index of a clicked tensor. */
function heatMap(plan, state, select) {
  const { cells, blocks } = layOut(plan);
  const data = () => ({
    cells: cells.map((cell) => {
      const values = measure(plan, cell, state.ranks);
      const value = values[state.metric];
      return {
        block: cell.block, layer: cell.layer, module: cell.module, index: cell.indices[0], value,
        selected: cell.indices.includes(state.selected),
        label: value === null ? "–" : METRICS[state.metric].text(value),
        tip: cellTip(plan, cell, values),
      };
    }),
  });
  const spec = (width) => ({ autosize: { type: "pad" }, ...heatMapSpec(blocks, METRICS[state.metric], width) });
  const click = (item) => {
    if (item?.datum?.index !== undefined) select(item.datum.index);
  };
  return new Chart("map", { spec, data, click });
}

function heatMapSpec(blocks, metric, width) {
  const longest = Math.max(...blocks.flatMap((block) => [...block.modules].map((module) => module.length)));
  const limit = Math.min(longest * 7.2, width < 600 ? 104 : 320);
  const most = Math.max(...blocks.map((block) => block.layers.size));
  const step = Math.max(3, Math.min(most > 8 ? 32 : 56, (width - limit - 24) / most));
  const height = Math.max(15, Math.min(24, step));
  // A nominal metric gives colours themselves.
  const itself = { field: "value", type: "nominal", scale: null, legend: null };
  const colours = metric.nominal ? itself : quantitative("value", {
    scale: { ...metric.scale, range: ["low", "middle", "high"].map(colour), interpolate: "lab" },
    legend: {
      title: null, orient: "top", direction: "horizontal", gradientLength: Math.min(200, width / 2), gradientThickness: 9,
      format: metric.format, tickCount: 4, offset: 6,
    },
  });
  const stacks = blocks.filter((block) => !block.outside).length;
  const views = blocks.map((block) => {
    const layers = [...block.layers].sort((a, b) => a - b);
    const every = Math.ceil(24 / step);
    const y = {
      field: "module", type: "nominal", sort: [...block.modules].sort(), scale: { paddingInner: 0.08, paddingOuter: OUTER },
      axis: { title: null, domain: false, ticks: false, labelLimit: limit, labelPadding: 8 },
    };
    const axis = {
      title: "layer", domain: false, ticks: false, labelAngle: 0, labelOverlap: false,
      values: layers.filter((_, position) => position % every === 0),
    };
    const x = {
      field: "layer", type: "ordinal", sort: null, axis: block.outside ? null : axis,
      scale: { domain: layers, paddingInner: step > 8 ? 0.08 : 0.02, paddingOuter: OUTER },
    };
    const selected = { condition: { test: "datum.selected", value: colour("warm") }, value: null };
    const rect = {
      mark: { type: "rect", strokeWidth: 2, cornerRadius: step > 8 ? 1.5 : 0 },
      encoding: { x, y, color: colours, stroke: selected, tooltip: { field: "tip", type: "nominal" } },
    };
    const text = {
      mark: { type: "text", align: "left", baseline: "middle", dx: 6, color: colour("muted") },
      encoding: { x: { value: step }, y, text: { field: "label", type: "nominal" } },
    };
    let title = "";
    if (block.outside && stacks > 0) title = "outside the layers";
    if (!block.outside && stacks > 1) title = shortened(block.name, width < 600 ? 26 : 80);
    return {
      data: { name: "cells" },
      transform: [{ filter: { field: "block", equal: block.number } }],
      ...(title ? { title } : {}),
      width: step * layers.length,
      height: height * block.modules.size,
      layer: block.outside ? [rect, text] : [rect],
    };
  });
  return { vconcat: views, spacing: 20, resolve: { scale: { color: "shared", x: "independent", y: "independent" } } };
}
