// The tables: what became of the treatments, and every tensor. Text enters the document as text only.

/** An element with text and attributes. */
function element(tag, { text, ...attributes } = {}, children = []) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Rows that are put into the document at once; more on demand.
const ROWS = 500;

const known = (value, write) => (value === null || value === undefined ? "" : write(value));

// Heading, sort key and text of every column; `live` ones change with the budget.
const COLUMNS = [
  { head: "name", key: (row) => row.tensor.name },
  {
    head: "shape",
    key: (row) => row.tensor.shape.reduce((a, b) => a * b, 1),
    text: (row) => row.tensor.shape.join(" × "),
    number: true,
  },
  { head: "treatment", key: (row) => row.tensor.treatment },
  { head: "‖ΔW‖/‖W‖", key: (row) => row.tensor.relative, write: percent },
  { head: "noise", key: (row) => row.tensor.noise, write: percent, title: "Share of ‖ΔW‖² that rounding alone explains" },
  {
    head: "effective rank",
    key: (row) => row.tensor.effective_rank,
    text: (row) => known(row.tensor.effective_rank, (rank) => `${row.tensor.complete ? "" : "≤ "}${figures(rank)}`),
    number: true,
    title: "exp of the entropy of σ/Σσ; an upper bound where not all σ are known",
  },
  { head: "stable rank", key: (row) => row.tensor.stable_rank, write: figures, title: "‖ΔW‖² / σ₁²" },
  { head: "rank", key: (row) => row.rank, write: String, live: true },
  { head: "error", key: (row) => row.error, write: (error) => error.toFixed(3), live: true },
  { head: "bytes", key: (row) => row.bytes, write: size, live: true },
].map(({ write, ...column }) => (write ? { ...column, number: true, text: (row) => known(column.key(row), write) } : column));

/** All tensors; `select` takes the index of a low-rank tensor that was clicked. */
class TensorTable {
  constructor(plan, select) {
    this.rows = plan.tensors.map((tensor) => ({ tensor, index: plan.lowRank.indexOf(tensor), bytes: tensor.fixed }));
    this.select = select;
    this.sorted = { column: 0, descending: false };
    this.limit = ROWS;
    this.body = document.querySelector("#tensors tbody");
    this.filter = document.getElementById("filter");
    this.treatment = document.getElementById("treatment");
    const treatments = Object.keys(TREATMENTS).filter((name) => plan.tensors.some((tensor) => tensor.treatment === name));
    this.treatment.append(element("option", { value: "", text: "every treatment" }));
    this.treatment.append(...treatments.map((name) => element("option", { value: name, text: name })));
    document.querySelector("#tensors thead tr").append(...COLUMNS.map((column, at) => this.heading(column, at)));
    const anew = () => {
      this.limit = ROWS;
      this.show();
    };
    this.filter.addEventListener("input", anew);
    this.treatment.addEventListener("change", anew);
    this.more = document.getElementById("more");
    this.more.addEventListener("click", () => {
      this.limit = Infinity;
      this.show();
    });
  }

  heading(column, at) {
    const button = element("button", { type: "button", text: column.head });
    button.addEventListener("click", () => {
      // Numbers are looked at from the largest on, names from the first.
      const descending = this.sorted.column === at ? !this.sorted.descending : Boolean(column.number);
      this.sorted = { column: at, descending };
      this.show();
    });
    const title = column.title ? { title: column.title } : {};
    return element("th", { scope: "col", ...title, ...(column.number ? { class: "number" } : {}) }, [button]);
  }

  /** Takes the ranks of a choice and shows them in place: rows do not jump while the budget moves. */
  update(ranks) {
    for (const row of this.rows) {
      if (row.index < 0) continue;
      row.rank = ranks[row.index];
      row.error = row.tensor.energy > 0 ? Math.sqrt(rest(row.tensor, row.rank) / row.tensor.energy) : 0;
      row.bytes = row.tensor.fixed + row.tensor.unit * row.rank;
      row.cells?.forEach((cell, at) => {
        if (COLUMNS[at].live) cell.textContent = COLUMNS[at].text(row);
      });
    }
  }

  mark(index) {
    this.selected = index;
    for (const row of this.rows) row.line?.classList.toggle("selected", row.index === index && index >= 0);
  }

  /** Shows the rows that pass the filters, in order. */
  show() {
    const wanted = this.filter.value.trim().toLowerCase();
    const passing = this.rows.filter(
      ({ tensor }) =>
        tensor.name.toLowerCase().includes(wanted) && ["", tensor.treatment].includes(this.treatment.value),
    );
    const { column, descending } = this.sorted;
    const { key } = COLUMNS[column];
    const names = new Intl.Collator("en", { numeric: true });
    const compare = (a, b) => (typeof a === "string" ? names.compare(a, b) : a - b) * (descending ? -1 : 1);
    const none = (value) => value === null || value === undefined;
    // Tensors that a column says nothing of come last either way.
    passing.sort((a, b) => {
      const [left, right] = [key(a), key(b)];
      const first = none(left) || none(right) ? none(left) - none(right) : compare(left, right);
      return first || names.compare(a.tensor.name, b.tensor.name);
    });
    this.body.replaceChildren(...passing.slice(0, this.limit).map((row) => this.line(row)));
    document.querySelectorAll("#tensors th").forEach((head, at) => {
      if (at === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const all = plural(this.rows.length, "tensor");
    document.getElementById("count").textContent = passing.length === this.rows.length ? all : `${passing.length} of ${all}`;
    this.more.hidden = passing.length <= this.limit;
    this.more.textContent = `Show all ${passing.length}`;
    this.mark(this.selected);
  }

  line(row) {
    if (row.line) return row.line;
    const name = shortened(row.tensor.name, 50);
    const first = element("td", { class: "name", title: shown(row.tensor.name) });
    if (row.index >= 0) {
      const button = element("button", { type: "button", text: name });
      button.addEventListener("click", () => this.select(row.index, true));
      first.append(button);
    } else {
      first.textContent = name;
    }
    const others = COLUMNS.slice(1).map((column) =>
      element("td", { text: (column.text ?? column.key)(row), ...(column.number ? { class: "number" } : {}) }),
    );
    row.cells = [first, ...others];
    row.line = element("tr", {}, row.cells);
    return row.line;
  }
}

/** Sums by treatment. */
function showAccount(plan, ranks) {
  const rows = accounting(plan, ranks).map((row) =>
    element("tr", {}, [
      element("td", { text: row.treatment }),
      element("td", { class: "number", text: row.tensors.toLocaleString("en") }),
      element("td", { class: "number", text: percent(plan.energy > 0 ? row.energy / plan.energy : 0) }),
      element("td", { class: "number", text: size(row.bytes) }),
      element("td", { text: TREATMENTS[row.treatment] ?? "" }),
    ]),
  );
  document.querySelector("#account tbody").replaceChildren(...rows);
}
