// Colours for code: comments, strings, numbers, keywords. Not a parser of any language, only what most of them share.

const FAMILIES = {
  c: {
    names: "c cpp c++ h cc java javascript js jsx mjs typescript ts tsx go rust rs swift kotlin kt csharp cs php scala dart json css cuda zig",
    comment: /\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)/y,
    string: /"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|`(?:\\.|[^`\\])*`?/y,
  },
  script: {
    names: "python py ruby rb bash sh shell zsh console yaml yml toml r perl pl makefile dockerfile ini elixir julia jl nim",
    comment: /#[^\n]*/y,
    string: /"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?/y,
  },
  sql: {
    names: "sql lua haskell hs ada",
    comment: /--[^\n]*/y,
    string: /"(?:\\.|[^"\\\n])*"?|'(?:''|[^'\n])*'?/y,
  },
  markup: {
    names: "html xml svg vue",
    comment: /<!--[^]*?(?:-->|$)/y,
    string: /"[^"\n]*"?|'[^'\n]*'?/y,
  },
};

const KEYWORDS = new Set(
  (
    "abstract and as assert async await begin bool break case catch char class const constexpr continue crate def default defer del delete do " +
    "double elif else elsif end enum except export extends extern false final finally float fn for from func function global goto if impl " +
    "implements import in instanceof int interface is lambda let local long loop match mod module mut namespace new nil none nonlocal not null " +
    "of operator or override package pass private protected pub public raise ref return select self short signed sizeof static struct super " +
    "switch template then this throw trait true try type typedef typeof undefined union unsafe unsigned until use using var virtual void " +
    "volatile when where while with yield create table insert into values update set delete join on group by order having limit distinct " +
    "echo fi done esac export"
  ).split(" "),
);
const WORD = /[A-Za-z_$][\w$]*/y;
const NUMBER = /0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?/y;
const OTHER = /[^\w"'`#/<$-]+|[^]/y;

const family = Object.fromEntries(Object.values(FAMILIES).flatMap((one) => one.names.split(" ").map((name) => [name, one])));

/** Pieces `[kind, text]` that together are the code; kind is comment, string, number, keyword, name (before a bracket), or "". */
export function highlight(code, language) {
  const rules = Object.hasOwn(family, language) ? family[language] : null;
  if (!rules || code.length > 100_000) return [["", code]];
  const kinds = [["comment", rules.comment], ["string", rules.string], ["number", NUMBER], ["word", WORD], ["", OTHER]];
  const pieces = [];
  for (let at = 0; at < code.length; ) {
    for (const [kind, pattern] of kinds) {
      pattern.lastIndex = at;
      const text = pattern.exec(code)?.[0];
      if (!text) continue;
      at += text.length;
      const found = kind === "word" ? kindOfWord(text, code[at], language) : kind;
      if (found === "" && pieces.at(-1)?.[0] === "") pieces.at(-1)[1] += text;
      else pieces.push([found, text]);
      break;
    }
  }
  return pieces;
}

function kindOfWord(word, next, language) {
  if (KEYWORDS.has(language === "sql" || word === "None" || word === "True" || word === "False" ? word.toLowerCase() : word)) return "keyword";
  return next === "(" ? "name" : "";
}
