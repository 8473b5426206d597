"""One entry of a recipe's `datasets:`, its rows, and the pairs that the loader of a kind makes from them."""

import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from datasets import load_dataset

from nvembed.eval.data import tables
from nvembed.texts_nvembed import check_characters
from nvembed.train.data.words import normalize


T = TypeVar("T")

TABLE_SUFFIXES = (".jsonl", ".json", *tables.SUFFIXES)


@dataclass
class DatasetSource:
    """One entry of a recipe's `datasets:`; on the command line, `--datasets PATH ...`.

    Args:
        path: a local file (JSONL, CSV, Parquet), a local folder, or a Hub dataset.
        kind: how rows become triplets, a key of `nvembed.train.data.kinds.KINDS`; None: inferred from the
            folder's layout or the columns.
        split: the split to read.
        instruction: the task definition for every query, without "Instruct:". "": no instruction; None: not given here.
        symmetric: whether the instruction also goes on positives and negatives; None: the kind's default.
        samples: draw at most this many, the same ones for a given seed; None: all.
        weight: the set's share of the blend, relative to the other sets'; None for all sets: by number of triplets.
        name: what logs call it; None: the last part of `path`.
        config: of a Hub dataset, the configuration to read; of NVIDIA's, the set.
        columns: the names a kind expects -> the source's column, or several whose texts are joined by a space.
        label_separator: what separates the labels of a text that has several, as in arXiv's "cs.CL cs.LG".
        set: the entry of `paper.yaml` that this comes from.
        mteb: the tasks of mteb whose training data this is, for the checkpoint's certificate.
        decontaminate: a rule for this set alone (`nvembed.train.data.decontaminate`), in build_data.py.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    path: str
    kind: str | None = None
    split: str = "train"
    instruction: str | None = None
    symmetric: bool | None = None
    samples: int | None = None
    weight: float | None = None
    name: str | None = None
    config: str | None = None
    columns: dict[str, str | list[str]] | None = None
    label_separator: str | None = None
    set: str | None = None
    mteb: list[str] | None = None
    decontaminate: dict | None = None

    def __post_init__(self):
        check_fields(self, f"datasets: {self.path}")
        for name in ("instruction", "name"):
            check_characters(getattr(self, name) or "", f"datasets: {name} of {self.path}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"{self.path}: samples is {self.samples}; it must be at least 1, or left out for all")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"{self.path}: weight is {self.weight}; it must be above 0, or left out")
        for column, origin in (self.columns or {}).items():
            if origin in ("", []):
                raise ValueError(f"{self.path}: columns has {column}: {origin!r}; it takes a column's name, or a list")
        if self.label_separator == "":
            raise ValueError(f'{self.path}: label_separator is ""; leave it out for one label a text')
        if self.name is None:
            self.name = Path(self.path).stem


def check_keys(content: object, kind: type, where: str) -> None:
    """Raises a `ValueError` if a mapping has a key that the dataclass does not."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {content!r}, not a mapping")
    known = [one.name for one in fields(kind)]
    if unknown := sorted(content.keys() - set(known)):
        raise ValueError(f"{where} has unknown key {unknown[0]!r}; known are {', '.join(known)}")


def check_fields(settings, where: str) -> None:
    """Raises a `ValueError` if a field of a dataclass has a value of another type than its annotation says.

    An int is a float, too; a bool is no number.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, hint):
            raise ValueError(f"{where}: {name} is {value!r} of type {type(value).__name__}, not {_shown(hint)}")


def _fits(value, hint) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _shown(hint) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_shown(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return {NoneType: "left out"}.get(
        hint, getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
    )


@dataclass
class Pairs:
    """What the loader of a kind makes from a source.

    Args:
        pairs: dictionaries with `query` and `positive`, iterable once. They have `negatives` if `corpus` is None, may
            have `known_positives` (all relevant texts of the query) if it is not, and any other triplet column.
        corpus: the texts to mine negatives from; None: the pairs carry their negatives already.
        counts: "rows" read, and what was left out of them and why; whole once `pairs` has been iterated.
    """

    pairs: Iterable[dict]
    corpus: Sequence[str] | None = None
    counts: Counter = field(default_factory=Counter)


def as_source(entry: DatasetSource | dict | str) -> DatasetSource:
    """A recipe's mapping, or a path alone, as a `DatasetSource`.

    Raises:
        ValueError: the entry is something else, a key is unknown, or `path` is missing.
    """
    if isinstance(entry, DatasetSource):
        return entry
    if isinstance(entry, str):
        return DatasetSource(entry)
    if not isinstance(entry, dict):
        raise ValueError(f"datasets: {entry!r} is neither a mapping with a path nor a path")
    known = [field.name for field in fields(DatasetSource)]
    unknown = sorted(entry.keys() - set(known))
    if unknown or "path" not in entry:
        fault = f"unknown key {unknown[0]!r}" if unknown else "no path"
        raise ValueError(f"datasets: {entry} has {fault}; an entry has path and, as needed, {', '.join(known[1:])}")
    return DatasetSource(**entry)


def resolve_entry(entry, folder: Path):
    """Resolves the path of an entry against the folder of its YAML file.

    A relative path that exists in the folder is read from there. One that does not, and that could be a Hub name, is
    treated as a Hub name.

    Raises:
        ValueError: a path that could be a Hub name exists in the working directory, but not in the folder.
    """
    if isinstance(entry, str):
        return resolve_path(entry, folder)
    if isinstance(entry, dict) and isinstance(entry.get("path"), str):
        return {**entry, "path": resolve_path(entry["path"], folder)}
    return entry  # an error of `as_source`


def resolve_path(path: str, folder: Path) -> str:
    if not path or "://" in path:
        return path
    # Not `resolve`: a link's own name has the suffix, and names the set.
    found = Path(os.path.abspath(folder / Path(path).expanduser()))
    if found.exists() or not could_be_hub_name(path):
        return str(found)
    if Path(path).exists():  # `datasets` would read it instead of the Hub
        raise ValueError(
            f"datasets: {path!r} is in the working directory, not in the recipe's folder {folder}, where a recipe's "
            f"relative paths start: write {os.path.relpath(path, folder)}"
        )
    return path


def could_be_hub_name(path: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)) and not path.endswith(TABLE_SUFFIXES)


def check_sources(sources: list[DatasetSource]) -> list[DatasetSource]:
    """The sources, if they can be blended.

    Raises:
        ValueError: there are none, two share a name, or only some have a weight.
    """
    if not sources:
        raise ValueError("datasets is empty: name at least one dataset in the recipe, or with --datasets PATH")
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"datasets: two are named {twice.pop()!r}, and logs would mix them up; give one a `name:`")
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(f"datasets: {without[0]} has no weight and others have one; give one to all, or to none")
    return sources


def check_exists(source: DatasetSource) -> None:
    """Raises a `ValueError` if `path` does not exist and cannot be a Hub name either."""
    if Path(source.path).exists() or "://" in source.path or could_be_hub_name(source.path):
        return
    if source.set is not None:
        raise ValueError(
            f"{source.path} does not exist: build_data.py makes the set {source.set!r} in data_dir "
            f"{Path(source.path).parent}; without data_dir it is read from the Hub"
        )
    raise ValueError(
        f"{source.path} does not exist; in a recipe, relative paths start at the recipe's folder. For recipes "
        "shipped with nvembed, the comment at the top says where to get the data."
    )


# --- Rows


def read_rows(source: DatasetSource, required: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Yields (name of the row, row): `train.jsonl:17` for a JSONL file, `squad[train][16]` from the Hub.

    Raises:
        ValueError: nothing is found at the path, or a row lacks a required column.
    """
    for name, row in _stored_rows(source):
        if source.columns is not None:
            row = rename_columns(row, source.columns, name)
        tables.check_columns(row, required, name)
        yield name, row


def _stored_rows(source: DatasetSource) -> Iterator[tuple[str, dict]]:
    files = find_files(source)
    if files:
        for file in files:
            yield from tables.read_table(file)
        return
    try:
        table = load_dataset(source.path, source.config, split=source.split)
    except Exception as error:
        raise ValueError(
            f"{source.path!r} is neither a local file or folder nor a dataset found on the Hub: {error}"
        ) from error
    yield from tables.named_rows(table, f"{source.path}[{source.split}]")


def rename_columns(row: dict, columns: dict[str, str | list[str]], name: str) -> dict:
    """The row with each of `columns` in place of the columns it is made from.

    Raises:
        ValueError: the row lacks one of these, or one of several to be joined is not a text.
    """
    origins = {target: origin if isinstance(origin, list) else [origin] for target, origin in columns.items()}
    tables.check_columns(row, tuple(column for names in origins.values() for column in names), name)
    made = {}
    for target, names in origins.items():
        made[target] = row[names[0]]
        if len(names) > 1:
            made[target] = " ".join(tables.text_of(row, column, name) for column in names).strip()
    used = {column for names in origins.values() for column in names}
    return {column: value for column, value in row.items() if column not in used} | made


def columns_of(source: DatasetSource) -> set[str]:
    """Column names of the first row."""
    for _, row in read_rows(source):
        return set(row)
    raise ValueError(f"{source.path}: split {source.split!r} is empty; add rows, or leave it out")


def find_files(source: DatasetSource) -> list[Path]:
    """The local files that hold the split, in order; empty for a Hub dataset.

    Raises:
        ValueError: the path is a folder without a file for the split; the entry asks for a part of what is read whole.
    """
    path = Path(source.path)
    is_of_path = source.set is None and source.kind != "nemotron"  # else it is of a known source, or a folder's name
    if path.exists() and source.config is not None and is_of_path:
        raise ValueError(f"{path}: config is {source.config!r}, which Hub datasets have and local data has not")
    if path.is_file():
        if source.split != "train":
            raise ValueError(
                f"{path}: split is {source.split!r}, and a file is read whole; leave split out, or name its folder"
            )
        return [path]
    if not path.is_dir():
        return []
    if found := tables.find_tables(path, source.split):
        return found
    entries = sorted(entry.name for entry in path.iterdir())
    raise ValueError(
        f"{path}: unknown dataset layout: no {source.split}.jsonl, .csv or .parquet and no BEIR corpus.jsonl; "
        f"found {entries[:10]}"
    )


NEMOTRON = "dataset_metadata.json"  # a set of NVIDIA's training data has this


def is_nemotron(source: DatasetSource) -> bool:
    return Path(source.path, source.config or "", NEMOTRON).is_file()


def is_beir(source: DatasetSource) -> bool:
    return Path(source.path, "corpus.jsonl").is_file()


def sample(items: list[T], samples: int | None, seed: int) -> list[T]:
    """At most `samples` items, drawn at random, in their original order; the same ones for a given seed."""
    if samples is None or samples >= len(items):
        return items
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), samples))]


def text_of(row: dict, column: str, name: str) -> str:
    """A text column of a row.

    Raises:
        ValueError: it is not a string, or is empty; the error names the row.
    """
    value = tables.text_of(row, column, name)
    if not value.strip():
        raise ValueError(f'{name}: "{column}" is empty; every {column} needs text')
    return value


def merge_known_positives(rows: list[dict]) -> list[dict]:
    """The rows with all positives of their query, of whatever row, as `known_positives`.

    Queries that differ in case and punctuation alone are one.
    """
    queries, positives = [normalize(row["query"]) for row in rows], {}
    for query, row in zip(queries, rows):
        known = [row["positive"], *row.get("known_positives", ())]
        positives.setdefault(query, {}).update(dict.fromkeys(known))
    listed = {query: list(known) for query, known in positives.items()}  # once for all rows of a query
    return [row | {"known_positives": listed[query]} for query, row in zip(queries, rows)]
