"""Retrieval data: BEIR folders and Hub datasets."""

import csv
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset

from nvembed.eval.data.tables import read_jsonl, text_of


@dataclass
class RetrievalData:
    """Queries, corpus and relevance judgements of one split, keyed by their ids.

    Args:
        qrels: query id -> document id -> grade; a grade > 0 is relevant.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(path: str, split: str = "test") -> RetrievalData:
    """Reads a retrieval dataset: a folder in BEIR layout, else a Hub dataset in the layout of `mteb/*`.

    Queries without a judgement in `split` are left out.

    Raises:
        ValueError: a file or field is missing, or a judgement names an id that does not exist.
    """
    folder = Path(path)
    corpus, queries, qrels = _read_folder(folder, split) if folder.exists() else _read_hub(path, split)
    if not qrels:
        raise ValueError(f"{path}: split {split!r} of the qrels has no relevant document")
    for query_id, judgements in qrels.items():
        for kind, id_, known in (("query", query_id, queries), *(("document", d, corpus) for d in judgements)):
            if id_ not in known:
                raise ValueError(f"{path}: split {split!r} of the qrels names {kind} {id_!r}, which does not exist")
    queries = {query_id: queries[query_id] for query_id in qrels}
    return RetrievalData(folder.name, queries, corpus, qrels)


def _read_folder(folder: Path, split: str) -> tuple[dict, dict, dict]:
    qrels_path = folder / "qrels" / f"{split}.tsv"
    for required in (folder / "corpus.jsonl", folder / "queries.jsonl", qrels_path):
        if not required.is_file():
            found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())[:10]
            raise ValueError(
                f"{folder} is not in BEIR layout (corpus.jsonl, queries.jsonl, qrels/{split}.tsv): "
                f"{required.relative_to(folder)} is missing; found {found}"
            )
    corpus, queries = _read_texts(folder / "corpus.jsonl"), _read_texts(folder / "queries.jsonl")
    qrels: dict[str, dict[str, int]] = {}
    check_encoding(qrels_path)
    with qrels_path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            if not row or (number == 1 and row[-1:] == ["score"]):
                continue
            try:
                query_id, document_id, score = row
                grade = int(float(score))
                if grade != float(score):
                    raise ValueError
            except (ValueError, OverflowError):
                raise ValueError(
                    f"{qrels_path}:{number}: {row} is not query-id, corpus-id, score (a whole number)"
                ) from None
            if grade > 0:
                qrels.setdefault(query_id, {})[document_id] = grade
    return corpus, queries, qrels


def check_encoding(path: Path) -> None:
    """Raises a `ValueError` that names the first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8: {error}") from None


def _read_texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, row in read_jsonl(path, ("_id", "text")):
        id_ = text_of({"_id": str(row["_id"])}, "_id", f"{path}:{number}")
        if id_ in texts:
            raise ValueError(f'{path}:{number}: "_id" {id_!r} is a duplicate')
        texts[id_] = checked_text(row, f"{path}:{number}")
    return texts


def _read_hub(name: str, split: str) -> tuple[dict, dict, dict]:
    try:
        corpus_rows = load_dataset(name, "corpus", split="corpus")
        query_rows = load_dataset(name, "queries", split="queries")
        judgements = load_dataset(name, "default", split=split)
    except Exception as error:
        raise ValueError(
            f"{name!r} is neither a local folder nor a retrieval dataset found on the Hub "
            f"(configs corpus, queries, default): {error}"
        ) from error
    qrels: dict[str, dict[str, int]] = {}
    for row in judgements:
        if row["score"] > 0:
            qrels.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(row["score"])
    corpus, queries = (
        {str(row["_id"]): checked_text(row, f"{name}[{part}][{position}]") for position, row in enumerate(rows)}
        for part, rows in (("corpus", corpus_rows), ("queries", query_rows))
    )
    return corpus, queries, qrels


def checked_text(row: dict, name: str) -> str:
    """`document_text` of a row, after checking title and text; errors call the row `name`."""
    text_of({"title": row.get("title") or ""}, "title", name)
    text_of(row, "text", name)
    return document_text(row)


def document_text(row: dict) -> str:
    """Title and text as one string, as MTEB joins them."""
    return f"{row.get('title') or ''} {row['text']}".strip()
