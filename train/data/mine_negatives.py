"""Hard negatives: the top candidates that score clearly below the positive (paper section 4.2, arXiv 2407.15831).

As a script, writes any training dataset as ready triplets, so that mining is done once:

    python train/data/mine_negatives.py --path DATASET --output triplets.jsonl [--kind retrieval] [--num_negatives 7]
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nvembed.train.data.teachers import BM25, Teacher


MAX_RATIO = 0.95  # TopK-PercPos: a negative scores below this share of its positive's score


def add_negatives(
    pairs: list[dict],
    corpus: list[str],
    num_negatives: int,
    seed: int = 0,
    teacher: Teacher | None = None,
    max_ratio: float = MAX_RATIO,
) -> list[dict]:
    """Gives each pair the `num_negatives` best documents that score below `max_ratio` times its positive.

    Documents that equal the query, or any positive of the same query, are never taken. Equal scores (BM25's many
    zeros) are ranked at random; a corpus with too few documents gives fewer negatives.

    Args:
        pairs: dictionaries of `query` and `positive`, optionally `known_positives`, all relevant texts of the query.
        corpus: the texts to take negatives from; empty ones are left out.

    Returns:
        The pairs with `negatives`, hardest first, and without `known_positives`.
    """
    if num_negatives == 0 or not pairs:
        return [{**_without_known(pair), "negatives": []} for pair in pairs]
    positives: dict[str, set[str]] = {}
    for pair in pairs:
        positives.setdefault(pair["query"], set()).update({pair["positive"], *pair.get("known_positives", ())})
    corpus = list(dict.fromkeys(text for text in [*corpus, *(pair["positive"] for pair in pairs)] if text.strip()))
    position = {text: i for i, text in enumerate(corpus)}
    rng = np.random.default_rng(seed)
    all_scores = (teacher or BM25()).scores([pair["query"] for pair in pairs], corpus)
    triplets = []
    for pair, scores in tqdm(zip(pairs, all_scores), total=len(pairs), desc="Mining negatives", unit="query"):
        positive_score = scores[position[pair["positive"]]]
        # A positive without a score has no share to stay below; then what scores no more than it does may serve.
        eligible = scores < max_ratio * positive_score if positive_score > 0 else scores <= positive_score
        excluded = positives[pair["query"]] | {pair["query"]}
        eligible[[position[text] for text in excluded if text in position]] = False
        candidates = rng.permutation(np.flatnonzero(eligible))
        if len(candidates) > num_negatives:
            candidates = candidates[np.argpartition(-scores[candidates], num_negatives)[:num_negatives]]
        ranked = candidates[np.argsort(-scores[candidates], kind="stable")]
        triplets.append({**_without_known(pair), "negatives": [corpus[i] for i in ranked]})
    return triplets


def _without_known(pair: dict) -> dict:
    return {key: value for key, value in pair.items() if key != "known_positives"}


def check_output(output: str) -> Path:
    """Refuses a file that exists, before the mining as well as after it."""
    path = Path(output)
    if path.exists():
        raise FileExistsError(f"{path} exists; name another --output or remove it")
    return path


def write_triplets(records, output: str) -> int:
    """Writes records as JSONL beside `output` and renames: the file is whole or absent.

    Raises:
        FileExistsError: `output` exists.
    """
    path = check_output(output)
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
    from nvembed.train.data.registry import DatasetSource, iterate_triplets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="dataset: local file or folder, or Hub name")
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--kind", help="see nvembed.train.data.registry.KINDS; found by itself if left out")
    parser.add_argument("--split", default="train")
    parser.add_argument("--instruction", help="task definition to store with every triplet")
    parser.add_argument("--num_negatives", type=int, default=7)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_output(args.output)
    source = DatasetSource(args.path, args.kind, args.split, args.instruction, samples=args.samples)
    count = write_triplets(iterate_triplets(source, args.num_negatives, args.seed, ""), args.output)
    print(f"{count} triplets in {args.output}")


if __name__ == "__main__":
    main()
