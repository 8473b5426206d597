"""Exact search in corpora larger than memory: dot products by FAISS, one block of documents at a time."""

from collections.abc import Iterable

import faiss
import numpy as np


def exact_search(queries: np.ndarray, blocks: Iterable[np.ndarray], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents with the largest dot products for each query.

    In memory are the queries, one block of documents (as fp32, `VectorShards.blocks`), the results, and what FAISS
    needs for a block: the best `top_k` of it for each query.

    Args:
        queries: fp32 `[queries, width]`.
        blocks: the documents in order, fp32 `[documents of the block, width]` each.

    Returns:
        Scores and positions, both `[queries, min(top_k, documents)]`, best first, equal scores by position.

    Raises:
        ValueError: the documents have another width than the queries, or there are none.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    best, documents = None, 0
    for block in blocks:
        if block.shape[1] != queries.shape[1]:
            raise ValueError(f"documents have width {block.shape[1]}, queries {queries.shape[1]}")
        block = np.ascontiguousarray(block, dtype=np.float32)
        scores, positions = faiss.knn(queries, block, min(top_k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        if best is None:
            best = faiss.ResultHeap(len(queries), top_k, keep_max=True)
        best.add_result(scores, positions + documents)
        documents += len(block)
    if best is None:
        raise ValueError("there are no documents to search")
    best.finalize()
    found = min(top_k, documents)
    scores, positions = best.D[:, :found], best.I[:, :found]
    order = np.lexsort((positions, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)
