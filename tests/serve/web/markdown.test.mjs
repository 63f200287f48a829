import assert from "node:assert/strict";
import { test } from "node:test";

import { highlight } from "../../../herd/serve/web/highlight.js";
import { blocks, safeUrl, show, toDom } from "../../../herd/serve/web/markdown.js";

// The least of a document: enough to see what elements and attributes were made.
class Element {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, children: [], parent: null });
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
  }
  append(child) {
    child.parent = this;
    this.children.push(child);
  }
  remove() {
    this.parent.children = this.parent.children.filter((child) => child !== this);
  }
  get html() {
    const attributes = Object.entries(this.attributes).map(([name, value]) => ` ${name}="${value}"`);
    return `<${this.tag}${attributes.join("")}>${this.children.map((child) => child.html).join("")}</${this.tag}>`;
  }
}
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const page = { createElement: (tag) => new Element(tag), createTextNode: (text) => ({ html: escaped(text) }) };

const html = (text) => blocks(text).map(({ node }) => toDom(node, page).html).join("");
const every = (element, look) => {
  if (!element.tag) return;
  look(element);
  element.children.forEach((child) => every(child, look));
};

const CASES = [
  ["plain", "<p>plain</p>"],
  ["two\nlines", "<p>two<br></br>lines</p>"],
  ["*a* **b** ***c*** ~~d~~ _e_ __f__", "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <del>d</del> <em>e</em> <strong>f</strong></p>"],
  ["**a *b***", "<p><strong>a <em>b</em></strong></p>"],
  ["2 * 3 * 4, a_b_c, **open", "<p>2 * 3 * 4, a_b_c, **open</p>"],
  ["`a<b` and ``c`d``", "<p><code>a&lt;b</code> and <code>c`d</code></p>"],
  ["\\*not\\*", "<p>*not*</p>"],
  ["# One\n### Three", '<h3 class="level1">One</h3><h5 class="level3">Three</h5>'],
  ["- a\n- b\n  - c\n- d", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li><li><p>d</p></li></ul>"],
  ["3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'],
  ["1. a\n\n   more\n2. b", '<ol class="loose"><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>'],
  ["- [x] done", '<ul><li class="has-task"><span class="task">☑ </span><p>done</p></li></ul>'],
  ["> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"],
  ["a\n***\nb", "<p>a</p><hr></hr><p>b</p>"],
  ["In\n1984. Then", "<p>In<br></br>1984. Then</p>"],
  ["cost $5 and $6, but $x^2$", '<p>cost $5 and $6, but <span class="maths inline">x^2</span></p>'],
  ["\\(a\\) and\n\n\\[\nb\n\\]", '<p><span class="maths inline">a</span> and</p><div class="maths display">b</div>'],
  ["so $$a$$ and \\[b\\]", '<p>so <span class="maths display">a</span> and <span class="maths display">b</span></p>'],
  ["$$a\n\nb$$, then $c$", '<div><div class="maths display">a\n\nb</div><p>, then <span class="maths inline">c</span></p></div>'],
  ["$$\n\\frac{1}\n\nafter", '<div class="maths">\\frac{1}</div><p>after</p>'],
  ["a|b\n-|-:\n1|2", '<div class="table"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead><tbody><tr><td>1</td><td class="right">2</td></tr></tbody></table></div>'],
];

test("markdown as it should be", () => {
  for (const [text, wanted] of CASES) assert.equal(html(text), wanted);
});

test("money and shells are no maths", () => {
  const plain = ["$5", "$5-$10", "US$5/CA$7", "from $5 to 10$.", "$5k or $6k", "5$ or 6$", "$HOME/$USER", "${a}/${b}", "$a and $b", "\\$x\\$", "`$x$`", "$ x $", "a$b$"];
  for (const text of plain) assert.ok(!html(text).includes("maths"), text);
  for (const text of ["$5 + 3$", "$5 \\text{ or } 6$", "$n$th", "($x$)", "当$x$时", "$-1$", "$10$"]) assert.match(html(text), /class="maths inline"/, text);
});

test("code keeps every character, and an open block runs to the end", () => {
  const source = "if x < 1:\n\n    y = '<b>'  # *no*";
  for (const text of ["```py\n" + source + "\n```", "~~~py\n" + source]) {
    const shown = html(text);
    assert.ok(shown.startsWith('<figure class="code"><figcaption><span>py</span>'));
    const code = shown.match(/<pre><code>([^]*)<\/code>/)[1].replace(/<\/?span[^>]*>/g, "");
    assert.equal(code, escaped(source));
  }
  assert.match(html("```\na\n```\nafter"), /<p>after<\/p>$/);
});

test("links", () => {
  const made = (url, label) => `<p><a href="${url}" title="${url}" target="_blank" rel="noopener noreferrer">${label}</a></p>`;
  assert.equal(html("[a *b*](https://x.org/a_b_(c))"), made("https://x.org/a_b_(c)", "a <em>b</em>"));
  assert.equal(html("https://x.org/a_b_c"), made("https://x.org/a_b_c", "https://x.org/a_b_c"));
  assert.equal(html("<https://x.org>"), made("https://x.org", "https://x.org"));
  assert.equal(html("![cat](https://x.org/cat.png)"), made("https://x.org/cat.png", "picture: cat")); // not fetched
  assert.match(html("(see https://x.org/a)."), /href="https:\/\/x.org\/a"/);
});

const ATTACKS = [
  "<script>alert(1)</script>",
  "<img src=x onerror=alert(1)>",
  "<svg/onload=alert(1)>",
  "<iframe srcdoc='<script>alert(1)</script>'>",
  "[a](javascript:alert(1))",
  "[a](JaVaScRiPt:alert(1))",
  "[a](java\tscript:alert(1))",
  "[a](java\u0000script:alert(1))",
  "[a](\u0001javascript:alert(1))",
  "[a](&#106;avascript:alert(1))",
  "[a](data:text/html;base64,PHNjcmlwdD4=)",
  "[a](vbscript:x)",
  "[a](//evil.org)",
  "[a](/v1/models)",
  '[a](https://x.org"onmouseover="alert(1))',
  "![a](javascript:alert(1))",
  '![a](https://x.org/a.png"onerror="alert(1))',
  "<javascript:alert(1)>",
  "<https://x.org onclick=alert(1)>",
  "```<img src=x onerror=alert(1)>\n</code></pre><script>alert(1)</script>\n```",
  "```\"><script>alert(1)</script>\nx\n```",
  "|<script>|\n|-|\n|<img src=x onerror=alert(1)>|",
  "# <script>alert(1)</script>",
  "$<script>alert(1)</script>$",
  "\\[<img src=x onerror=alert(1)>\\]",
  "> - 1. <script>alert(1)</script>",
  "[<img src=x onerror=alert(1)>](https://x.org)",
  "[a][b]\n\n[b]: javascript:alert(1)",
];

test("nothing from a reply becomes anything but harmless elements", () => {
  const tags = new Set("p br em strong del code pre figure figcaption span button h3 h4 h5 h6 hr ul ol li blockquote div table thead tbody tr th td a".split(" "));
  const names = new Set(["class", "href", "title", "start", "type", "target", "rel"]);
  for (const attack of [...ATTACKS, ATTACKS.join(" "), ATTACKS.join("\n\n"), ATTACKS.map((text) => `- ${text}`).join("\n")]) {
    for (const { node } of blocks(attack)) {
      every(toDom(node, page), (element) => {
        assert.ok(tags.has(element.tag), `${element.tag} from ${attack}`);
        for (const [name, value] of Object.entries(element.attributes)) {
          assert.ok(names.has(name), `${name} from ${attack}`);
          if (name === "href") assert.match(value, /^(https?:\/\/|mailto:)[^"'<>\s]+$/);
        }
      });
    }
  }
});

test("a node that is on no list becomes text in a span", () => {
  const evil = { tag: "script", attributes: { onclick: "x", href: "javascript:x", src: "x" }, children: ["alert(1)"] };
  assert.equal(toDom(evil, page).html, "<span>alert(1)</span>");
});

test("addresses", () => {
  for (const good of ["https://x.org", "HTTP://x.org/?a=b#c", "mailto:a@b.org"]) assert.equal(safeUrl(good), good);
  for (const bad of ["javascript:x", "java\nscript:x", "data:x", "file:///etc", "//x.org", "x.org", "", "https:x", "blob:https://x"]) {
    assert.equal(safeUrl(bad), null, bad);
  }
});

test("no text takes long", () => {
  const many = 6_000;
  const hostile = [
    "*a ", "**a ", "_a ", "`", "a`", "[", "![", "[a](", "](", "<", "$a", "$", "\\(", "\\[", "> ", ">", "- ", "1. ", "|", "|-", "~~a ", "*", "_", "a*", "*a", "h", "https://",
    "#", "# ", "\n", "- \n", "```", "```\n", "$$", "$$\n", "\\", "a\n", "**a *b ", "`a``b", "- - ", "> - ", "|a\n|-\n", "'", "\"",
  ];
  const started = performance.now();
  blocks("\\(".repeat(200_000)); // searched for by the machine's fastest loop, so only a long text tells
  assert.ok(performance.now() - started < 1000);
  for (const piece of hostile) {
    for (const text of [piece.repeat(many), `\`\`\`js\n${piece.repeat(many)}`, `- a\n${piece.repeat(many)}`, `# ${piece.repeat(many)}x`]) {
      const started = performance.now();
      for (const { node } of blocks(text)) toDom(node, page);
      assert.ok(performance.now() - started < 1000, `${JSON.stringify(piece)} in ${JSON.stringify(text.slice(0, 8))}`);
    }
  }
});

test("a reply that grows ends as if it had come at once, and old blocks stay", () => {
  const text = CASES.map(([source]) => source).join("\n\n");
  const grown = new Element("div");
  for (let end = 0; end <= text.length; end += 3) show(grown, text.slice(0, end), page);
  const first = grown.children[0];
  show(grown, text, page);
  const whole = new Element("div");
  show(whole, text, page);
  assert.equal(grown.html, whole.html);
  assert.equal(grown.children[0], first);
});

test("colours lose no character", () => {
  const code = "# c\nx = 'a\\'b' + \"\"\"d\n\"\"\" // 3.5e-2 /* y */ `z` <!-- w -->\u{1f999} def f(a): return None 'open";
  for (const language of ["python", "js", "sql", "html", "nosuch", "__proto__", "constructor"]) {
    assert.equal(highlight(code, language).map(([, text]) => text).join(""), code);
  }
  assert.deepEqual(highlight("def f(1)", "python"), [["keyword", "def"], ["", " "], ["name", "f"], ["", "("], ["number", "1"], ["", ")"]]);
});
