// The page: one state, and everything that follows from it.

const at = (id) => document.getElementById(id);
const plan = readPlan();
const allocation = new Allocation(plan);
const planned = plan.lowRank.map((tensor) => tensor.rank);
// What a budget holds beside tensors.
const headers = allocation.least - plan.fixed;
// `budget` is a size as typed, or null while the plan's own ranks are shown.
const state = { budget: null, ranks: planned, metric: "rank", selected: 0 };
const charts = [];
// Charts that no budget changes.
const steady = [];

/** Makes the ranks those of a budget, given as text. Returns what is wrong with it, or null. */
function spend(text) {
  const budget = parseSize(text);
  if (Number.isNaN(budget)) return `“${shown(text)}” is not a size: write 50MB, 1.5GB or a number of bytes.`;
  const ranks = allocation.ranks(budget);
  if (ranks === null) {
    const needed = allocation.uniform
      ? "the lowest allowed rank for every tensor takes"
      : "norms, biases, new rows and file headers take";
    return `${size(budget)} is less than the ${allocation.range[0].toLocaleString("en")} bytes that ${needed}.`;
  }
  Object.assign(state, { budget: text.replace(/\s/g, ""), ranks });
  return null;
}

/** The size nearest to a number of bytes that is written with three figures and can be met. */
function near(bytes) {
  const [least, most] = allocation.range;
  const text = writeSize(Math.min(Math.max(bytes, least), most));
  return parseSize(text) < least ? String(least) : text;
}

const position = (bytes) => {
  const [least, most] = allocation.range;
  return most > least ? Math.round((1000 * Math.log(Math.max(bytes, least) / least)) / Math.log(most / least)) : 0;
};

function showNumbers() {
  const { bytes, error, largest } = totals(plan, state.ranks);
  const write = (id, value, text) => {
    at(id).value = String(value);
    at(id).textContent = text;
  };
  write("total-bytes", bytes, size(bytes));
  at("total-share").textContent = plan.tuned_bytes ? `${percent(bytes / plan.tuned_bytes)} of the tuned model` : "";
  write("total-error", error, error.toFixed(4));
  at("total-kept").textContent = `${percent(Math.max(1 - error * error, 0))} of ‖ΔW‖² kept`;
  write("largest-rank", largest, String(largest));
  const mean = state.ranks.reduce((sum, rank) => sum + rank, 0) / Math.max(state.ranks.length, 1);
  at("mean-rank").textContent = `mean ${figures(mean)} over ${plural(state.ranks.length, "matrix", "matrices")}`;
  const words = command(plan, state.budget).map((text) => element("span", { text }));
  at("command").replaceChildren(...words.flatMap((word) => [word, " "]).slice(0, -1));
  at("reset").disabled = state.budget === null;
}

function showState(fault) {
  const line = at("state");
  line.classList.toggle("refused", fault !== null);
  at("budget").setAttribute("aria-invalid", String(fault !== null));
  if (fault !== null) {
    line.textContent = fault;
    return;
  }
  if (state.budget === null) {
    line.textContent = `The plan's own choice: ${choiceInWords(plan.choice)}.`;
    return;
  }
  const unsettled = allocation.unsettled(state.ranks).length;
  line.textContent = unsettled
    ? `${plural(unsettled, "tensor takes", "tensors take")} every σ that this plan knows` +
      (isOfGradients(plan) ? "." : "; extract looks for more of them and may share the bytes out a little better.")
    : `The ranks that are chosen for this budget. Up to ${size(headers)} of it are for file headers.`;
}

/** Shows the state everywhere but in the control, if any, that the change came from. */
function render(fault = null, source = null) {
  showNumbers();
  showState(fault);
  const bytes = state.budget === null ? totals(plan, state.ranks).bytes + headers : parseSize(state.budget);
  if (source !== "slider") at("slider").value = position(bytes);
  at("slider").setAttribute("aria-valuetext", size(bytes));
  if (source !== "budget") at("budget").value = state.budget ?? near(bytes);
  showAccount(plan, state.ranks);
  table.update(state.ranks);
  showTensor();
  for (const chart of charts) chart.update();
}

// One rendering a frame is enough while the slider moves.
let waiting = false;
function renderSoon(source) {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    render(null, source);
  });
}

function showTensor() {
  const tensor = plan.lowRank[state.selected];
  if (!tensor) return;
  at("tensor").value = String(state.selected);
  at("tensor-note").textContent = tensorNote(tensor, state.ranks[state.selected]);
  at("spectrum-note").textContent = spectrumNote(tensor);
  at("energy-note").textContent = energyNote(tensor);
}

function select(index, scroll = false) {
  state.selected = index;
  table.mark(index);
  showTensor();
  for (const chart of charts) chart.update();
  if (!scroll) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  at("tensor-section").scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
}

function paretoData() {
  const tip = ({ bytes, error }, what) => `${what}: ${size(bytes)}, error ${error.toFixed(4)}`;
  const now = totals(plan, state.ranks);
  const was = totals(plan, planned);
  const most = curve.at(-1)?.bytes ?? now.bytes;
  const right = was.bytes > Math.sqrt(most * (curve[0]?.bytes ?? 1));
  const label = { ...was, label: "plan", align: right ? "left" : "right", dx: right ? 8 : -8 };
  return { curve, now: [{ ...now, tip: tip(now, "now") }], plan: [{ ...was, tip: tip(was, "plan") }], labels: [label] };
}

function showFacts() {
  const name = plan.tuned.replace(/\/+$/, "").split("/").slice(-2).join("/") || plan.tuned;
  at("title").textContent = shown(name);
  at("recognised").textContent = recognised(plan);
  const facts = [
    ["base", shown(plan.base)],
    ["tuned", shown(plan.tuned)],
    ["size", `${size(plan.tuned_bytes)} in ${plural(plan.tensors.length, "tensor")}`],
  ];
  for (const [term, text] of facts) {
    at("facts").append(element("dt", { text: term }), element("dd", { text, class: term === "size" ? "" : "name" }));
  }
  at("warnings").append(...plan.warnings.map((text) => element("li", { text: shown(text) })));
  const prints = Object.entries(plan.fingerprints).map(([side, print]) => `${side} ${shown(print).slice(0, 12)}`);
  at("footer").textContent =
    `lora-compress ${shown(plan.version)} · ${prints.join(" · ")} · spectra found in ${figures(plan.seconds)} s · ` +
    "this file works offline · charts: Vega (BSD-3-Clause)";
}

function wireBudget() {
  at("slider").addEventListener("input", () => {
    const [least, most] = allocation.range;
    spend(near(least * (most / least) ** (Number(at("slider").value) / 1000)));
    renderSoon("slider");
  });
  const typed = () => render(spend(at("budget").value), "budget");
  at("budget").addEventListener("input", typed);
  at("budget").addEventListener("change", typed);
  at("reset").addEventListener("click", () => {
    Object.assign(state, { budget: null, ranks: planned });
    render();
    // The button has just been disabled and would take the focus with it.
    at("slider").focus();
  });
  at("copy").addEventListener("click", async () => {
    const text = at("command").textContent;
    try {
      await navigator.clipboard.writeText(text);
      at("copy").textContent = "Copied";
      setTimeout(() => (at("copy").textContent = "Copy"), 1500);
    } catch {
      // Frames of notebooks may not write to the clipboard: leave it to the reader's own key.
      getSelection().selectAllChildren(at("command"));
    }
  });
}

function wireTensor() {
  const options = plan.lowRank.map(({ name }, index) => element("option", { value: index, text: shortened(name, 90) }));
  at("tensor").append(...options);
  at("tensor").addEventListener("change", () => select(Number(at("tensor").value)));
  notable(plan, planned).forEach(([label], number) => {
    const button = element("button", { type: "button", text: label });
    button.addEventListener("click", () => select(notable(plan, state.ranks)[number][1]));
    at("presets").append(button);
  });
}

function wireMap(map) {
  const showNote = () => (at("map-note").textContent = `${METRICS[state.metric].note} Click a cell to see its spectrum.`);
  for (const [name, { label }] of Object.entries(METRICS)) {
    const radio = element("input", { type: "radio", name: "metric", value: name });
    radio.checked = name === state.metric;
    radio.addEventListener("change", () => {
      state.metric = name;
      showNote();
      map.draw();
    });
    at("metrics").append(element("label", {}, [radio, label]));
  }
  showNote();
}

function wireTheme() {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const show = () => {
    at("theme").textContent = isDark() ? "Light theme" : "Dark theme";
    for (const chart of [...charts, ...steady]) chart.draw();
  };
  at("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  dark.addEventListener("change", show);
  show();
}

/** Draws the charts anew when there is more or less room for them. */
function watchWidth() {
  let [width, timer] = [at("report").clientWidth, 0];
  new ResizeObserver(() => {
    if (at("report").clientWidth === width) return;
    width = at("report").clientWidth;
    clearTimeout(timer);
    timer = setTimeout(() => [...charts, ...steady].forEach((chart) => chart.draw()), 120);
  }).observe(at("report"));
}

const curve = [...allocation.curve(240)].map((ranks) => totals(plan, ranks));
const table = new TensorTable(plan, select);
at("report").hidden = false;
showFacts();
wireBudget();
wireTensor();
if (plan.lowRank.length > 0) {
  state.selected = notable(plan, planned)[0][1];
  const map = heatMap(plan, state, select);
  const tensor = () => [plan.lowRank[state.selected], state.ranks[state.selected]];
  charts.push(paretoChart(paretoData, (bytes) => render(spend(near(bytes + headers)))), map);
  charts.push(spectrumChart(() => spectrumData(...tensor())), energyChart(() => energyData(...tensor())));
  wireMap(map);
} else {
  for (const section of document.querySelectorAll(".needs-ranks")) section.hidden = true;
  at("slider").disabled = at("budget").disabled = true;
}
const comparison = readComparison();
if (comparison !== null) steady.push(...showDecompositions(comparison, plan.totals.bytes));
table.update(state.ranks);
table.show();
table.mark(state.selected);
wireTheme();
render();
watchWidth();
Promise.all([...charts, ...steady].map((chart) => chart.ready)).then(() => (document.documentElement.dataset.drawn = "true"));
