"""Tables from disk or from the Hub, row by row, with a name for every row that an error can give."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from datasets import load_dataset

from nvembed.eval.retrieval import read_jsonl


if TYPE_CHECKING:
    from nvembed.train.data.registry import DatasetSource

T = TypeVar("T")
BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def read_table(source: "DatasetSource", required: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Yields (name of the row, row): `train.jsonl:17` for a JSONL file, `squad[train][16]` otherwise.

    Raises:
        ValueError: nothing is found at the path, or a row lacks a required column.
    """
    file = find_file(source)
    if file is not None and file.suffix in (".jsonl", ".json"):
        yield from ((f"{file}:{number}", row) for number, row in read_jsonl(file, required))
        return
    for position, row in enumerate(_load(source, file)):
        name = f"{source.path}[{source.split}][{position}]"
        for column in required:
            if column not in row:
                raise ValueError(f'{name}: "{column}" is missing; found {sorted(row)}')
        yield name, row


def columns_of(source: "DatasetSource") -> set[str]:
    """Column names of the first row."""
    for _, row in read_table(source):
        return set(row)
    raise ValueError(f"{source.path}: split {source.split!r} is empty")


def find_file(source: "DatasetSource") -> Path | None:
    """The local file that holds the split, or None for a Hub dataset.

    Raises:
        ValueError: the path is a folder without a file for the split.
    """
    path = Path(source.path)
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    for suffix in (".jsonl", *BUILDERS):
        if (path / f"{source.split}{suffix}").is_file():
            return path / f"{source.split}{suffix}"
    found = sorted(entry.name for entry in path.iterdir())
    raise ValueError(
        f"{path}: unknown dataset layout: no {source.split}.jsonl, .csv or .parquet and no BEIR corpus.jsonl; "
        f"found {found[:10]}"
    )


def _load(source: "DatasetSource", file: Path | None):
    if file is not None:
        if file.suffix not in BUILDERS:
            raise ValueError(f"{file}: unknown dataset layout: {file.suffix!r} is not .jsonl, .csv or .parquet")
        options = {"delimiter": "\t"} if file.suffix == ".tsv" else {}
        try:
            return load_dataset(BUILDERS[file.suffix], data_files=str(file), split="train", **options)
        except Exception as error:
            raise ValueError(f"{file}: not a readable {file.suffix[1:]} table: {error}") from error
    try:
        return load_dataset(source.path, split=source.split)
    except Exception as error:
        raise ValueError(
            f"{source.path!r} is neither a local file or folder nor a dataset that the Hub gives: {error}"
        ) from error


def sample(items: list[T], samples: int | None, seed: int) -> list[T]:
    """At most `samples` items, at random but always the same ones for a seed, in their order."""
    if samples is None or samples >= len(items):
        return items
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), samples))]


def text_of(row: dict, column: str, name: str) -> str:
    """A text column of a row.

    Raises:
        ValueError: it is no string, or empty; the row is named.
    """
    value: Any = row[column]
    if not isinstance(value, str):
        raise ValueError(f'{name}: "{column}" is {value!r} of type {type(value).__name__}, not a string')
    if not value.strip():
        raise ValueError(f'{name}: "{column}" is empty; every {column} needs text')
    return value
