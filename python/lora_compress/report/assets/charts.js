// What the charts share: colours of the page, Vega without `eval`, a tooltip that only ever writes text.

/** The value of a CSS colour of the page, whatever notation it is written in. */
function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

function chartConfig() {
  const [ink, muted, rule] = ["ink", "muted", "rule"].map(colour);
  const font = getComputedStyle(document.body).fontFamily;
  return {
    background: null,
    font,
    aria: false,
    view: { stroke: null },
    axis: {
      labelColor: muted, titleColor: muted, titleFontWeight: 400, titleFontSize: 12, labelFontSize: 11.5, titlePadding: 8,
      gridColor: rule, gridOpacity: 0.7, domainColor: rule, tickColor: rule, labelPadding: 5, tickSize: 4,
    },
    legend: { labelColor: muted, titleColor: muted, labelFontSize: 11.5, titleFontSize: 12, titleFontWeight: 400 },
    text: { color: ink, fontSize: 11.5 },
    title: { color: ink, fontSize: 12, fontWeight: 600, anchor: "start", frame: "group", offset: 8 },
  };
}

/** Shows the text of a mark beside the pointer. */
function showTip(_, event, __, value) {
  const tip = document.getElementById("tip");
  tip.hidden = value === null || value === undefined || value === "";
  if (tip.hidden) return;
  tip.textContent = String(value);
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - width - 8);
  const below = event.clientY + 16 + height < innerHeight;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${below ? event.clientY + 16 : event.clientY - height - 12}px`;
}

/** One chart: drawn anew when its form changes, given new data when only numbers do. */
class Chart {
  constructor(id, { spec, data, click }) {
    this.box = document.getElementById(id);
    this.spec = spec;
    this.data = data;
    this.click = click;
    this.turn = 0;
    this.waiting = false;
    this.ready = Promise.resolve(null);
  }

  get width() {
    return this.box.clientWidth;
  }

  /** Draws the chart for the width and theme that the page has now. */
  draw() {
    const turn = ++this.turn;
    const spec = {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json",
      autosize: { type: "fit-x", contains: "padding" },
      padding: { left: 0, right: 6, top: 4, bottom: 2 },
      width: this.width,
      ...this.spec(this.width),
    };
    const datasets = this.data();
    spec.datasets = datasets;
    // With an abstract syntax tree Vega interprets its expressions, so that the page needs no `unsafe-eval`.
    // Errors only: it warns of empty data, which those of a noise edge off the chart are.
    const options = {
      logLevel: 1, ast: true, actions: false, renderer: "svg", mode: "vega-lite", defaultStyle: false, config: chartConfig(),
      tooltip: showTip,
    };
    this.ready = this.ready.then(async (previous) => {
      // Only the last of several calls in a row draws.
      if (turn !== this.turn) return previous;
      previous?.finalize();
      const { view } = await vegaEmbed(this.box, spec, options);
      if (this.click) view.addEventListener("click", (event, item) => this.click(item, event, view));
      return view;
    });
    return this.ready;
  }

  /** Shows the data as they are now. */
  update() {
    // One update that has not begun shows all that came meanwhile.
    if (this.waiting) return this.ready;
    this.waiting = true;
    this.ready = this.ready.then(async (view) => {
      this.waiting = false;
      if (view === null) return view;
      for (const [name, rows] of Object.entries(this.data())) view.data(name, rows);
      await view.runAsync();
      return view;
    });
    return this.ready;
  }
}

const quantitative = (field, rest = {}) => ({ field, type: "quantitative", ...rest });
const SIZES = { labelExpr: "format(datum.value, '~s') + 'B'" };

/** The size–error curve; `read` gives { curve, now, plan }. */
function paretoChart(read, spend) {
  const spec = (width) => {
    const x = quantitative("bytes", {
      scale: { type: "log", nice: false },
      axis: { title: "adapter size", grid: false, tickCount: width < 500 ? 4 : 8, labelOverlap: true, ...SIZES },
    });
    const y = quantitative("error", {
      scale: { domain: [0, 1] },
      axis: { title: "error ‖ΔW − BA‖ / ‖ΔW‖", tickCount: 5, titleAnchor: "end" },
    });
    const accent = colour("accent");
    const rule = { type: "rule", color: accent, strokeDash: [2, 3], opacity: 0.8 };
    return {
      height: 260,
      layer: [
        {
          data: { name: "curve" },
          mark: { type: "line", interpolate: "step-after", color: colour("muted"), strokeWidth: 1.75 },
          encoding: { x, y },
        },
        { data: { name: "now" }, mark: rule, encoding: { x } },
        { data: { name: "now" }, mark: rule, encoding: { y } },
        {
          data: { name: "plan" },
          mark: { type: "point", filled: false, stroke: colour("ink"), size: 110, strokeWidth: 1.5 },
          encoding: { x, y, tooltip: { field: "tip", type: "nominal" } },
        },
        {
          data: { name: "now" },
          mark: { type: "point", filled: true, color: accent, opacity: 1, size: 80 },
          encoding: { x, y, tooltip: { field: "tip", type: "nominal" } },
        },
        {
          data: { name: "labels" },
          mark: { type: "text", align: { expr: "datum.align" }, dx: { expr: "datum.dx" }, dy: -10 },
          encoding: { x, y, text: { field: "label", type: "nominal" } },
        },
      ],
    };
  };
  const click = (_, event, view) => {
    const [left] = view.origin();
    const within = event.offsetX ?? event.clientX - view.container().getBoundingClientRect().left;
    spend(view.scale("x").invert(within - left));
  };
  return new Chart("pareto", { spec, data: read, click });
}

/** The chosen rank as a line, with its label at the height `y`. */
const cutRule = (x, y) => [
  { data: { name: "cut" }, mark: { type: "rule", color: colour("accent"), strokeWidth: 1.25 }, encoding: { x } },
  {
    data: { name: "cut" },
    mark: {
      type: "text", color: colour("accent"), baseline: "middle", align: { expr: "datum.align" }, dx: { expr: "datum.dx" },
    },
    encoding: { x, y, text: { field: "label", type: "nominal" } },
  },
];

/** Singular values of one tensor; `read` gives { sigma, edge, cut }. */
function spectrumChart(read) {
  const spec = () => {
    const x = quantitative("k", {
      scale: { zero: false, nice: false },
      axis: { title: "index k", grid: false, tickMinStep: 1, tickCount: 6 },
    });
    const y = quantitative("sigma", {
      scale: { type: "log", nice: false, padding: 8 },
      axis: {
        title: "σₖ", titleAngle: 0, titleAlign: "left", titleAnchor: "end", titleX: 4, titleY: 2,
        tickCount: 4, gridOpacity: 0.4, format: "~g",
      },
    });
    const kept = { condition: { test: "datum.kept", value: colour("accent") }, value: colour("muted") };
    return {
      height: 240,
      layer: [
        { data: { name: "sigma" }, mark: { type: "line", color: colour("rule"), strokeWidth: 1 }, encoding: { x, y } },
        {
          data: { name: "sigma" },
          mark: { type: "point", filled: true, size: 16, opacity: 1 },
          encoding: { x, y, color: kept, tooltip: { field: "tip", type: "nominal" } },
        },
        { data: { name: "edge" }, mark: { type: "rule", color: colour("warm"), strokeDash: [5, 3] }, encoding: { y } },
        {
          data: { name: "edge" },
          mark: { type: "text", color: colour("warm"), align: "left", baseline: "bottom", dy: -3 },
          encoding: { x: { value: 6 }, y, text: { field: "label", type: "nominal" } },
        },
        ...cutRule(x, { value: 9 }),
      ],
    };
  };
  return new Chart("spectrum", { spec, data: read });
}

/** Cumulative energy of one tensor; `read` gives { known, unknown, marks, cut }. */
function energyChart(read) {
  const spec = () => {
    const x = quantitative("k", {
      scale: { type: "log", nice: false },
      axis: { title: "rank", grid: false, tickCount: 5, labelOverlap: true, format: "~s" },
    });
    const y = quantitative("share", {
      scale: { domain: [0, 1] },
      axis: { title: null, values: [0, ...LEVELS], format: "~%", labelOverlap: false },
    });
    const band = { type: "area", color: colour("muted"), opacity: 0.22, line: false };
    return {
      height: 240,
      layer: [
        {
          data: { name: "unknown" },
          mark: band,
          encoding: { x, y: quantitative("low", { scale: y.scale, axis: y.axis }), y2: { field: "high" } },
        },
        { data: { name: "known" }, mark: { type: "line", color: colour("accent"), strokeWidth: 2 }, encoding: { x, y } },
        {
          data: { name: "marks" },
          mark: { type: "point", filled: true, color: colour("accent"), size: 46, opacity: 1 },
          encoding: { x, y, tooltip: { field: "tip", type: "nominal" } },
        },
        ...cutRule(x, { value: { expr: "height - 10" } }),
      ],
    };
  };
  return new Chart("energy", { spec, data: read });
}
