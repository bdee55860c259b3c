"""Real text that every machine has: the standard library of the Python that runs this.

* Prose: Python's help topics, long docstrings (each a document under its qualified name), the
  license. Code: the modules' sources, without the docstrings that are documents of their own, so
  that no text occurs twice.
* Only what Debian's python3-minimal and libpython3-stdlib hold too: no tests, no idlelib, no
  tkinter, no lib2to3; no character tables and no build configuration, which are no text.
* Files, not documents, are split into training and validation, by a hash of their path; all orders
  follow from hashes. The same Python version gives the same corpus on every machine.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nanochat.spec import SpecError

MAX_TRAIN_CHARS = 6_000_000
MIN_DOCSTRING_CHARS = 240
"""Shorter docstrings stay in the code: on their own they are not worth a document."""
MIN_FILES = 100
PIECE_CHARS = 1_200

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "lib-dynload", "__phello__"}
    | {"test", "tests", "idlelib", "turtledemo", "tkinter", "lib2to3", "distutils", "ensurepip"}
    | {"encodings"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")
TOPICS_FILE = "pydoc_data/topics.py"
SPLIT_SALT = "files"
"""Chosen so that the help topics, half of the prose, are in training at any usual fraction."""
LICENSE_FILE = "LICENSE.txt"

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class _Document(NamedTuple):
    is_code: bool
    order_key: str
    """Hash that orders documents."""
    text: str


def stdlib_split(val_fraction: float, root: Path | None = None) -> tuple[list[str], list[str]]:
    """Training and validation documents from the standard library at `root`.

    Prose is taken before code until MAX_TRAIN_CHARS characters are reached. Raises SpecError where
    there are no sources to read.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = sorted(_source_files(root), key=lambda path: _hash(SPLIT_SALT + _name(path, root)))
    if len(paths) < MIN_FILES:
        raise SpecError(
            f"{root} holds {len(paths)} readable modules of the standard library, {MIN_FILES} are "
            "needed; install it with its sources (Debian: libpython3-stdlib), or give another "
            "data.source"
        )
    num_val = max(1, round(len(paths) * val_fraction))
    val = _in_order(d for path in paths[:num_val] for d in _documents(path, root))
    train = _in_order(d for path in paths[num_val:] for d in _documents(path, root))
    return _capped(train), [d.text for d in val]


def _source_files(root: Path) -> Iterator[Path]:
    license_file = root / LICENSE_FILE
    if license_file.is_file():
        yield license_file
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        if not SKIPPED_FOLDERS.intersection(folders) and not path.name.startswith(SKIPPED_PREFIXES):
            yield path


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _in_order(documents: Iterator[_Document]) -> list[_Document]:
    return sorted(documents, key=lambda d: d.order_key)


def _capped(documents: list[_Document]) -> list[str]:
    """Texts of up to MAX_TRAIN_CHARS characters, prose before code, in the order of `documents`."""
    taken: set[str] = set()
    chars = 0
    for document in sorted(documents, key=lambda d: d.is_code):
        if chars + len(document.text) <= MAX_TRAIN_CHARS:
            taken.add(document.order_key)
            chars += len(document.text)
    return [d.text for d in documents if d.order_key in taken]


def _documents(path: Path, root: Path) -> Iterator[_Document]:
    name = _name(path, root)
    text = path.read_text(encoding="utf-8", errors="replace")
    if name == LICENSE_FILE:
        yield from _cut(False, name, text)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except SyntaxError:
        return
    if name == TOPICS_FILE:
        for topic, prose in _topics(tree).items():
            yield from _cut(False, f"{name}#{topic}", prose)
        return
    code, docstrings = _split_docstrings(text, tree, _module_name(name))
    for title, prose in docstrings.items():
        yield _Document(False, _hash(f"{name}#{title}"), f"{title}\n\n{prose}\n")
    yield from _cut(True, name, code)


def _cut(is_code: bool, name: str, text: str) -> Iterator[_Document]:
    """Documents of about PIECE_CHARS characters, cut where a line stands at the margin after a
    blank one: between definitions, or between paragraphs.

    Small documents mix well: a step of a toy run reads one or two thousand tokens.
    """
    piece: list[str] = []
    size = number = 0
    before = ""
    for line in text.splitlines(keepends=True):
        at_margin = not before.strip() and bool(line.strip()) and not line[0].isspace()
        if at_margin and size >= PIECE_CHARS:
            yield _Document(is_code, _hash(f"{name}#{number}"), "".join(piece))
            piece, size, number = [], 0, number + 1
        piece.append(line)
        size += len(line)
        before = line
    if "".join(piece).strip():
        yield _Document(is_code, _hash(f"{name}#{number}"), "".join(piece))


def _module_name(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _topics(tree: ast.Module) -> dict[str, str]:
    """The dictionary `topics` of pydoc's data module: topic -> text."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return dict(ast.literal_eval(node.value))
    return {}


def _split_docstrings(text: str, tree: ast.Module, module: str) -> tuple[str, dict[str, str]]:
    """(source without its long docstrings, qualified name -> docstring)."""
    lines = [line + "\n" for line in text.split("\n")]  # as ast counts: a form feed is no line end
    docstrings: dict[str, str] = {}
    for title, node in _definitions(tree, module):
        docstring = ast.get_docstring(node)
        if docstring is None or len(docstring) < MIN_DOCSTRING_CHARS or title in docstrings:
            continue
        first, last = node.body[0].lineno - 1, (node.body[0].end_lineno or 0) - 1
        if lines[first][: node.body[0].col_offset].strip():
            continue  # `def f(): "…"` on one line
        docstrings[title] = docstring
        indent = " " * node.body[0].col_offset
        lines[first] = f"{indent}pass\n" if len(node.body) == 1 else ""
        lines[first + 1 : last + 1] = [""] * (last - first)
    return "".join(lines), docstrings


def _definitions(node: Definition, title: str) -> Iterator[tuple[str, Definition]]:
    """A module and the classes and functions in it, under their qualified names."""
    yield title, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{title}.{child.name}")
