"""Hard negatives: the top candidates that score clearly below the positive (paper section 4.2, arXiv 2407.15831).

As a script, writes any training dataset as ready triplets, so that mining is done once:

    python train/data/mine_negatives.py --path DATASET --output triplets.jsonl [--kind retrieval] [--num_negatives 7]
"""

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import bm25s
import numpy as np
from tqdm import tqdm


MAX_RATIO = 0.95  # TopK-PercPos: a negative scores below this share of its positive's score


class Teacher(Protocol):
    """What ranks a corpus for mining; BM25 here, an embedding model later."""

    def scores(self, queries: list[str], corpus: list[str]) -> Iterator[np.ndarray]:
        """For each query, the scores of all documents, `[len(corpus)]`; higher is closer."""


class BM25:
    def scores(self, queries: list[str], corpus: list[str]) -> Iterator[np.ndarray]:
        retriever = bm25s.BM25()
        retriever.index(bm25s.tokenize(corpus, stopwords="en", show_progress=False), show_progress=False)
        for words in bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False):
            known = [word for word in words if word in retriever.vocab_dict]
            yield retriever.get_scores(known) if known else np.zeros(len(corpus), dtype=np.float32)


def add_negatives(
    pairs: list[dict],
    corpus: list[str],
    num_negatives: int,
    seed: int = 0,
    teacher: Teacher | None = None,
    max_ratio: float = MAX_RATIO,
) -> list[dict]:
    """Gives each pair the `num_negatives` best documents that score below `max_ratio` times its positive.

    Documents that equal the query or a known positive are never taken. Where too few documents have any score, the
    rest is drawn at random; a corpus too small gives fewer.

    Args:
        pairs: dictionaries of `query` and `positive`, optionally `known_positives`, all relevant texts of the query.
        corpus: the texts to take negatives from.

    Returns:
        The pairs with `negatives`, hardest first, and without `known_positives`.
    """
    if num_negatives == 0 or not pairs:
        return [{**_without_known(pair), "negatives": []} for pair in pairs]
    corpus = list(dict.fromkeys([*corpus, *(pair["positive"] for pair in pairs)]))
    position = {text: i for i, text in enumerate(corpus)}
    rng = random.Random(seed)
    all_scores = (teacher or BM25()).scores([pair["query"] for pair in pairs], corpus)
    triplets = []
    for pair, scores in tqdm(zip(pairs, all_scores), total=len(pairs), desc="Mining negatives", unit="query"):
        excluded = {pair["query"], pair["positive"], *pair.get("known_positives", ())}
        eligible = (scores > 0) & (scores < max_ratio * scores[position[pair["positive"]]])
        eligible[[position[text] for text in excluded if text in position]] = False
        ranked = np.flatnonzero(eligible)[np.argsort(-scores[eligible], kind="stable")][:num_negatives]
        negatives = [corpus[i] for i in ranked]
        excluded.update(negatives)
        wanted = min(num_negatives, len(corpus) - sum(text in position for text in excluded) + len(negatives))
        while len(negatives) < wanted:
            candidate = rng.choice(corpus)
            if candidate not in excluded:
                negatives.append(candidate)
                excluded.add(candidate)
        triplets.append({**_without_known(pair), "negatives": negatives})
    return triplets


def _without_known(pair: dict) -> dict:
    return {key: value for key, value in pair.items() if key != "known_positives"}


def write_triplets(records, output: str) -> int:
    """Writes records as JSONL beside `output` and renames: the file is whole or absent.

    Raises:
        FileExistsError: `output` exists.
    """
    path = Path(output)
    if path.exists():
        raise FileExistsError(f"{path} exists; name another --output or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    lines = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                lines += 1
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return lines


def main() -> None:
    from nvembed.train.data.registry import DatasetSource, load_triplets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="dataset: local file or folder, or Hub name")
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--kind", help="see nvembed.train.data.registry.KINDS; found by itself if left out")
    parser.add_argument("--split", default="train")
    parser.add_argument("--instruction", default="", help="task definition to store with every triplet")
    parser.add_argument("--num_negatives", type=int, default=7)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = DatasetSource(args.path, args.kind, args.split, args.instruction, samples=args.samples)
    count = write_triplets(load_triplets([source], args.num_negatives, args.seed), args.output)
    print(f"{count} triplets in {args.output}")


if __name__ == "__main__":
    main()
