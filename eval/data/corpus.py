"""Corpora for embedding and mining: documents with ids, from the layouts people have them in to Arrow shards."""

import hashlib
import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets, load_dataset

from nvembed.eval.data.beir import checked_text
from nvembed.eval.data.tables import check_columns, find_tables, named_rows, read_table, text_of
from nvembed.eval.files import text_id, whole, write_json


IDS = ("_id", "id", "docid", "doc_id")
SUMMARY = "summary.json"  # within the folder of text shards
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string())])


def read_corpus(path: str, split: str = "corpus") -> Iterator[tuple[str, str]]:
    """Yields (id, text) of each document; a title is put before its text, as MTEB does.

    Args:
        path: a BEIR folder; a JSONL, CSV or Parquet file, or a folder with one for the split; or a Hub dataset in the
            layout of `mteb/*` (config `corpus`).
        split: of a folder or a Hub dataset. Documents have a `text`, maybe a `title`, and an id in `_id`, `id`, `docid`
            or `doc_id`; without one the id is the position.

    Raises:
        ValueError: nothing is found at the path, it has no documents, or a document is not text or repeats an id.
    """
    seen, count, column = array("q"), 0, None
    for count, (name, row) in enumerate(_rows(path, split), start=1):
        if count == 1:
            column = next((column for column in IDS if column in row), None)
        if column is not None:
            check_columns(row, (column,), name)
        id_ = str(count - 1) if column is None else text_of({column: str(row[column])}, column, name)
        seen.append(text_id(id_))
        yield id_, checked_text(row, name)
    if not count:
        raise ValueError(f"{path}: split {split!r} has no documents")
    ids = np.sort(np.frombuffer(seen, dtype=np.int64))
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(f"{path}: {_repeated(path, split)}")


def _repeated(path: str, split: str) -> str:
    seen = set()
    for name, row in _rows(path, split):
        id_ = str(row[next(column for column in IDS if column in row)])
        if id_ in seen:
            return f"{name}: id {id_!r} is a duplicate"
        seen.add(id_)
    return "an id is a duplicate"


def _rows(path: str, split: str) -> Iterator[tuple[str, dict]]:
    place = Path(path)
    files = [place] if place.is_file() else find_tables(place, split) if place.is_dir() else []
    if place.is_dir() and not files:
        found = sorted(entry.name for entry in place.iterdir())[:10]
        raise ValueError(f"{path} has no {split}.jsonl, .csv or .parquet; found {found}")
    for file in files:
        yield from read_table(file, ("text",))
    if files:
        return
    try:
        table = load_dataset(path, "corpus", split=split)
    except Exception as error:
        raise ValueError(
            f"{path!r} is neither a local file or folder nor a dataset with a config corpus found on the Hub: {error}"
        ) from error
    yield from named_rows(table, f"{path}[{split}]", ("text",))


class Digest:
    """16 hexadecimal digits that change with any id, any text and their order."""

    def __init__(self):
        self._hash = hashlib.sha256()

    def through(self, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Yields the documents, taking note of each."""
        for document in documents:
            self._hash.update(json.dumps(document).encode())
            yield document

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


def digest_documents(documents: Iterable[tuple[str, str]]) -> str:
    """The `Digest` of documents, without keeping them."""
    digest = Digest()
    deque(digest.through(documents), maxlen=0)
    return str(digest)


@dataclass(frozen=True)
class TextShards:
    """Documents in Arrow files that are memory-mapped, `rows` in all, `shard_rows` a shard but in the last.

    Args:
        digest: see `Digest`.
    """

    folder: Path
    rows: int
    shard_rows: int
    digest: str

    @classmethod
    def write(cls, documents: Iterable[tuple[str, str]], folder: Path, shard_rows: int) -> "TextShards":
        """Writes (id, text) of documents; `folder` is there whole or not at all."""
        digest, rows = Digest(), 0
        documents = digest.through(documents)
        with whole(folder) as partial:
            partial.mkdir()
            while shard := list(islice(documents, shard_rows)):
                batch = pa.RecordBatch.from_arrays([pa.array(column) for column in zip(*shard)], schema=SCHEMA)
                path = partial / f"{rows // shard_rows:05}.arrow"
                with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
                    for start in range(0, len(shard), 1000):  # datasets reads a batch whole to get one of its rows
                        writer.write_batch(batch.slice(start, 1000))
                rows += len(shard)
            summary = {"rows": rows, "shard_rows": shard_rows, "digest": str(digest)}
            write_json(partial / SUMMARY, summary)
        return cls(folder, **summary)

    @classmethod
    def open(cls, folder: Path) -> "TextShards":
        return cls(folder, **json.loads((folder / SUMMARY).read_text(encoding="utf-8")))

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def shard(self, number: int) -> Dataset:
        return Dataset.from_file(str(self.folder / f"{number:05}.arrow"))

    def table(self) -> Dataset:
        return concatenate_datasets([self.shard(number) for number in range(self.shards)])

    def texts(self) -> Iterator[str]:
        for number in range(self.shards):
            for batch in self.shard(number).select_columns("text").iter(10_000):
                yield from batch["text"]


class Texts(Sequence[str]):
    """The texts of `TextShards` by position, read from disk when asked for."""

    def __init__(self, shards: TextShards):
        self._table = shards.table().select_columns("text")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, position: int) -> str:
        return self._table[int(position)]["text"]
