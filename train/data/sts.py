"""Semantic similarity: pairs scored 4 or more of 5 are each other's positives (paper section 4.1)."""

import math
from collections import Counter

from nvembed.train.data.source import DatasetSource, Pairs, read_rows, sample, text_of


MIN_SCORE = 4.0


def load(source: DatasetSource, num_negatives: int, seed: int) -> Pairs:
    """Both directions of every close pair, with all texts as the corpus; `samples` counts pairs.

    Raises:
        ValueError: a row lacks a column, has an empty text, or a score that is not a number.
    """
    pairs: list[tuple[str, str]] = []
    counts = Counter()
    texts: dict[str, set[str]] = {}  # text -> its close texts
    for name, row in read_rows(source, ("sentence1", "sentence2", "score")):
        first, second = text_of(row, "sentence1", name), text_of(row, "sentence2", name)
        counts["rows"] += 1
        close_to_first, close_to_second = texts.setdefault(first, set()), texts.setdefault(second, set())
        if _score(row, name) >= MIN_SCORE:
            pairs.append((first, second))
            close_to_first.add(second)
            close_to_second.add(first)
        else:
            counts[f"score below {MIN_SCORE:g}"] += 1
    chosen = sample(pairs, source.samples, seed)
    if len(chosen) < len(pairs):
        counts["not sampled"] = len(pairs) - len(chosen)
    directed = [
        {"query": query, "positive": positive, "known_positives": texts[query]}
        for first, second in chosen
        for query, positive in ((first, second), (second, first))
    ]
    return Pairs(directed, list(texts), counts)


def _score(row: dict, name: str) -> float:
    try:
        score = float(row["score"])
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        raise ValueError(f'{name}: "score" is {row["score"]!r}, not a number')
    return score
