"""Time and memory of exact search for mining: random vectors on disk, queries in blocks as `EmbeddingModel` gives them.

python eval/speed/search.py --documents 1000000 --queries 10000 --width 384
"""

import argparse
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from nvembed.eval.peak_memory import peak_memory
from nvembed.eval.search import exact_search
from nvembed.eval.vectors import SHARD_ROWS, MadeFrom, VectorShards, shard_path, write_manifest, write_shard


QUERIES = 16_384  # at a time, as `nvembed.train.data.teachers.EmbeddingModel.block`
FAISS = 64e6  # bytes: its products of parts of a block
CPU = torch.device("cpu")
CHECKED = 20  # queries compared with float64


def random_unit(rows: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_random(folder: Path, documents: int, width: int) -> None:
    shards = -(-documents // SHARD_ROWS)
    for number in range(shards):
        rows = min(SHARD_ROWS, documents - number * SHARD_ROWS)
        write_shard(shard_path(folder, number), [str(i) for i in range(rows)], random_unit(rows, width, number))
    write_manifest(folder, MadeFrom("random", "", "", 0, ""), "float32", documents, shards)


def check(queries: np.ndarray, vectors: VectorShards, scores: np.ndarray) -> float:
    """The largest difference of the scores to those of a search in float64."""
    products = [queries.astype(np.float64) @ block.T.astype(np.float64) for block in vectors.blocks()]
    best = -np.sort(-np.concatenate(products, axis=1), axis=1)[:, : scores.shape[1]]
    return float(np.abs(best - scores).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--folder", help="for the vectors; a temporary one if left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        # In a process of its own, whose memory does not count.
        writer = get_context("spawn").Process(target=write_random, args=(Path(folder), args.documents, args.width))
        writer.start()
        writer.join()
        vectors = VectorShards(Path(folder))
        before = peak_memory(CPU)
        start = time.perf_counter()
        for first in range(0, args.queries, QUERIES):
            queries = random_unit(min(QUERIES, args.queries - first), args.width, 10**6 + first)
            scores, _ = exact_search(queries, vectors.blocks(), args.top_k)
        seconds = time.perf_counter() - start
        peak = peak_memory(CPU)
        bound = 4 * args.width * (QUERIES + SHARD_ROWS) + 60 * args.top_k * QUERIES + FAISS
        print(f"{args.queries} queries in {args.documents} documents of width {args.width}: {seconds:.1f} s")
        print(f"peak {peak:.2f} GB, {before:.2f} GB of it before the search; the bound is {bound / 1e9:.2f} GB more")
        difference = check(queries[:CHECKED], vectors, scores[:CHECKED])
        print(f"largest difference to float64, {CHECKED} queries: {difference:.1e}")


if __name__ == "__main__":
    main()
