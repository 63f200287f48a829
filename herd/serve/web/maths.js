// TeX in a reply, as MathML, which browsers draw themselves. Who reads TeX is temml (`temml.js`, of others: see NOTICE), which is fetched when
// the first formula is there to be shown; until then, and where it cannot read one, the source stays.
//
// A formula is a program from outside. temml trusts none (no links, pictures, styles or classes of the reply's own), but it is not bounded in
// time: macros that a formula defines, and the few commands that typeset a part twice or more, nest to any amount of work within a line of text.
// Those are refused. What comes out is looked through before it is shown: MathML elements alone, and not so deep that drawing them fails.

const OPTIONS = { throwOnError: true, trust: false, maxSize: [20, 200], maxExpand: 1000 }; // em and pt
const MAX_LENGTH = 4000; // characters; the slowest such formula found took 0.1 s
const MAX_DEPTH = 100;
const MAX_KEPT = 500; // formulas
const AGAIN_MS = 10_000;
const REFUSED = /\\(?:[egx]?def|(?:future)?let|(?:re|provide)?newcommand|renewcommand|cancelto|equilibrium|[a-z]*llap)/;
const MATHML = "http://www.w3.org/1998/Math/MathML";
const TAGS = new Set(
  (
    "math menclose mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot mrow mspace msqrt mstyle msub msubsup msup mtable mtd " +
    "mtext mtr munder munderover none"
  ).split(" "),
);
const UNSEEN = ["id", "href"]; // \label and \tag give names, which belong to the page

let temml = null;
let loading = null;
const made = new Map(); // of a growing reply the last paragraph is made anew all the time

/** Set the closed formulas in an element, at once, or as soon as there is who can. */
export function typeset(container) {
  const found = container.querySelectorAll(".maths.inline:not(.is-set), .maths.display:not(.is-set)");
  if (!found.length) return;
  if (!temml) {
    loading ??= load();
    loading.then(() => temml && typeset(container));
    return;
  }
  for (const element of found) {
    const math = formula(element.textContent, element.classList.contains("display"));
    element.classList.add("is-set");
    if (math) element.replaceChildren(math.cloneNode(true));
    else element.classList.add("is-source");
  }
}

async function load() {
  try {
    temml = (await import("./temml.js")).default;
  } catch {
    setTimeout(() => (loading = null), AGAIN_MS); // the server is away: the page says so elsewhere
  }
}

/** A `math` element, or null. */
function formula(source, isDisplay) {
  const key = `${isDisplay ? "display" : "inline"} ${source}`;
  if (!made.has(key)) {
    if (made.size >= MAX_KEPT) made.clear();
    made.set(key, make(source, isDisplay));
  }
  return made.get(key);
}

function make(source, isDisplay) {
  if (source.length > MAX_LENGTH || REFUSED.test(source)) return null;
  const box = document.createElement("span");
  try {
    temml.render(source, box, { ...OPTIONS, displayMode: isDisplay, wrap: isDisplay ? "none" : "tex" });
  } catch {
    return null; // not TeX, or more than the stack holds
  }
  const [math] = box.children;
  return box.childNodes.length === 1 && isMathML(math) ? math : null;
}

function isMathML(element, depth = 0) {
  if (depth > MAX_DEPTH || element.namespaceURI !== MATHML || !TAGS.has(element.localName)) return false;
  for (const name of UNSEEN) element.removeAttribute(name);
  for (const child of [...element.children]) {
    if (child.localName === "span" && !child.childNodes.length) child.remove(); // where a sheet of styles would number the formula
    else if (!isMathML(child, depth + 1)) return false;
  }
  return ![...element.attributes].some(({ name }) => name.startsWith("on"));
}
