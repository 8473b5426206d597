"""Retrieval: BEIR folders and Hub datasets, exact search, nDCG@10."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytrec_eval
import torch
from torch import Tensor

from nvembed.eval.tables import read_jsonl
from nvembed.modeling_nvembed import format_instruction


Encode = Callable[..., Tensor]  # encode(texts, instruction=..., **options) -> [texts, hidden], L2-normalized


@dataclass
class RetrievalTask:
    """Queries, corpus and relevance judgements of one split, keyed by their ids.

    Args:
        instruction: the task definition that queries carry; documents carry none (paper section 3.1).
        qrels: query id -> document id -> grade; a grade > 0 is relevant.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]
    instruction: str = ""


def read_beir(path: str, split: str = "test", instruction: str = "") -> RetrievalTask:
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
    return RetrievalTask(folder.name, queries, corpus, qrels, instruction)


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
    with qrels_path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            if not row or (number == 1 and row[-1:] == ["score"]):
                continue
            try:
                query_id, document_id, score = row
                grade = int(float(score))
            except ValueError:
                raise ValueError(f"{qrels_path}:{number}: {row} is not query-id, corpus-id, score") from None
            if grade > 0:
                qrels.setdefault(query_id, {})[document_id] = grade
    return corpus, queries, qrels


def _read_texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, row in read_jsonl(path, ("_id", "text")):
        id_ = str(row["_id"])
        if id_ in texts:
            raise ValueError(f'{path}:{number}: "_id" {id_!r} stands there a second time')
        if not isinstance(row["text"], str):
            raise ValueError(f'{path}:{number}: "text" is {row["text"]!r}, not a string')
        texts[id_] = document_text(row)
    return texts


def _read_hub(name: str, split: str) -> tuple[dict, dict, dict]:
    from datasets import load_dataset

    try:
        corpus_rows = load_dataset(name, "corpus", split="corpus")
        query_rows = load_dataset(name, "queries", split="queries")
        judgements = load_dataset(name, "default", split=split)
    except Exception as error:
        raise ValueError(
            f"{name!r} is neither a local folder nor a retrieval dataset that the Hub gives "
            f"(configs corpus, queries, default): {error}"
        ) from error
    qrels: dict[str, dict[str, int]] = {}
    for row in judgements:
        if row["score"] > 0:
            qrels.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(row["score"])
    corpus = {str(row["_id"]): document_text(row) for row in corpus_rows}
    return corpus, {str(row["_id"]): row["text"] for row in query_rows}, qrels


def document_text(row: dict) -> str:
    """Title and text as one string, as MTEB joins them."""
    return f"{row.get('title') or ''} {row['text']}".strip()


def search(queries: Tensor, documents: Tensor, top_k: int = 10, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Exact search by dot product: scores and document positions, both `[queries, top_k]`, best first."""
    parts = [(part @ documents.T).topk(min(top_k, len(documents))) for part in queries.split(chunk)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def ndcg_at_10(encode: Encode, task: RetrievalTask, **options) -> float:
    """Mean nDCG@10 of a model on a task, by `pytrec_eval`, which MTEB uses.

    Args:
        encode: `NVEmbedModel.encode`, or a function like it.
        options: further arguments of `encode`, such as `max_length`.

    Raises:
        ValueError: an embedding is not finite, as those of a model whose training diverged.
    """
    query_embeddings = encode(list(task.queries.values()), instruction=format_instruction(task.instruction), **options)
    document_embeddings = encode(list(task.corpus.values()), **options)
    if not (query_embeddings.isfinite().all() and document_embeddings.isfinite().all()):
        raise ValueError("the model's embeddings hold NaN or infinity; if it was just trained, lower the learning_rate")
    scores, positions = search(query_embeddings, document_embeddings)
    document_ids = list(task.corpus)
    run = {
        query_id: {document_ids[p]: s for p, s in zip(row_positions, row_scores)}
        for query_id, row_positions, row_scores in zip(task.queries, positions.tolist(), scores.tolist())
    }
    per_query = pytrec_eval.RelevanceEvaluator(task.qrels, {"ndcg_cut.10"}).evaluate(run)
    return sum(result["ndcg_cut_10"] for result in per_query.values()) / len(task.queries)
