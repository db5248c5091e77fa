"""Real texts by how easily they are guessed: functions written once more, prose, and Spec-Bench's questions.

Without outside data the texts come out of the running interpreter's standard library, of the files and documents that
the embedded models were never trained on.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import keyword
import re
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steeple.errors import ConfigError, StorageError
from steeple.evidence.prompts import Source
from steeple.train.data import read_text

DOCUMENTS = ("LICENSE.txt", "idlelib/*.txt", "email/*.rst")  # prose beside the standard library's files, if it has any
PROSE_HERE = "docstrings of held-out files and documents of the Python distribution"
QUESTIONS = "question.jsonl"
SUFFIX = "_again"
BEGINS, ENDS = "*** START OF", "*** END OF"  # of a Project Gutenberg text
CODE_INSIDE = re.compile(r">>>|^\s*(?:(?:async )?def \w+\(|class \w+[:(]|import \w)", re.MULTILINE)  # an example
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Question:
    """A question of Spec-Bench: its category and its turns."""

    category: str
    turns: tuple[str, ...]


Parsed = Sequence[tuple[str, ast.Module]]


def parsed(files: Sequence[str]) -> Parsed:
    """The files that are Python, with their syntax trees."""
    return [(text, tree) for text in files if (tree := _parsed(text)) is not None]


def functions(files: Parsed) -> list[str]:
    """The text of every function of some Python files, from its first decorator on."""
    found: list[str] = []
    for text, tree in files:
        lines = text.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, Function):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found.append(textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])) + "\n")
    return found


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):  # samples of wrong code belong to the standard library, too
        return None


def renamed(function: str) -> str | None:
    """``function`` with ``_again`` behind its name and behind each name that it binds; None if that is not Python.

    Who reads the first can nearly copy the second. Attributes and the names of keyword arguments keep theirs: they
    belong to others.
    """
    tree = _parsed(function)
    if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], Function):
        return None
    names = _bound(tree.body[0])
    lines = function.split("\n")
    found = list(tokenize.generate_tokens(io.StringIO(function).readline))
    depth, places = 0, []
    for before, token, after in zip([None, *found], found, [*found[1:], None], strict=False):
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        attribute = before is not None and before.string == "."
        argument = depth > 0 and after is not None and after.string == "=" and token.start[0] > _header(tree.body[0])
        if token.type == tokenize.NAME and token.string in names and not attribute and not argument:
            places.append(token.end)
    for row, column in reversed(places):
        lines[row - 1] = lines[row - 1][:column] + SUFFIX + lines[row - 1][column:]
    again = "\n".join(lines)
    return again if _parsed(again) is not None else None


def _header(function: Function) -> int:
    """The last line before the body."""
    return function.body[0].lineno - 1


def _bound(function: Function) -> set[str]:
    names = {function.name}
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    kept = {"self", "cls", *keyword.kwlist, *dir(builtins)}
    return names - kept


def prose(files: Parsed, folder: str = "") -> Source:
    """Prose that the embedded models never saw: the ``.txt`` files of ``folder``, or the docstrings of held-out Python
    ``files`` and the documents of the Python distribution.

    Raises:
        StorageError: ``folder`` holds no text.
    """
    if folder:
        texts = [read_text(path) for path in sorted(Path(folder).glob("*.txt"))]
        books = tuple(_body(text) for text in texts if text)
        if not books:
            raise StorageError(
                f"prose = {folder!r} holds no .txt file in UTF-8; give a folder of texts, or leave it out."
            )
        return Source(f"{len(books)} texts of {Path(folder).name}", books)
    root = Path(sysconfig.get_path("stdlib"))
    documents = [read_text(path) for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]
    docstrings = ["\n\n".join(_docstrings(tree)) for _, tree in files]
    return Source(
        PROSE_HERE, tuple(text for text in [*documents, *docstrings] if text and not CODE_INSIDE.search(text))
    )


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found and not CODE_INSIDE.search(found):  # here already, or a file with one example would be lost
                yield found


def _body(text: str) -> str:
    """A text without the head and foot that Project Gutenberg puts around it."""
    start = text.find(BEGINS)
    if start >= 0:
        text = text[text.find("\n", start) + 1 :]
    end = text.find(ENDS)
    return re.sub(r"\r\n?", "\n", text[:end] if end >= 0 else text).strip()


def questions(folder: str) -> tuple[Source, list[Question]]:
    """Spec-Bench (Xia et al. 2024, arXiv 2401.07851): every question, in the file's order, and the file as a source.

    Args: folder that holds ``question.jsonl``, or the file itself.

    Raises:
        StorageError: the file is not there or cannot be read.
        ConfigError: a line of it is no question.
    """
    file = Path(folder)
    file = file / QUESTIONS if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"Spec-Bench's questions {str(file)!r} cannot be read: {error}. Give the folder of {QUESTIONS} from "
            "https://github.com/hemingkx/Spec-Bench (data/spec_bench)."
        ) from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return Source(file.name, (text,)), [_question(file, number, line) for number, line in lines]


def _question(file: Path, number: int, line: str) -> Question:
    try:
        value: Any = json.loads(line)
        category, turns = value["category"], value["turns"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}, line {number}: no 'category' and 'turns' ({error}); give the file as it is."
        ) from error
    if not isinstance(category, str) or not _texts(turns):
        raise ConfigError(f"{file}, line {number}: 'category' is no text or 'turns' no texts; give the file as it is.")
    return Question(category, tuple(turns))


def _texts(turns: Any) -> bool:
    return isinstance(turns, Sequence) and bool(turns) and all(isinstance(turn, str) and turn for turn in turns)
