"""Your own data as real mteb tasks: a YAML file names folders, and mteb's abstract classes measure them.

```yaml
tasks:
  - type: Retrieval            # Reranking, Classification, Clustering, STS, PairClassification
    path: data/xquad_en        # a folder, relative to this file: BEIR layout, or tables <split>.jsonl, .csv, .parquet
    split: test
    instruction: Given a question, retrieve passages that answer the question   # "" for none
    name: xquad_en             # the folder's name if left out
```
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from datasets import Dataset
from mteb import TaskMetadata
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

from nvembed.eval.data.beir import read_beir
from nvembed.eval.data.tables import find_tables, read_jsonl, read_table, text_of
from nvembed.texts_nvembed import check_characters


@dataclass(frozen=True)
class LocalTask:
    """One entry of a tasks file.

    Args:
        type: a key of `TYPES`.
        path: the folder that holds the data.
        split: the split to measure; classification also needs `train`, to fit its classifiers.
        instruction: the task definition; None: a default, with a warning.
        name: of the task in results.
    """

    type: str
    path: Path
    split: str
    instruction: str | None
    name: str


RESERVED = ("model_meta", "run_settings")  # files beside the results
FIELDS = [field.name for field in fields(LocalTask)]


def read_tasks(file: str, names: Sequence[str] | None = None) -> list[AbsTask]:
    """The tasks of a YAML file, with their data.

    Args:
        names: of the tasks to read; None: all.

    Raises:
        ValueError: the file cannot be read or lacks a named task; an entry has an unknown or missing field; its data is
            missing, lacks a column or has a value that cannot be measured. The error names file and row.
    """
    entries = {entry.name: entry for entry in read_entries(file)}
    for name in names or ():
        if name not in entries:
            raise ValueError(f"{file} has no task {name!r}; its tasks are {', '.join(entries)}")
    return [make_task(entry) for name, entry in entries.items() if names is None or name in names]


def read_entries(file: str) -> list[LocalTask]:
    path = Path(file)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; name a YAML file with a list `tasks:`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    rows = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file} has no list `tasks:` with at least one task")
    entries = [_read_entry(path, number, row) for number, row in enumerate(rows, start=1)]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{file}: two tasks are called {name!r}; give one of them another `name:`")
    return entries


def _read_entry(file: Path, number: int, row) -> LocalTask:
    where = f"{file}: task {number}"
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {row!r}, not a mapping with type and path")
    for key in row:
        if key not in FIELDS:
            raise ValueError(f"{where} has an unknown field {key!r}; a task has {', '.join(FIELDS)}")
    for key in ("type", "path"):
        if key not in row:
            raise ValueError(f"{where} has no `{key}:`; a task needs type and path")
    for key, value in row.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} is {value!r} of type {type(value).__name__}, not a string")
        check_characters(value, f"{where}: {key}")
    if row["type"] not in TYPES:
        raise ValueError(f"{where}: type is {row['type']!r}; known types are {', '.join(TYPES)}")
    folder = file.parent / row["path"]
    if not folder.is_dir():
        raise ValueError(
            f"{where}: the folder {folder} does not exist; `path:` is relative to {file}. For files shipped "
            "with nvembed, the comment at the top says where to get the data."
        )
    name = row.get("name", Path(row["path"]).name)
    if not name or not all(character.isalnum() or character in "-_." for character in name):
        raise ValueError(f"{where}: name is {name!r}; results are files of that name: use letters, digits, - _ .")
    if name in RESERVED:
        raise ValueError(f"{where}: name is {name!r}, which mteb writes among the results; choose another")
    return LocalTask(row["type"], folder, row.get("split", "test"), row.get("instruction"), name)


def make_task(entry: LocalTask) -> AbsTask:
    """An entry as an instance of mteb's abstract class for its type; `task.instruction` is the entry's."""
    abstract, main_score, load = TYPES[entry.type]
    data = load(entry)
    if abstract is AbsTaskClustering and data[entry.split] and isinstance(data[entry.split][0]["sentences"], list):
        abstract = AbsTaskClusteringLegacy  # a set to cluster in every row, as in the tasks of the paper
    metadata = TaskMetadata(
        name=entry.name,
        description=f"{entry.type} on {entry.path.name}",
        type=entry.type,
        category="t2t" if entry.type in ("Retrieval", "Reranking", "STS", "PairClassification") else "t2c",
        eval_splits=[entry.split],
        eval_langs=["eng-Latn"],
        main_score=main_score,
        dataset={"path": entry.path.name, "revision": digest_data(data)},
    )
    attributes = {"metadata": metadata, "instruction": entry.instruction}
    if abstract is AbsTaskClustering:
        attributes["max_fraction_of_documents_to_embed"] = None  # mteb's 4 % are for data sets of 100,000s
    task = type(entry.name, (abstract,), attributes)()
    task.dataset, task.data_loaded = {"default": data}, True
    return task


def digest_data(data) -> str:
    """A digest of the data, which mteb records with each score as the data set's revision."""
    digest = hashlib.sha256()
    for split in sorted(data):
        part = data[split]
        pieces = part.values() if isinstance(part, dict) else [part]
        for piece in pieces:
            rows = piece.to_list() if isinstance(piece, Dataset) else [piece]
            digest.update("".join(json.dumps(row, sort_keys=True) + "\n" for row in [split, *rows]).encode())
    return digest.hexdigest()[:16]


# --- Data, in the columns that mteb's classes expect


def _load_retrieval(entry: LocalTask) -> dict[str, RetrievalSplitData]:
    data = read_beir(str(entry.path), entry.split)
    return {entry.split: _retrieval_split(data.corpus, data.queries, data.qrels)}


def _retrieval_split(corpus, queries, qrels, top_ranked=None) -> RetrievalSplitData:
    return RetrievalSplitData(
        corpus=Dataset.from_list([{"id": id_, "title": "", "text": text} for id_, text in corpus.items()]),
        queries=Dataset.from_list([{"id": id_, "text": text} for id_, text in queries.items()]),
        relevant_docs=qrels,
        top_ranked=top_ranked,
    )


def _load_reranking(entry: LocalTask) -> dict[str, RetrievalSplitData]:
    """Rows of query, positive and negative, or a BEIR folder with `top_ranked/<split>.jsonl` beside its qrels."""
    if (entry.path / "corpus.jsonl").is_file():
        return _load_ranked_beir(entry)
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for position, (name, row) in enumerate(_rows(entry, entry.split, ("query", "positive", "negative"))):
        query_id = f"q{position}"
        queries[query_id], qrels[query_id] = text_of(row, "query", name), {}
        # mteb's own ids: equal scores are ranked by id, and these do not favour the positives.
        for column, prefix, grade in (("positive", "apositive", 1), ("negative", "negative", 0)):
            if not isinstance(row[column], list) or not row[column]:
                raise ValueError(f'{name}: "{column}" is {row[column]!r}; a query needs a list with at least one text')
            for number, text in enumerate(row[column]):
                cell = f"{column}[{number}]"
                text_of({cell: text}, cell, name)
                document_id = f"{prefix}_{query_id}_{number:05}"
                corpus[document_id], qrels[query_id][document_id] = text, grade
    ranked = {query_id: list(judgements) for query_id, judgements in qrels.items()}
    return {entry.split: _retrieval_split(corpus, queries, qrels, ranked)}


def _load_ranked_beir(entry: LocalTask) -> dict[str, RetrievalSplitData]:
    data = read_beir(str(entry.path), entry.split)
    file = entry.path / "top_ranked" / f"{entry.split}.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} is missing: rows of query-id and corpus-ids, the documents to rerank")
    ranked: dict[str, list[str]] = {}
    for number, row in read_jsonl(file, ("query-id", "corpus-ids")):
        if not isinstance(row["corpus-ids"], list):
            raise ValueError(f'{file}:{number}: "corpus-ids" is {row["corpus-ids"]!r}, not a list')
        document_ids = [str(document_id) for document_id in row["corpus-ids"]]
        for document_id in document_ids:
            if document_id not in data.corpus:
                raise ValueError(f"{file}:{number}: document {document_id!r} does not exist in corpus.jsonl")
        ranked[str(row["query-id"])] = document_ids
    for query_id in data.queries:
        if query_id not in ranked:
            raise ValueError(f"{file}: query {query_id!r} of the qrels has no documents to rerank")
    return {entry.split: _retrieval_split(data.corpus, data.queries, data.qrels, ranked)}


def _load_classification(entry: LocalTask) -> dict[str, Dataset]:
    """Numbers the labels in the order of their names: for two classes, mteb's precision needs 0 and 1."""
    columns = ("text", "label")
    rows = {
        split: [(text_of(row, "text", name), _label(row, "label", name)) for name, row in _rows(entry, split, columns)]
        for split in dict.fromkeys(("train", entry.split))
    }
    numbers = {label: number for number, label in enumerate(sorted({label for _, label in rows["train"]}))}
    if len(numbers) < 2:
        raise ValueError(f"{entry.path}: all texts of split 'train' have the label {min(numbers)!r}; two are needed")
    for _, label in rows[entry.split]:
        if label not in numbers:
            raise ValueError(f"{entry.path}: label {label!r} of split {entry.split!r} is not in split 'train'")
    return {
        split: Dataset.from_list([{"text": text, "label": numbers[label]} for text, label in part])
        for split, part in rows.items()
    }


def _load_clustering(entry: LocalTask) -> dict[str, Dataset]:
    names = _columns(entry, ("sentences", "labels"), ("text", "label"))
    rows = []
    for name, row in _rows(entry, entry.split, names):
        texts, labels = (row[column] for column in names)
        if not isinstance(texts, list):
            rows.append({"sentences": text_of(row, names[0], name), "labels": _label(row, names[1], name)})
            continue
        if not isinstance(labels, list) or len(texts) != len(labels) or not texts:
            raise ValueError(f'{name}: "{names[0]}" and "{names[1]}" are not lists of the same length, 1 or more')
        pairs = [{names[0]: text, names[1]: label} for text, label in zip(texts, labels)]
        sentences = [text_of(pair, names[0], f"{name}[{i}]") for i, pair in enumerate(pairs)]
        rows.append(
            {"sentences": sentences, "labels": [_label(p, names[1], f"{name}[{i}]") for i, p in enumerate(pairs)]}
        )
    if len({type(row["sentences"]) for row in rows}) > 1:
        raise ValueError(
            f"{entry.path}: some rows of split {entry.split!r} hold one text, others a list; make all alike"
        )
    return {entry.split: Dataset.from_list(rows)}


def _load_pairs(entry: LocalTask) -> dict[str, Dataset]:
    """One pair in a row, or MTEB's older layout: one row of three lists."""
    label = _columns(entry, ("labels",), ("label",))[0]
    columns = ("sentence1", "sentence2", label)
    rows = []
    for name, row in _rows(entry, entry.split, columns):
        cells = [row[column] for column in columns]
        pairs = [(name, row)]
        if all(isinstance(cell, list) for cell in cells):
            if len({len(cell) for cell in cells}) > 1:
                raise ValueError(f"{name}: the lists {columns} are not of the same length")
            pairs = [(f"{name}[{i}]", dict(zip(columns, pair))) for i, pair in enumerate(zip(*cells))]
        for pair_name, pair in pairs:
            if pair[label] not in (0, 1):
                raise ValueError(f'{pair_name}: "{label}" is {pair[label]!r}; a pair is 1, the same, or 0')
            texts = {column: text_of(pair, column, pair_name) for column in columns[:2]}
            rows.append({**texts, "labels": int(pair[label])})
    if len(rows) < 2:
        raise ValueError(f"{entry.path}: split {entry.split!r} has one pair; at least two are needed")
    return {entry.split: Dataset.from_list(rows)}


def _load_sts(entry: LocalTask) -> dict[str, Dataset]:
    rows = []
    for name, row in _rows(entry, entry.split, ("sentence1", "sentence2", "score")):
        score = row["score"]
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ValueError(f'{name}: "score" is {score!r}, not a number')
        rows.append({**{c: text_of(row, c, name) for c in ("sentence1", "sentence2")}, "score": float(score)})
    if len({row["score"] for row in rows}) < 2:
        raise ValueError(
            f"{entry.path}: all scores of split {entry.split!r} are the same; a rank correlation needs two"
        )
    return {entry.split: Dataset.from_list(rows)}


# Type -> mteb's class, its main score, and what reads the folder.
TYPES = {
    "Retrieval": (AbsTaskRetrieval, "ndcg_at_10", _load_retrieval),
    "Reranking": (AbsTaskRetrieval, "map_at_1000", _load_reranking),
    "Classification": (AbsTaskClassification, "accuracy", _load_classification),
    "Clustering": (AbsTaskClustering, "v_measure", _load_clustering),
    "STS": (AbsTaskSTS, "cosine_spearman", _load_sts),
    "PairClassification": (AbsTaskPairClassification, "max_ap", _load_pairs),
}


# --- Tables


def _rows(entry: LocalTask, split: str, required: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """(Name of the row, row) of a split.

    Raises:
        ValueError: the split is absent, empty or unreadable, or lacks a column.
    """
    files = find_tables(entry.path, split)
    if not files:
        found = sorted(path.name for path in entry.path.iterdir())[:10]
        raise ValueError(f"{entry.path}: no {split}.jsonl, .csv or .parquet for task {entry.name!r}; found {found}")
    name = None
    for file in files:
        for name, row in read_table(file, required):
            yield name, row
    if name is None:
        raise ValueError(f"{files[0]} is empty; task {entry.name!r} needs at least one row")


def _columns(entry: LocalTask, *alternatives: tuple[str, ...]) -> tuple[str, ...]:
    """The first of the alternatives whose columns the split has; the last one if it has none of them."""
    for _, row in _rows(entry, entry.split, ()):
        return next((names for names in alternatives if set(names) <= set(row)), alternatives[-1])


def _label(row: dict, column: str, name: str) -> str:
    label = row[column]
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise ValueError(f'{name}: "{column}" is {label!r}; it must be a word or a whole number')
    return text_of({column: str(label)}, column, name)
