"""Markdown on a terminal as it comes: however the text is cut into pieces, what stands there at the end is the same."""

import os
import re
from io import StringIO
from itertools import pairwise

import pyte
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from herd.cli.terminal.blocks import PARSER, Blocks
from herd.cli.terminal.clean import clean
from herd.cli.terminal.markdown import Renderer, rows_of
from herd.cli.terminal.screen import Painted, Plain

TOUR = """# Title
Some *text* with **bold**, `code` and a [link](https://example.org/a_b).
Second line.

1. one
2. two
   - inner `x`
   - inner **y**

   more of two
3. three
```python
def f(x):
    \"\"\"Say
    it.\"\"\"
    return {"a": x}  # why
```
| name | value |
|:-----|------:|
| a | 1 |
| 漢字 | 22 |

> quoted
> > twice

- a

- b
* other list
---
Setext
===
<b>html</b> & \\(a_1 * b_1\\) [x]: y

    indented

end of it"""
LINES = st.sampled_from(
    [*TOUR.split("\n"), "", "", "#", "-", "1.", "```", "~~~~", "    x", "===", "| a | b |", "|---|---|", ">", "- - x", "\t- t"]
)
TEXTS = st.one_of(
    st.lists(LINES, max_size=14).map("\n".join),
    st.text(alphabet="#-*`|>_~ab1.[]()!\\$\n\n \té\x1b\x9b\r<&;", max_size=60),
)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


class Terminal:
    """A real terminal's behaviour by somebody else (pyte), its scrollback included."""

    def __init__(self, columns: int = 40, rows: int = 10) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self.stream = pyte.Stream(self.screen)
        self.size = os.terminal_size((columns, rows))
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self.written.append(text)
        self.stream.feed(re.sub(r"\x1b\[\?2026[hl]", "", text).replace("\n", "\r\n"))
        return len(text)

    def flush(self) -> None: ...

    @property
    def lines(self) -> list[str]:
        scrolled = ["".join(line[i].data for i in range(self.size.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*scrolled, *self.screen.display]).rstrip().split("\n")


def show(pieces: list[str], columns: int = 40, rows: int = 10, every: int = 1, color: str | None = "standard") -> Terminal:
    terminal = Terminal(columns, rows)
    console = Console(file=StringIO(), force_terminal=True, color_system=color, highlight=False, legacy_windows=False, width=columns)
    ticks = iter(range(10**9))
    painted = Painted(terminal, console, lambda: terminal.size, clock=lambda: next(ticks) * 1000.0)
    for i, piece in enumerate(pieces):
        painted.add(piece)
        if i % every == 0:
            painted.paint()
    painted.end()
    return terminal


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.lists(st.integers(0, 2000), max_size=8), st.sampled_from([(40, 10), (12, 5), (100, 30)]))
@example(TOUR, [3], (40, 10))
@example("para\n#hashtag\n", [6], (40, 10))
@example("a | b\n---|---\n1 | 2\n", [5, 6, 7, 8], (40, 10))
@example("x" * 30 + "\n```\n" + "y" * 36, [12, 24, 36, 40, 47], (12, 5))
def test_every_split_ends_the_same(text: str, places: list[int], size: tuple[int, int]) -> None:
    whole, parts = show([text], *size), show(cut(text, places), *size)
    assert parts.lines == whole.lines
    assert show(list(text), *size).lines == whole.lines


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.lists(st.integers(0, 2000), max_size=8))
@example(TOUR, [3])
def test_units_hold_what_one_parse_of_the_whole_finds(text: str, places: list[int]) -> None:
    """Independent of the cutting: the words of all units are those of CommonMark's tree of the whole text, in order."""
    text = clean(text).replace("\t", "    ")
    blocks = Blocks()
    units = [unit for piece in cut(text, places) for unit in blocks.feed(piece)] + blocks.finish()
    found = [
        word
        for unit in units
        for word in (words(unit.text) if unit.kind == "markdown" else "".join(unit.text.split()) * (unit.kind == "code"))
    ]
    assert found == words(text)


def words(text: str) -> list[str]:
    """The characters that are not markup."""
    tokens = PARSER.parse(text)
    held = [child.content for token in tokens for child in (token.children or [token])]
    return list("".join("".join(held).split()))


def test_what_is_finished_is_written_once() -> None:
    """Frames write what is new: less than three times the text for a stream of characters, and a finished line never again."""
    text = "\n\n".join(f"Paragraph {i} with some words." for i in range(40)) + "\n\n```python\n" + "x = 1\n" * 60 + "```\n"
    terminal = show(list(text))
    assert sum(map(len, terminal.written)) < 3 * len(text) + 2000
    assert "".join(terminal.written).count("Paragraph 7") == 1
    assert "\x1b[2J" not in "".join(terminal.written)


def test_an_open_block_higher_than_the_screen_leaves_nothing_behind() -> None:
    table = "| n | square |\n|---|---|\n" + "".join(f"| {i} | {i * i} |\n" for i in range(30))
    lines = show(list(table), 40, 8).lines
    assert [line.split() for line in lines[2:]] == [[str(i), str(i * i)] for i in range(30)]


def test_how_it_looks() -> None:
    assert show([TOUR], 60, 100).lines[:24] == [
        "Title",
        "",
        "Some text with bold, code and a link",
        "(https://example.org/a_b).",
        "Second line.",
        "",
        "1. one",
        "2. two",
        "   • inner x",
        "   • inner y",
        "",
        "   more of two",
        "3. three",
        "",
        "```python",
        "def f(x):",
        '    """Say',
        '    it."""',
        '    return {"a": x}  # why',
        "```",
        "",
        "name   value",
        "────────────",
        "a          1",
    ]


def test_a_table_without_room_becomes_lists() -> None:
    row = "|" + "|".join(f" cell{i} " for i in range(8)) + "|"
    lines = show([f"{row}\n{'|---' * 8}|\n{row}\n"], 30, 40).lines
    assert lines == [f"cell{i}: cell{i}" for i in range(8)]


@pytest.mark.parametrize("color", ["standard", None])
def test_colours_and_none(color: str | None) -> None:
    written = "".join(show([TOUR], color=color).written)
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", written)) is (color is not None)


ATTACKS = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x9b31m",
    "\x1bc",
    "a\rb",
    "\x08\x08",
    "&#27;[31m",
    "[x](http://a/\x1b[1m)",
    "`\x1b[5m`",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_order_of_a_reply_reaches_the_terminal(attack: str) -> None:
    """All escapes that are written are of the kinds that the painter writes."""
    for text in (attack, f"```{attack}\n{attack}\n```\n", f"| {attack} | b |\n|---|---|\n| {attack} | c |\n", f"- {attack}"):
        written = "".join(show(list(text)).written)
        rest = re.sub(r"\x1b\[[0-9;]*m|\x1b\[\d*[AKJ]|\x1b\[\?2026[hl]|[\r\n]", "", written)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", rest), rest
        assert not re.search(r"\x1b\[([2-9]J|5m)", written)
        plain = StringIO()
        view = Plain(plain)
        view.add(text)
        view.end()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", plain.getvalue())


@given(st.text(alphabet="abé ", max_size=50), st.integers(2, 20))
def test_rows(text: str, columns: int) -> None:
    """Rows are counted as the terminal breaks lines."""
    from rich.text import Text

    terminal = Terminal(columns, 60)
    terminal.write(text)
    assert rows_of(Text(text), columns) == terminal.screen.cursor.y + 1
    assert (rows_of(Text("aaa漢"), 2), rows_of(Text("漢漢漢"), 3), rows_of(Text("漢😀"), 4)) == (
        3,
        3,
        1,
    )  # one of two cells goes down whole


def test_colours_of_a_line_do_not_wait_for_the_next() -> None:
    blocks = Blocks()
    units = blocks.feed('```python\nx = """a\nb"""\n```\n')
    renderer = Renderer(Console(file=StringIO(), width=80))
    assert [line.plain for unit in units for line in renderer.lines(unit, 80)] == ["```python", 'x = """a', 'b"""', "```"]
