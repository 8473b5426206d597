"""NVIDIA's training data (`nvidia/embed-nemotron-dataset-v1`): per set a folder of questions with mined negatives.

dataset_metadata.json   corpus_id, ids_only, instructions
corpus.parquet          id, text; not if ids_only
queries.parquet         question_id, question, corpus_id, pos_doc and neg_doc: lists of {id}
source_config.json      if ids_only: the public data set that has the texts (loader_config, source_repo, ...)
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from datasets import load_dataset
from huggingface_hub import snapshot_download

from nvembed.eval.data.beir import document_text
from nvembed.eval.data.tables import check_columns, read_table, text_of
from nvembed.train.data.source import NEMOTRON, DatasetSource, Pairs, sample


CONFIG = "source_config.json"
LOADERS = ("mteb", "column")

Lookup = Callable[[str, str], str]  # (id, name of the row) -> text


def load(source: DatasetSource, num_negatives: int, seed: int) -> Pairs:
    """Triplets of a question, each of its positive documents, and its first `num_negatives` negatives.

    Args:
        source: its path is a set's folder, a folder of sets, or the Hub's repository; with the latter two, its
            `config` names the set. Without an instruction in the recipe, the set's own is used.

    Raises:
        ValueError: a file, a field or a text is missing, or ids repeat; the file and row are named.
    """
    folder = find_folder(source)
    metadata = _read_json(folder / NEMOTRON, ("corpus_id", "ids_only"))
    if metadata["ids_only"]:
        question_of, document_of = _public_texts(folder)
    else:
        question_of, document_of = None, _corpus(folder / "corpus.parquet")
    counts, triplets = Counter(), []
    for name, row in read_table(folder / "queries.parquet", ("question_id", "corpus_id", "pos_doc", "neg_doc")):
        counts["rows"] += 1
        if row["corpus_id"] != metadata["corpus_id"]:
            raise ValueError(
                f'{name}: "corpus_id" is {row["corpus_id"]!r}; the set has the corpus {metadata["corpus_id"]!r} alone'
            )
        if question_of is None:
            check_columns(row, ("question",), name)
            question = text_of(row, "question", name)
        else:
            question = question_of(str(row["question_id"]), name)
        positives = [document_of(id_, name) for id_ in _ids(row, "pos_doc", name)]
        known = {question, *positives}
        negatives = [document_of(id_, name) for id_ in _ids(row, "neg_doc", name)]
        kept = [text for text in dict.fromkeys(negatives) if text.strip() and text not in known]
        counts["negatives that are empty, repeated, or a positive"] += len(negatives) - len(kept)
        if not question.strip():
            counts["empty question"] += 1
            continue
        counts["further positives"] += max(0, len(positives) - 1)
        for positive in positives:
            if positive.strip():
                triplets.append({"query": question, "positive": positive, "negatives": kept[:num_negatives]})
            else:
                counts["empty positive"] += 1
        counts["no positive"] += not positives
    instruction = _instruction(metadata)
    if instruction is not None:
        triplets = [{**triplet, "instruction": instruction} for triplet in triplets]
    chosen = sample(triplets, source.samples, seed)
    counts["not sampled"] = len(triplets) - len(chosen)
    return Pairs(chosen, counts=+counts)


def find_folder(source: DatasetSource) -> Path:
    """The local folder of the set, downloaded if it is on the Hub.

    Raises:
        ValueError: there is none.
    """
    place = Path(source.path)
    if not place.is_dir():
        patterns = "*" if source.config is None else f"{source.config}/*"
        try:
            place = Path(snapshot_download(source.path, repo_type="dataset", allow_patterns=patterns))
        except Exception as error:
            raise ValueError(
                f"{source.path!r} is neither a local folder nor a dataset found on the Hub: {error}"
            ) from error
    folder = place / (source.config or "")
    if not (folder / NEMOTRON).is_file():
        known = sorted(path.parent.name for path in place.glob(f"*/{NEMOTRON}"))
        advice = f"name one of its sets with `config:`: {', '.join(known)}" if known else f"it has no {NEMOTRON}"
        raise ValueError(f"{folder} is not a set in NVIDIA's layout: {advice}")
    return folder


def _read_json(path: Path, required: tuple[str, ...]) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    check_columns(content, required, str(path))
    return content


def _ids(row: Mapping, column: str, name: str) -> list[str]:
    documents = row[column] if row[column] is not None else []
    if not isinstance(documents, list) or not all(isinstance(one, Mapping) and "id" in one for one in documents):
        raise ValueError(f'{name}: "{column}" is {documents!r}, not a list of documents with an "id"')
    return [str(one["id"]) for one in documents]


def _corpus(path: Path) -> Lookup:
    texts: dict[str, str] = {}
    for name, row in read_table(path, ("id", "text")):
        id_ = str(row["id"])
        if id_ in texts:
            raise ValueError(f'{name}: "id" {id_!r} is a duplicate')
        texts[id_] = text_of(row, "text", name)
    if not texts:
        raise ValueError(f"{path} has no documents")
    return _lookup(texts, str(path))


def _lookup(texts: Mapping[str, str], place: str) -> Lookup:
    def text(id_: str, name: str) -> str:
        if id_ not in texts:
            raise ValueError(f"{name}: {id_!r} is not among the {len(texts)} texts of {place}")
        return texts[id_]

    return text


def _public_texts(folder: Path) -> tuple[Lookup, Lookup]:
    """Where to look up questions and documents of a set that has ids only."""
    path = folder / CONFIG
    config = _read_json(path, ("loader_config", "source_repo"))
    loader, repo = config["loader_config"], config["source_repo"]
    if loader not in LOADERS:
        raise ValueError(f"{path}: loader_config is {loader!r}; known are {', '.join(LOADERS)}")
    try:
        if loader == "mteb":
            tables = [load_dataset(repo, part, split=part) for part in ("queries", "corpus")]
            return tuple(
                _lookup(dict(_named_texts(table, f"{repo}[{part}]")), f"{repo}[{part}]")
                for table, part in zip(tables, ("queries", "corpus"))
            )
        check_columns(config, ("query_column", "document_column", "split"), str(path))
        table = load_dataset(repo, config.get("subset"), split=config["split"])
    except (OSError, ConnectionError) as error:
        raise ValueError(f"{path}: its texts are in {repo!r}, which failed to load: {error}") from error
    return tuple(
        _rows_of_column(table, config[f"{kind}_column"], kind[0], repo, path) for kind in ("query", "document")
    )


def _named_texts(table, name: str) -> Iterator[tuple[str, str]]:
    for position, row in enumerate(table):
        check_columns(row, ("_id", "text"), f"{name}[{position}]")
        yield str(row["_id"]), document_text(row)


def _rows_of_column(table, column: str, letter: str, repo: str, path: Path) -> Lookup:
    """Texts by row number: `q_17` or `d_17` is row 17."""
    if column not in table.column_names:
        raise ValueError(f"{path}: {repo} has no column {column!r}; it has {table.column_names}")

    def text(id_: str, name: str) -> str:
        prefix, _, number = id_.partition("_")
        if prefix != letter or not number.isdecimal() or int(number) >= len(table):
            raise ValueError(f"{name}: {id_!r} is not {letter}_<row number> below {len(table)}, the rows of {repo}")
        return text_of(table[int(number)], column, f"{repo}[{number}]")

    return text


def _instruction(metadata: Mapping) -> str | None:
    """The set's own instruction for queries."""
    given = metadata.get("instructions")
    if isinstance(given, Mapping):
        given = given.get("query")
    return given if isinstance(given, str) else None
