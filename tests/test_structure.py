"""The house rules that no linter knows: stairs, sizes, names of methods, paths of machines."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from steeple.draft import DRAFTERS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "steeple"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [path.relative_to(SOURCE).as_posix() for path in FILES]

# Each room imports from lower stairs or from itself only.
STAIRS = (
    ("errors", "types", "request", "config", "hardware"),
    ("ops", "hf", "plan"),
    ("cache", "verify"),
    ("model", "select"),
    ("draft",),
    ("engine", "train", "convert", "padded"),
    ("llm", "__init__"),
    ("evidence",),
    ("jobs", "proof", "bench", "serve"),
    ("cli",),
)
# A device and a training option are called so as well.
METHODS = set(DRAFTERS) - {"auto"}
# On these stairs the rooms do not know each other either.
STRANGERS = (2, 5)
STAIR = {room: height for height, rooms in enumerate(STAIRS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports from, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: import by the full name"
            module = (node.module or "").split(".")
            if module == ["steeple"]:
                names = {alias.name for alias in node.names}
                # `from steeple import hf` names a room, `from steeple import LLM` the package's own face
                rooms |= {name if name in STAIR else "__init__" for name in names}
            elif module[0] == "steeple":
                rooms.add(module[1])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "steeple":
                    rooms.add(parts[1] if len(parts) > 1 else "__init__")
    return rooms


def too_high(room: str, imports: set[str]) -> set[str]:
    """Imports that a file of ``room`` may not have."""
    own = STAIR[room]
    return {
        other for other in imports if STAIR[other] > own or (STAIR[other] == own and other != room and own in STRANGERS)
    }


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_down_the_stairs(path: Path) -> None:
    room = room_of(path)
    assert room in STAIR, f"{room} stands on no stair: give it one in design.md, pyproject.toml and here"
    assert not too_high(room, imported_rooms(path))


def test_the_stairs_would_be_noticed(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from steeple.engine import Engine\n    import steeple.cache.paged\n")
    assert imported_rooms(wrong) == {"engine", "cache"}
    assert too_high("cache", {"engine", "cache"}) == {"engine"}
    assert too_high("cache", {"verify"}) == {"verify"}


def long_functions(path: Path) -> dict[str, int]:
    """Functions of more than 60 lines, decorators and docstring included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, kinds):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if node.end_lineno - first >= 60:
                found[node.name] = node.end_lineno - first + 1
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_fit_a_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert not long_functions(path)


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the constants that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            found.add(id(body[0].value))
    return found


def names_compared(path: Path) -> set[str]:
    """Names of drafters that steer a file: compared with, matched, or looked up by."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        steers: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            steers = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            steers = [node.slice]
        elif isinstance(node, ast.MatchValue):
            steers = [node.value]
        for part in steers:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Constant) and leaf.value in METHODS:
                    found.add(str(leaf.value))
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_control_flow_by_the_name_of_a_method(path: Path) -> None:
    assert not names_compared(path), "declare it in Needs instead of asking for the name"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in ("cache", "verify", "model", "engine", "ops")])
def test_the_core_knows_no_drafter_by_name(path: Path) -> None:
    tree = ast.parse(path.read_text())
    prose = docstrings(tree)
    words = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in prose]
    assert not [w for w in words if isinstance(w, str) and any(name in w for name in METHODS)]


def test_names_would_be_noticed(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f(m):\n    if m == 'ngram' or m in ('x', 'small_lm'):\n        return 'ngram'\n")
    assert names_compared(wrong) == {"ngram", "small_lm"}


# Spelled in parts, so that this file does not hold what it looks for.
FOLDERS = "wo" + "rk|ro" + "ot|tm" + "p|ho" + "me"
PRIVATE = re.compile(rf"(?<![\w.])/(?:{FOLDERS})/[\w.]|art" + "ifactory")
TEXTS = {".py", ".md", ".toml", ".json", ".yaml", ".yml", ".cfg", ".txt", ".h", ".cpp", ".sh", ""}


def tracked() -> list[Path]:
    """Every file that git keeps or would keep; without git, those of the source and the tests."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return [p for folder in ("src", "tests", "docs") for p in (ROOT / folder).rglob("*")]
    return [ROOT / line for line in listing.splitlines()]


def test_no_path_of_a_machine_in_the_tree() -> None:
    found = []
    for path in tracked():
        if path.suffix in TEXTS and path.is_file() and path.stat().st_size < 2**20:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if PRIVATE.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
