// The section on decompositions: charts of sizes and of layers, and the table of all rows.

// In the box from −1 to 1, as Vega scales them: shapes tell series apart where colours cannot. Fewer than colours, so
// that both together take long to come again.
const SHAPES = [
  "M-.8,-.8H.8V.8H-.8Z",
  "M0,-1L1,.8H-1Z",
  "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",
  "M0,1L1,-.8H-1Z",
  "M-.35,-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z",
  "M-1,0L.8,-1V1Z",
  "M0,-.45L.55,-1L1,-.55L.45,0L1,.55L.55,1L0,.45L-.55,1L-1,.55L-.45,0L-1,-.55L-.55,-1Z",
];
const CIRCLE = "M-.9,0A.9,.9,0,1,1,.9,0A.9,.9,0,1,1,-.9,0";
const STAR = "M0,-1.2L.3,-.4L1.15,-.37L.48,.15L.7,.97L0,.5L-.7,.97L-.48,.15L-1.15,-.37L-.3,-.4Z";
const SERIES_COLOURS = 8;
// A table of more rows than these scrolls in a box of its own.
const TALL = 40;

/** How a decomposition is drawn; `number` is its place among the series. */
function look({ series }, name) {
  if (name === REFERENCE) return { colour: "muted", shape: CIRCLE, width: 4, area: 90 };
  if (name === MIXTURE) return { colour: "ink", shape: STAR, width: 2, area: 130 };
  const number = series.filter((other) => other !== REFERENCE && other !== MIXTURE).indexOf(name);
  return { colour: `series-${number % SERIES_COLOURS}`, shape: SHAPES[number % SHAPES.length], width: 1.5, area: 70 };
}

/** The colour of a decomposition in the map, where `ab` is what the others stand out of. */
const fill = (comparison, name) => (name === REFERENCE ? "even" : look(comparison, name).colour);

/** The mark of a decomposition beside its name, in the colour that the theme has. */
function swatch(comparison, name, ink = look(comparison, name).colour) {
  const { shape } = look(comparison, name);
  const make = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const picture = make("svg", { class: "swatch", viewBox: "-1.3 -1.3 2.6 2.6", "aria-hidden": "true" });
  picture.append(make("path", { d: shape, style: `fill: var(--${ink})` }));
  return picture;
}

// What the chart can show of a row.
const VALUES = {
  error: { label: "error", axis: "relative error ‖ΔW − stored‖ / ‖ΔW‖", write: (value) => value.toFixed(4) },
  ratio: { label: "error / ab", axis: "error / error of ab", write: (value) => value.toFixed(3) },
  kl: { label: "KL", axis: "KL from the tuned model, nats per token", write: (value) => value.toFixed(4) },
  loss: { label: "loss", axis: "loss, nats per token", write: (value) => value.toFixed(4) },
};
// Differences of a few percent are what this one is for; twice the error of `ab` would flatten them.
const MOST_RATIO = 1.25;

/** Lines of all decompositions; `shows` has the value shown and the names of the series that are not. */
function comparedChart(comparison, shows) {
  const value = (row) => row[shows.value] ?? null;
  const visible = () => comparison.rows.filter((row) => !shows.hidden.has(row.decomposition) && value(row) !== null);
  const data = () => {
    const drawn = new Map(comparison.series.map((name) => [name, { ...look(comparison, name) }]));
    for (const style of drawn.values()) style.colour = colour(style.colour);
    const points = visible().map((row) => ({
      ...drawn.get(row.decomposition), bytes: Math.max(row.bytes, 1), value: value(row), series: row.decomposition,
      tip: rowTip(comparison, row),
    }));
    // The reference lies beneath the others, the mixture on top of them.
    const depth = ({ series }) => (series === REFERENCE ? -1 : Number(series === MIXTURE));
    points.sort((a, b) => depth(a) - depth(b));
    return { points, sizes: sizeLabels(comparison, shows.width) };
  };
  const spec = (width) => {
    shows.width = width;
    const found = visible().map(value);
    const [least, most] = [Math.min(...found), Math.max(...found)];
    // Divergences of small and large adapters are powers of ten apart.
    const log = shows.value === "kl" && least > 0 && most / least > 20;
    const clipped = shows.value === "ratio" && most > MOST_RATIO;
    const scale = clipped ? { domain: [Math.min(least - 0.01, 0.98), MOST_RATIO], nice: false } : { zero: false };
    const x = quantitative("bytes", {
      scale: { type: "log", nice: false, padding: 14 },
      axis: {
        title: "bytes stored", grid: false, tickCount: width < 500 ? 4 : 8, labelOverlap: true, labelSeparation: 6,
        ...SIZES,
      },
    });
    const y = quantitative("value", {
      scale: log ? { type: "log", nice: false, padding: 12 } : scale,
      axis: {
        title: VALUES[shows.value].axis, titleAnchor: "end", tickCount: 6,
        ...(log ? { format: "~g", gridOpacity: 0.35 } : {}),
      },
    });
    // Values of a field as they are; the legend is a part of the page, with boxes to tick.
    const itself = (field, type = "nominal") => ({ field, type, scale: null, legend: null });
    const detail = { field: "series", type: "nominal" };
    return {
      height: width < 500 ? 300 : 340,
      padding: { left: 0, right: 6, top: 20, bottom: 2 },
      layer: [
        {
          data: { name: "sizes" },
          mark: { type: "rule", color: colour("rule"), strokeDash: [2, 3] },
          encoding: { x },
        },
        {
          data: { name: "sizes" },
          mark: { type: "text", color: colour("muted"), baseline: "bottom", align: "center" },
          encoding: { x, y: { value: -5 }, text: { field: "label", type: "nominal" } },
        },
        {
          data: { name: "points" },
          mark: { type: "line", clip: true },
          encoding: { x, y, detail, stroke: itself("colour"), strokeWidth: itself("width", "quantitative") },
        },
        {
          data: { name: "points" },
          transform: [{ filter: clipped ? `datum.value <= ${MOST_RATIO}` : "true" }],
          mark: { type: "point", filled: true, opacity: 1 },
          encoding: {
            x, y, shape: itself("shape"), fill: itself("colour"), size: itself("area", "quantitative"),
            tooltip: { field: "tip", type: "nominal" },
          },
        },
      ],
    };
  };
  return new Chart("compared", { spec, data });
}

/** The sizes as marks on the axis of bytes; labels that would touch the one before are left out. */
function sizeLabels(comparison, width) {
  const bytes = comparison.rows.filter((row) => row.error !== null).map((row) => Math.max(row.bytes, 1));
  const reach = Math.log(Math.max(...bytes) / Math.min(...bytes)) || 1;
  let [before, room] = [-Infinity, 0];
  const marks = comparison.sizes.map((label) => {
    const allowed = Math.max(rowOf(comparison, label, REFERENCE).allowed_bytes, 1);
    return { bytes: allowed, label: shortened(label, 16) };
  });
  marks.sort((a, b) => a.bytes - b.bytes);
  for (const mark of marks) {
    const place = (Math.log(mark.bytes) / reach) * (width - 80);
    const half = mark.label.length * 3.6;
    if (place - before < room + half + 6) mark.label = "";
    else [before, room] = [place, half];
  }
  return marks;
}

const seconds = (row) => `${row.seconds.toFixed(1)}\u00a0s`;

function rowTip(comparison, row) {
  const beside = row.ratio === null || row.decomposition === REFERENCE ? "" : `, ${besideReference(row.ratio)} ab`;
  const measures = comparison.measures.filter((name) => row[name] !== undefined);
  return [
    `${calledShort(row.decomposition)} at ${calledShort(row.size)}`,
    `error ${VALUES.error.write(row.error)}${beside}`,
    `${size(row.bytes)} of ${size(row.allowed_bytes)}, ${seconds(row)}`,
    ...measures.map((name) => `${VALUES[name].label} ${VALUES[name].write(row[name])}`),
  ].join("\n");
}

/** The table of all rows, a body for each size. */
function showComparisons(comparison) {
  const columns = [
    { head: "bytes", text: (row) => size(row.bytes) },
    { head: "error", text: (row) => VALUES.error.write(row.error) },
    { head: "to ab", text: (row) => known(row.ratio, VALUES.ratio.write), title: "Error divided by the error of ab" },
    ...comparison.measures.map((name) => {
      const { label, write } = VALUES[name];
      return { head: label, text: (row) => known(row[name], write) };
    }),
    { head: "time", text: seconds },
  ];
  const heads = columns.map(({ head, title }) =>
    element("th", { scope: "col", class: "number", text: head, ...(title ? { title } : {}) }),
  );
  at("comparisons").querySelector("thead tr").append(element("th", { scope: "col", text: "decomposition" }), ...heads);
  for (const label of comparison.sizes) {
    const [least] = ranking(comparison, label);
    const allowed = size(rowOf(comparison, label, REFERENCE).allowed_bytes);
    const head = element("th", { scope: "rowgroup", colspan: columns.length + 1, text: `${calledShort(label)} ` });
    head.append(element("small", { text: `at most ${allowed}` }));
    const failed = comparison.rows.filter((row) => row.size === label && row.error === null);
    const lines = [...ranking(comparison, label), ...failed].map((row) => {
      const cells =
        row.error === null
          ? [element("td", { class: "problem", colspan: columns.length, text: shown(row.problem) })]
          : columns.map(({ text }) => element("td", { class: "number", text: text(row) }));
      const name = nameCell(comparison, row.decomposition, { least: row === least });
      return element("tr", row === least ? { class: "least" } : {}, [name, ...cells]);
    });
    at("comparisons").append(element("tbody", {}, [element("tr", { class: "group" }, [head]), ...lines]));
  }
}

/** The cell of a decomposition's name; what its factors are is told by the title. */
function nameCell(comparison, name, { least = false, ink } = {}) {
  const contraction = comparison.decompositions[name];
  const title = contraction === undefined ? shown(name) : `${shown(name)}: ${shown(contraction)}`;
  const parts = [swatch(comparison, name, ink), calledShort(name)];
  const cell = element("th", { scope: "row", class: "series-name", title }, parts);
  if (least) cell.append(element("span", { class: "visually-hidden", text: " (least error)" }));
  return cell;
}

// What the map of layers can show.
const WINNER_METRICS = {
  which: { label: "which", nominal: true },
  gain: { label: "error below ab", scale: { domainMin: 0, nice: false }, format: ".0%" },
};

/** Cells are coloured by the decomposition that wins there, or by how far it is below `ab`. */
function winnerMap(comparison, shows) {
  const { cells, blocks } = layOut({ lowRank: comparison.tensors });
  const data = () => ({
    cells: cells.map((cell) => {
      const won = winner(comparison, shows.size, cell.indices);
      const gain = won === null || won.ratio === null ? 0 : 1 - won.ratio;
      return {
        block: cell.block, layer: cell.layer, module: cell.module,
        value: shows.metric === "gain" ? gain : colour(won === null ? "paper" : fill(comparison, won.name)),
        label: won === null ? "–" : `${shortened(won.name, 18)}${won.name === REFERENCE ? "" : ` −${percent(gain)}`}`,
        tip: winnerTip(comparison, shows.size, cell, won),
      };
    }),
  });
  const spec = (width) => ({ autosize: { type: "pad" }, ...heatMapSpec(blocks, WINNER_METRICS[shows.metric], width) });
  return new Chart("winner-map", { spec, data });
}

function winnerTip(comparison, label, cell, won) {
  const first = shortened(comparison.tensors[cell.indices[0]].name, 120);
  const others = cell.indices.length > 1 ? ` and ${cell.indices.length - 1} more` : "";
  if (won === null) return `${first}${others}\nno decomposition has all of it`;
  const beside = won.name === REFERENCE || won.ratio === null ? "" : `, ${besideReference(won.ratio)} ab`;
  const taken = rowOf(comparison, label, MIXTURE)?.taken?.[cell.indices[0]];
  const mixture = taken && cell.indices.length === 1 ? `\nbest takes ${calledShort(taken)}` : "";
  return `${first}${others}\n${calledShort(won.name)}: error ${won.error.toFixed(4)}${beside}${mixture}`;
}

function showWinners(comparison, label) {
  const rows = winners(comparison, label);
  const lines = rows.map((row) =>
    element("tr", {}, [
      nameCell(comparison, row.name, { ink: fill(comparison, row.name) }),
      element("td", { class: "number", text: row.tensors.toLocaleString("en") }),
      element("td", { class: "number", text: percent(row.share) }),
      element("td", { class: "number", text: known(row.ratio, VALUES.ratio.write) }),
    ]),
  );
  at("winners").querySelector("tbody").replaceChildren(...lines);
  const all = plural(comparison.tensors.length, "tensor");
  const [most] = rows;
  at("winners-note").textContent = most
    ? `At ${calledShort(label)}, ${calledShort(most.name)} leaves the least error in ${most.tensors} of ${all}; ` +
      "less than 0.01 % below ab counts as ab. A tensor of a group may gain at the cost of others in it."
    : `At ${calledShort(label)} no tensor has been decomposed.`;
}

/** Radio buttons for the keys of what a chart can show. */
function wireSegments(id, choices, chosen, choose) {
  for (const [key, { label }] of choices) {
    const radio = element("input", { type: "radio", name: id, value: key });
    radio.checked = key === chosen;
    radio.addEventListener("change", () => choose(key));
    at(id).append(element("label", {}, [radio, label]));
  }
}

/** Fills the section for a plan of so many bytes; its charts are to be drawn. */
function showDecompositions(comparison, bytes) {
  const shows = { value: "error", hidden: new Set(), size: nearest(comparison, bytes), metric: "which", width: 0 };
  const lines = comparedChart(comparison, shows);
  const map = winnerMap(comparison, shows);
  at("verdict").textContent = verdict(comparison, shows.size);
  const showNote = () => {
    const base = comparison.reference.base?.[shows.value];
    const notes = {
      error: "The error over all tensors.",
      ratio: `Below 1 is better than ab; beyond ${MOST_RATIO} lines leave the chart.`,
    };
    const measured = `Measured on the calibration text${base === undefined ? "" : `; the base has ${figures(base)}`}.`;
    at("measure-note").textContent = `${notes[shows.value] ?? measured} Dotted lines are the bytes of each size.`;
  };
  const values = Object.entries(VALUES).filter(([key]) => ["error", "ratio", ...comparison.measures].includes(key));
  wireSegments("measures", values, shows.value, (key) => {
    shows.value = key;
    showNote();
    lines.draw();
  });
  showNote();
  const drawable = comparison.series.filter((name) =>
    comparison.rows.some((row) => row.decomposition === name && row.error !== null),
  );
  for (const name of drawable) {
    const box = element("input", { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) shows.hidden.delete(name);
      else shows.hidden.add(name);
      lines.draw();
    });
    const title = shown(comparison.decompositions[name] ?? "the one with the least error for each layer or group");
    at("series").append(element("label", { title }, [box, swatch(comparison, name), calledShort(name)]));
  }
  showComparisons(comparison);
  at("comparisons").parentElement.classList.toggle("tall", comparison.rows.length > TALL);
  const option = (label, index) => element("option", { value: index, text: `at ${calledShort(label)}` });
  at("compared-size").append(...comparison.sizes.map(option));
  at("compared-size").value = String(comparison.sizes.indexOf(shows.size));
  at("compared-size").addEventListener("change", () => {
    shows.size = comparison.sizes[Number(at("compared-size").value)];
    showWinners(comparison, shows.size);
    map.draw();
  });
  showWinners(comparison, shows.size);
  wireSegments("winner-metrics", Object.entries(WINNER_METRICS), shows.metric, (key) => {
    shows.metric = key;
    map.draw();
  });
  const drawn = comparison.tensors.length > 0 ? [lines, map] : [lines];
  at("winner-metrics").hidden = drawn.length < 2;
  return drawn;
}
