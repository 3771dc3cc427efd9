// How numbers, names and commands are written. Nothing here knows the plan or the document.

const UNITS = { "": 1, k: 1e3, m: 1e6, g: 1e9, ki: 2 ** 10, mi: 2 ** 20, gi: 2 ** 30 };

/** Bytes for people, in units of 1000 as disks and Hubs count. */
function size(nbytes) {
  let value = nbytes;
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 1000) return `${unit === "B" ? Math.round(value) : figures(value)}\u00a0${unit}`;
    value /= 1000;
  }
  return `${value < 1000 ? figures(value) : Math.round(value).toLocaleString("en")}\u00a0GB`;
}

/** Three significant figures, without an exponent below 10⁶. */
function figures(value) {
  if (value === 0 || !Number.isFinite(value)) return String(value);
  const text = Number(value.toPrecision(3));
  return Math.abs(text) < 1e-4 || Math.abs(text) >= 1e6 ? scientific(value) : String(text);
}

function scientific(value) {
  const [mantissa, exponent] = value.toExponential(1).split("e");
  const raised = [...exponent.replace("+", "")].map((sign) => (sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign])).join("");
  return `${mantissa}·10${raised}`;
}

/** A share with two or three figures: 0.042 %, 3.2 %, 56.1 %. */
function percent(share) {
  const value = 100 * share;
  // The spaces do not break.
  if (value === 0) return "0\u00a0%";
  if (value < 0.01) return "<\u00a00.01\u00a0%";
  return `${Number(value.toPrecision(value < 10 ? 2 : 3))}\u00a0%`;
}

const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

/** Bytes of "50MB" or "1.5 GiB" exactly as the command line reads them; NaN for anything else. */
function parseSize(text) {
  const match = /^\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*$/.exec(text.toLowerCase());
  if (match === null || !(match[2] in UNITS)) return NaN;
  const nbytes = Math.floor(Number(match[1]) * UNITS[match[2]]);
  return nbytes > 0 && nbytes < 2 ** 53 ? nbytes : NaN;
}

/** A size of three figures that `parseSize` and the command line read. */
function writeSize(nbytes) {
  let value = nbytes;
  for (const unit of ["B", "kB", "MB"]) {
    // 999.6 kB would round to 1000 kB: that is 1MB.
    if (value < 999.5) return `${Number(value.toPrecision(3))}${unit}`;
    value /= 1000;
  }
  return `${value < 999.5 ? Number(value.toPrecision(3)) : Math.round(value)}GB`;
}

// Controls, invisible characters and those that turn the direction of writing: they could make a name look like another.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** A character as an escape of bash and of Python. */
function escaped(character) {
  const code = character.codePointAt(0).toString(16);
  return code.length <= 4 ? `\\u${code.padStart(4, "0")}` : `\\U${code.padStart(8, "0")}`;
}

/** A name as it may be shown: what could not be seen is written as an escape. */
const shown = (name) => name.replace(HIDDEN, escaped);

/** A name of at most `length` characters; its end says more than its middle. */
function shortened(name, length) {
  const text = shown(name);
  if (text.length <= length) return text;
  const head = Math.floor((length - 1) / 3);
  return `${text.slice(0, head)}…${text.slice(text.length - (length - 1 - head))}`;
}

/** One word of a POSIX shell command. */
function quoted(word) {
  if (/^[A-Za-z0-9_@%+=:,./-]+$/.test(word)) return word;
  if (word.search(HIDDEN) >= 0) {
    // bash, zsh and ksh read escapes between $'…', so that the command shows what it does.
    return `$'${word.replace(/[\\']/g, "\\$&").replace(HIDDEN, escaped)}'`;
  }
  return `'${word.replaceAll("'", "'\\''")}'`;
}

/** A path as an argument: one that starts like an option would be taken for one. */
const path = (text) => quoted(text.startsWith("-") ? `./${text}` : text);
