"""Exact search in corpora larger than memory: embeddings in a file, dot products by FAISS, one block at a time."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from nvembed.eval.files import write_json
from nvembed.eval.processes import Embed


BLOCK = 50_000  # documents embedded, or searched, at a time


def embed_to_file(embed: Embed, texts: Sequence[str], prefix: str, path: Path, block: int = BLOCK) -> np.ndarray:
    """Embeds a corpus into a `.npy` file, a block at a time; an interrupted run resumes after its last complete block.

    Args:
        path: of the file, never half-written; the same path must mean the same texts and model.

    Returns:
        fp32 `[texts, width]`, memory-mapped.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, progress = path.with_suffix(".partial"), path.with_suffix(".json")
        done = json.loads(progress.read_text())["done"] if progress.is_file() and partial.is_file() else 0
        rows = np.load(partial, mmap_mode="r+") if done else None
        with tqdm(total=len(texts), initial=done, desc="Embedding", unit="text") as bar:
            for start in range(done, len(texts), block):
                embeddings = embed(list(texts[start : start + block]), prefix)
                if rows is None:
                    shape = (len(texts), embeddings.shape[1])
                    rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
                rows[start : start + len(embeddings)] = embeddings
                rows.flush()
                write_json(progress, {"done": start + len(embeddings)})
                bar.update(len(embeddings))
        del rows
        os.replace(partial, path)
        progress.unlink()
    return np.load(path, mmap_mode="r")


def exact_search(
    queries: np.ndarray, documents: np.ndarray, top_k: int, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """The documents with the largest dot products for each query.

    Args:
        queries: fp32 `[queries, width]`.
        documents: fp32 `[documents, width]`, possibly memory-mapped: one block is in memory at a time.

    Returns:
        Scores and positions, both `[queries, min(top_k, documents)]`, best first.
    """
    best = faiss.ResultHeap(len(queries), min(top_k, len(documents)), keep_max=True)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    for start in range(0, len(documents), block):
        part = np.ascontiguousarray(documents[start : start + block], dtype=np.float32)
        scores, positions = faiss.knn(queries, part, min(top_k, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(scores, positions + start)
    best.finalize()
    return best.D, best.I
