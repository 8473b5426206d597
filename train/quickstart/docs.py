"""Training data that every user has: the documentation in their own Python.

Docstrings are read from source files, without importing them. The first sentence is the query, the rest the document,
the module the class. Some modules of the standard library are held out as the test set. To choose settings, other
modules are held out instead, and those of the test set are not used at all.
"""

import ast
import hashlib
import inspect
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


SKIPPED = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "site-packages", "ensurepip", "__pycache__"}
MAX_DOCUMENT = 1000  # characters
# Modules of the standard library whose hash modulo 100 falls into the range.
TEST = range(15)
VALIDATION = range(15, 35)
MIN_CLASS_SIZE = 5  # texts of a module that makes a class


@dataclass(frozen=True)
class DocPair:
    """One docstring: its first sentence, the rest, and where it stands.

    Args:
        module: the class for clustering: a top-level module of the standard library, or package.subpackage.
        name: the full dotted name, for people.
    """

    summary: str
    body: str
    module: str
    name: str


def standard_library() -> list[DocPair]:
    """Every usable docstring of the standard library's Python files, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    return _unique(pair for path in tqdm(files, desc="Standard library", unit="file") for pair in _pairs(path, root, 1))


def installed_packages(max_per_package: int = 100) -> list[DocPair]:
    """Docstrings of the packages beside the standard library, up to `max_per_package` each, in a fixed order."""
    root = Path(sysconfig.get_paths()["purelib"])
    packages = sorted(path for path in root.iterdir() if (path / "__init__.py").is_file())
    pairs = []
    for package in tqdm(packages, desc="Installed packages", unit="package"):
        found: list[DocPair] = []
        # Hashed order: a spread over the whole package, the same on every run.
        files = (path for path in package.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
        for path in sorted(files, key=lambda path: _hash(str(path.relative_to(root)))):
            found += _pairs(path, root, 2)
            if len(found) >= max_per_package:
                break
        pairs += found[:max_per_package]
    return _unique(pairs)


def is_in(module: str, share: range) -> bool:
    """Whether a top-level module of the standard library is one of `TEST` or `VALIDATION`; its name alone decides."""
    return _hash(module) % 100 in share


def write_datasets(folder: Path, validate: bool = False, max_per_package: int = 100) -> dict[str, int]:
    """Writes three retrieval sets in BEIR layout, and their modules as classes (`text`, `label`).

    `library` and `packages` are for training (split `train`), `held_out` for testing (split `test`); `modules/` has
    one file for each. A training text that is also a held-out one is left out.

    Args:
        validate: hold out the modules of `VALIDATION` and leave the texts of `TEST` out of all sets.

    Returns:
        The number of pairs of each set.
    """
    library = standard_library()
    test = [pair for pair in library if is_in(pair.module, TEST)]
    held_out = [pair for pair in library if is_in(pair.module, VALIDATION)] if validate else test
    never_trained_on = [*test, *held_out]
    modules = {pair.module for pair in never_trained_on}
    seen = {text for pair in never_trained_on for text in (pair.summary, pair.body)}
    others = [pair for pair in library if pair.module not in modules]
    packages = [pair for pair in installed_packages(max_per_package) if not {pair.summary, pair.body} & seen]
    sets = {"library": others, "packages": packages, "held_out": held_out}
    for name, pairs in sets.items():
        _write_beir(folder / name, pairs, "test" if name == "held_out" else "train")
        sizes = Counter(pair.module for pair in pairs)
        classes = (pair for pair in pairs if sizes[pair.module] >= MIN_CLASS_SIZE)
        _write_jsonl(folder / "modules" / f"{name}.jsonl", ({"text": p.summary, "label": p.module} for p in classes))
    return {name: len(pairs) for name, pairs in sets.items()}


def _pairs(path: Path, root: Path, module_depth: int) -> Iterator[DocPair]:
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for name, docstring in _docstrings(tree, module):
        summary, body = split_docstring(docstring)
        if 4 <= len(summary.split()) <= 40 and len(body.split()) >= 8:
            yield DocPair(summary, body, ".".join(module.split(".")[:module_depth]), name)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _docstrings(child, f"{name}.{child.name}")


def split_docstring(docstring: str) -> tuple[str, str]:
    """Splits off the first sentence, which the end of a paragraph also ends."""
    text = inspect.cleandoc(docstring)
    match = re.search(r"[.!?](?=\s)|\n\s*\n", text)
    if match is None:
        return " ".join(text.split()), ""
    summary, body = text[: match.end()], text[match.end() :]
    return " ".join(summary.split()), " ".join(body.split())[:MAX_DOCUMENT]


def _unique(pairs) -> list[DocPair]:
    """Drops pairs whose summary, body or name was seen before: they would be false negatives of each other."""
    seen: set[str] = set()
    kept = []
    for pair in pairs:
        texts = {pair.summary, pair.body, pair.name}
        if not texts & seen:
            kept.append(pair)
            seen |= texts
    return kept


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _write_beir(folder: Path, pairs: list[DocPair], split: str) -> None:
    _write_jsonl(folder / "corpus.jsonl", ({"_id": p.name, "title": "", "text": p.body} for p in pairs))
    _write_jsonl(folder / "queries.jsonl", ({"_id": p.name, "text": p.summary} for p in pairs))
    (folder / "qrels").mkdir(exist_ok=True)
    rows = [f"{p.name}\t{p.name}\t1" for p in pairs]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")


def _write_jsonl(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
