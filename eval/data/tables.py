"""Tables on disk, row by row; each row has a name for use in errors."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset

from nvembed.texts_nvembed import check_characters


SUFFIXES = (".csv", ".tsv", ".parquet")  # beside .jsonl and .json


def find_tables(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder: `<split>.jsonl`, .csv, .tsv or .parquet, or the Hub's shards of it.

    Raises:
        ValueError: a shard is missing: they are named `<split>-00000-of-00003.parquet` and so on.
    """
    for suffix in (".jsonl", *SUFFIXES):
        if (file := folder / f"{split}{suffix}").is_file():
            return [file]
        shards = sorted(folder.glob(f"{split}-?????-of-?????{suffix}"))
        if shards:
            count = int(shards[0].stem.rsplit("-", 1)[1])
            expected = [folder / f"{split}-{number:05}-of-{count:05}{suffix}" for number in range(count)]
            if shards != expected:
                fault = sorted({*shards} ^ {*expected})[0]
                raise ValueError(f"{folder}: the {count} shards of split {split!r} are not complete: see {fault.name}")
            return shards
    return []


def read_table(file: Path, required: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Yields (name of the row, row): `train.jsonl:17` for a JSONL file, `train.csv[16]` otherwise.

    Raises:
        ValueError: the file cannot be read, or a row lacks a required column.
    """
    if file.suffix in (".jsonl", ".json"):
        yield from ((f"{file}:{number}", row) for number, row in read_jsonl(file, required))
        return
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: unknown dataset layout: {file.suffix!r} is not .jsonl, .csv or .parquet")
    if file.suffix == ".parquet":
        yield from ((f"{file}[{position}]", row) for position, row in enumerate(_parquet_rows(file, required)))
        return
    delimiter = "\t" if file.suffix == ".tsv" else ","
    try:
        # "NA" and "null" are texts.
        table = load_dataset("csv", data_files=str(file), split="train", delimiter=delimiter, keep_default_na=False)
    except Exception as error:
        raise ValueError(f"{file}: not a readable {file.suffix[1:]} table: {error}") from error
    yield from named_rows(table, str(file), required)


def _parquet_rows(file: Path, required: tuple[str, ...]) -> Iterator[dict]:
    try:
        table = pq.ParquetFile(file)
        check_columns(dict.fromkeys(table.schema_arrow.names), required, str(file))
        for batch in table.iter_batches(1000):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable parquet table: {error}") from error


def named_rows(table, name: str, required: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Rows of a `datasets.Dataset` as `name[position]`."""
    for position, row in enumerate(table):
        check_columns(row, required, f"{name}[{position}]")
        yield f"{name}[{position}]", row


def read_jsonl(path: Path, required: tuple[str, ...] = ()) -> Iterator[tuple[int, dict]]:
    """(Line number from 1, row) of a JSON Lines file; empty lines are skipped.

    Raises:
        ValueError: a line is not a JSON object or lacks a required column; the error names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8: {error}") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a {type(row).__name__}, not a JSON object")
            check_columns(row, required, f"{path}:{number}")
            yield number, row


def check_columns(row: dict, required: tuple[str, ...], name: str) -> None:
    for column in required:
        if column not in row:
            raise ValueError(f'{name}: "{column}" is missing; found {sorted(row)}')


def text_of(row: dict, column: str, name: str) -> str:
    """A text column of a row, which may be empty.

    Raises:
        ValueError: it is not a string, or has a NUL or half of a surrogate pair (JSON can); the error names the row.
    """
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f'{name}: "{column}" is {value!r} of type {type(value).__name__}, not a string')
    check_characters(value, f'{name}: "{column}"')
    return value
