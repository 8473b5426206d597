"""Tables from disk or from the Hub, row by row, with a name for every row that an error can give."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from datasets import load_dataset

from nvembed.eval import tables


if TYPE_CHECKING:
    from nvembed.train.data.registry import DatasetSource

T = TypeVar("T")


def read_table(source: "DatasetSource", required: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Yields (name of the row, row): `train.jsonl:17` for a JSONL file, `squad[train][16]` from the Hub.

    Raises:
        ValueError: nothing is found at the path, or a row lacks a required column.
    """
    file = find_file(source)
    if file is not None:
        yield from tables.read_table(file, required)
        return
    try:
        table = load_dataset(source.path, split=source.split)
    except Exception as error:
        raise ValueError(
            f"{source.path!r} is neither a local file or folder nor a dataset that the Hub gives: {error}"
        ) from error
    yield from tables.named_rows(table, f"{source.path}[{source.split}]", required)


def columns_of(source: "DatasetSource") -> set[str]:
    """Column names of the first row."""
    for _, row in read_table(source):
        return set(row)
    raise ValueError(f"{source.path}: split {source.split!r} is empty; add rows, or leave it out")


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
    if (table := tables.find_table(path, source.split)) is not None:
        return table
    found = sorted(entry.name for entry in path.iterdir())
    raise ValueError(
        f"{path}: unknown dataset layout: no {source.split}.jsonl, .csv or .parquet and no BEIR corpus.jsonl; "
        f"found {found[:10]}"
    )


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
    value = tables.text_of(row, column, name)
    if not value.strip():
        raise ValueError(f'{name}: "{column}" is empty; every {column} needs text')
    return value
