"""The shape of the package: what may import what, what starts fast, and how large things may grow. Reads the source with `ast`."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "herd"

# Left to right only: a station imports from itself and from those before it. `herd/__init__.py` is the sign over the door, not a station.
ORDER = (
    "errors log chat | text ops | model quant parallel checkpoint | engine gateway | eval train | arena apps | serve cli".replace("|", "")
).split()

# Third-party packages that only these files may import.
CONFINED = {
    "torch.distributed": ["parallel/*", "engine/runner.py", "checkpoint/state.py"],
    "fastapi": ["serve/*"],
    "starlette": ["serve/*"],
    "uvicorn": ["serve/*"],
    "pydantic": ["serve/*"],
    "prometheus_client": ["serve/*"],
    "PIL": ["text/images.py"],
    "llguidance": ["text/grammar.py", "engine/grammar.py"],
}

NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}
FILE_LINES, FUNCTION_LINES, PACKAGE_LINES = 450, 120, 20_000
START_S = 0.3  # of one core, for `import herd` and for `herd --help`


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: Path

    @property
    def place(self) -> str:
        """Path inside the package, with slashes: `model/rope.py`."""
        return self.path.relative_to(PACKAGE).as_posix()

    @property
    def module(self) -> str:
        parts = ("herd", *self.path.relative_to(PACKAGE).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def station(self) -> str:
        return self.path.relative_to(PACKAGE).with_suffix("").parts[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), self.path.as_posix())

    @property
    def num_lines(self) -> int:
        return len(self.path.read_text(encoding="utf-8").splitlines())

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of everything imported anywhere in the file, but for type checkers only. `from a import b` gives `a.b`."""
        package = self.module if self.path.name == "__init__.py" else self.module.rpartition(".")[0]
        for node in executed(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree, without the bodies of `if TYPE_CHECKING:`."""
    yield node
    skipped = node.body if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from executed(child)


SOURCES = [Source(path) for path in sorted(PACKAGE.rglob("*.py"))]
STATIONS = [source for source in SOURCES if source.module != "herd"]
MODULES = {source.module: source for source in SOURCES}


def within(source: Source) -> Iterator[tuple[int, Source]]:
    """Line and file of each import from herd itself. `from herd.a import b` is herd/a/b.py where that exists, else herd/a."""
    for line, name in source.imports():
        if name.split(".")[0] == "herd":
            target = MODULES.get(name) or MODULES.get(name.rpartition(".")[0])
            assert target is not None, f"{source.place}:{line} imports {name}, which does not exist"
            yield line, target


def table(rows: list[tuple[int, str]], limit: int) -> str:
    """The largest first, those over the limit marked."""
    return "\n".join(f"{'>' if n > limit else ' '} {n:6,}  {name}" for n, name in sorted(rows, reverse=True)[:30])


def test_every_station_has_its_place_in_the_order() -> None:
    assert {source.station for source in STATIONS} - {"__main__"} <= set(ORDER)


def test_imports_go_left_to_right() -> None:
    wrong = [
        f"{source.place}:{line} imports {target.place}"
        for source in STATIONS
        if source.station != "__main__"
        for line, target in within(source)
        if target.module != "herd" and ORDER.index(target.station) > ORDER.index(source.station)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {source.module: {target.module for _, target in within(source)} - {"herd", source.module} for source in STATIONS}
    state: dict[str, str] = {}

    def walk(module: str, trail: list[str]) -> None:
        assert state.get(module) != "open", " -> ".join([*trail[trail.index(module) :], module])
        if module not in state:
            state[module] = "open"
            for target in sorted(graph[module]):
                walk(target, [*trail, module])
            state[module] = "closed"

    for module in graph:
        walk(module, [])


def test_third_party_packages_stay_where_they_belong() -> None:
    wrong = []
    for source in SOURCES:
        dotted = [(node.lineno, ast.unparse(node)) for node in executed(source.tree) if isinstance(node, ast.Attribute)]
        for package, places in CONFINED.items():
            if not any(fnmatch(source.place, place) for place in places):
                used = [*source.imports(), *(dotted if "." in package else [])]  # `torch.distributed.x` needs no import of its own
                wrong += [f"{source.place}:{line} uses {name}" for line, name in used if f"{name}.".startswith(f"{package}.")]
    assert not wrong, "\n".join(wrong)


def test_names_say_what_is_inside() -> None:
    wrong = [source.place for source in SOURCES if NAMES_THAT_SAY_NOTHING & {part.removesuffix(".py") for part in Path(source.place).parts}]
    assert not wrong


def test_no_global_statement() -> None:
    wrong = [f"{s.place}:{node.lineno}" for s in SOURCES for node in ast.walk(s.tree) if isinstance(node, ast.Global)]
    assert not wrong


def test_no_print_outside_the_command_line() -> None:
    wrong = [
        f"{source.place}:{node.lineno}"
        for source in SOURCES
        if source.station != "cli"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def test_files_fit_in_an_hour() -> None:
    sizes = [(source.num_lines, source.place) for source in SOURCES]
    assert max(sizes)[0] <= FILE_LINES, "\n" + table(sizes, FILE_LINES)


def test_functions_fit_on_a_screen() -> None:
    sizes = [
        (node.end_lineno - node.lineno + 1, f"{source.place}:{node.lineno} {node.name}")
        for source in SOURCES
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    ]
    assert max(sizes)[0] <= FUNCTION_LINES, "\n" + table(sizes, FUNCTION_LINES)


def test_the_package_can_be_read() -> None:
    sizes = [(source.num_lines, source.place) for source in SOURCES]
    assert sum(n for n, _ in sizes) <= PACKAGE_LINES, "\n" + table(sizes, FILE_LINES)


STARTS = {
    "import herd": "import herd",
    "herd --help": "import runpy; sys.argv = ['herd', '--help']; runpy.run_module('herd.cli.main', run_name='__main__', alter_sys=True)",
}


@pytest.mark.parametrize("start", STARTS)
def test_starts_without_the_heavy_packages(start: str) -> None:
    code = f"import atexit, sys; atexit.register(lambda: print('loaded:', *sys.modules, file=sys.stderr)); {STARTS[start]}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.rpartition("loaded:")[2].split())
    assert "herd" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "tokenizers", "fastapi", "pydantic", "PIL"}


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no way to read the processor time of a child here")
@pytest.mark.parametrize("arguments", [["-c", "import herd"], ["-m", "herd.cli.main", "--help"]], ids=STARTS)
def test_starts_fast(arguments: list[str]) -> None:
    """Processor time, the best of several runs: a busy machine must not fail this."""

    def start() -> float:
        child = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        return usage.ru_utime + usage.ru_stime

    assert min(start() for _ in range(5)) < START_S
