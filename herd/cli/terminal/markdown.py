"""Units of Markdown as lines of styled text, each within a width where it can be.

Colours are the terminal's own sixteen, so that they suit a dark and a light one. Code is neither wrapped nor padded: the terminal breaks a
long line itself, and what is copied from it is the code. Line breaks are kept as the model made them, as in poems and addresses. A link
shows where it leads, always: a terminal that hides the address behind words would let a reply lie about it.
"""

from collections.abc import Iterator
from functools import lru_cache
from io import StringIO
from typing import Any

from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Token as Kind
from pygments.util import ClassNotFound
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from herd.cli.terminal.blocks import CONTEXT_LINES, PARSER, Unit
from herd.cli.terminal.clean import clean

NARROWEST = 8  # cells that text is wrapped to at least, however narrow the terminal
_COLUMN = 7  # cells that a column of a table wants at least; narrower ones become lists

_HEADINGS = {"h1": "bold underline magenta", "h2": "bold magenta", "h3": "bold"}
_INLINE = {"strong": "bold", "em": "italic", "s": "strike"}
_CODE = {
    Kind.Comment: "bright_black",
    Kind.Keyword: "magenta",
    Kind.Literal.String: "green",
    Kind.Literal.Number: "cyan",
    Kind.Name.Function: "blue",
    Kind.Name.Class: "blue",
    Kind.Name.Decorator: "yellow",
    Kind.Name.Builtin: "cyan",
    Kind.Name.Tag: "blue",
    Kind.Name.Attribute: "cyan",
    Kind.Operator.Word: "magenta",
    Kind.Generic.Deleted: "red",
    Kind.Generic.Inserted: "green",
    Kind.Generic.Heading: "bold",
}
_DIM = "bright_black"


class Renderer:
    """Units into lines, for one console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def lines(self, unit: Unit, width: int) -> list[Text]:
        """The unit's lines, the blank one before it included."""
        width = max(width, NARROWEST)
        match unit.kind:
            case "fence":
                found = [Text(unit.text, style=_DIM)]
            case "code":
                found = [code_lines((*unit.before, unit.text)[-CONTEXT_LINES:], unit.language)[-1]]
            case "markdown":
                found = self._children(SyntaxTreeNode(PARSER.parse(unit.text)), width, unit.text.split("\n"))
        return [*([Text()] if unit.gap else []), *found]

    def _children(self, node: SyntaxTreeNode, width: int, source: list[str], *, is_tight: bool = False) -> list[Text]:
        """Blocks one below the other, a blank line between them; where `is_tight`, only where the source has one."""
        found: list[Text] = []
        for child in node.children:
            if found and (not is_tight or (child.map and not source[child.map[0] - 1].strip(" >\t"))):
                found.append(Text())
            found += self._block(child, width, source)
        return found

    def _block(self, node: SyntaxTreeNode, width: int, source: list[str]) -> list[Text]:
        match node.type:
            case "heading":
                return self._wrapped(inline(node, _HEADINGS.get(node.tag, "italic")), width)
            case "fence" | "code_block":
                code = code_lines(tuple(clean(node.content.rstrip("\n")).split("\n")), node.info.strip().partition(" ")[0].lower())
                return [Text(node.markup, style=_DIM), *code, Text(node.markup, style=_DIM)] if node.type == "fence" else code
            case "blockquote":
                return [Text("│ ", style=_DIM) + line for line in self._children(node, max(width - 2, NARROWEST), source)]
            case "bullet_list" | "ordered_list":
                return self._children(node, width, source, is_tight=True)
            case "list_item":
                return self._item(node, width, source)
            case "hr":
                return [Text("─" * min(width, 40), style=_DIM)]
            case "table":
                return self._table(node, width)
            case _:
                return self._wrapped(inline(node), width)

    def _item(self, node: SyntaxTreeNode, width: int, source: list[str]) -> list[Text]:
        mark = f"{node.info}{node.markup} " if node.info else "• "
        body = self._children(node, max(width - len(mark), NARROWEST), source, is_tight=True) or [Text()]
        indent = Text(" " * len(mark))
        return [Text(mark, style="cyan") + body[0], *((indent + line if line else line) for line in body[1:])]

    def _wrapped(self, text: Text, width: int) -> list[Text]:
        return list(text.wrap(self.console, width))

    def _table(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        rows = [[inline(cell) for cell in row.children] for part in node.children for row in part.children]
        sides = [str(cell.attrs.get("style", "")).removeprefix("text-align:") or "left" for cell in node.children[0].children[0].children]
        head, *body = rows
        if width < len(head) * _COLUMN:
            return self._records(head, body, width)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, border_style=_DIM, header_style="bold")
        for cell, side in zip(head, sides, strict=True):
            justify: Any = side
            table.add_column(cell, justify=justify, overflow="fold")
        for row in body:
            table.add_row(*row)
        lines = self.console.render_lines(table, self.console.options.update(width=width), pad=False)
        return [Text.assemble(*((segment.text, segment.style or "") for segment in line)) for line in lines]

    def _records(self, head: list[Text], body: list[list[Text]], width: int) -> list[Text]:
        """A table where there is no room for one: each row as lines of "column: cell"."""
        found: list[Text] = []
        for row in body or [[Text() for _ in head]]:
            found += [Text()] if found else []
            for name, cell in zip(head, row, strict=True):
                found += self._wrapped(Text.assemble((name.plain, "bold"), ": ", cell), width)
        return found


def inline(node: SyntaxTreeNode, style: str = "") -> Text:
    """The text of a block that holds text alone."""
    text = Text(style=style)
    for child in node.children:
        for token in child.to_tokens() if child.type == "inline" else []:
            _add(text, token.children or [])
    return text


def _add(text: Text, tokens: list[Token]) -> None:
    styles: list[str] = []
    links: list[tuple[str, int]] = []  # address, where its words begin
    for token in tokens:
        kind = token.type.removesuffix("_open").removesuffix("_close")
        match token.type:
            case "softbreak" | "hardbreak":
                text.append("\n")
            case "code_inline":
                text.append(clean(token.content), " ".join([*styles, "cyan"]))
            case "image":
                text.append(clean(f"[{token.content or 'image'}] ({token.attrs.get('src', '')})"), "underline")
            case "link_open":
                links.append((clean(str(token.attrs.get("href", ""))), len(text)))
                styles.append("underline")
            case "link_close":
                styles.pop()
                address, start = links.pop()
                if text.plain[start:] not in (address, address.removeprefix("mailto:")):
                    text.append(f" ({address})", _DIM)
            case _ if kind in _INLINE:
                if token.nesting > 0:
                    styles.append(_INLINE[kind])
                else:
                    styles.pop()
            case _:
                text.append(clean(token.content), " ".join(styles))


def code_lines(code: tuple[str, ...], language: str) -> list[Text]:
    """Lines of code in colours. Those of a line depend on what stands before it alone, so that a line that is shown can stay."""
    lines = [Text()]
    for kind, piece in _lexed("\n".join(clean(line) for line in code), language):
        style = next((_CODE[above] for above in reversed(kind.split()) if above in _CODE), "")
        for i, part in enumerate(piece.split("\n")):
            if i:
                lines.append(Text())
            lines[-1].append(part, style)
    return lines


def _lexed(code: str, language: str) -> Iterator[tuple[Any, str]]:
    lexer = _lexer(language)
    if lexer is None:
        yield Kind.Text, code
    else:
        for _, kind, piece in lexer.get_tokens_unprocessed(code):
            yield kind, piece


@lru_cache
def _lexer(language: str) -> Lexer | None:
    try:
        return get_lexer_by_name(language) if language else None
    except ClassNotFound:
        return None


def rows_of(line: Text, columns: int) -> int:
    """Rows of a terminal that a line takes."""
    if cell_len(line.plain) <= columns:
        return 1
    rows, at = 1, 0
    for character in line.plain:
        cells = cell_len(character)
        if at + cells > columns:
            rows, at = rows + 1, 0
        at += cells
    return rows


def ansi(console: Console, line: Text) -> str:
    """A line as a terminal wants it."""
    held, console.file = console.file, StringIO()
    try:
        console.print(line, end="", soft_wrap=True, highlight=False, markup=False, emoji=False)
        return console.file.getvalue()
    finally:
        console.file = held
