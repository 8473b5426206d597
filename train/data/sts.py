"""Semantic similarity: pairs scored 4 or more of 5 are each other's positives (paper section 4.1)."""

from typing import TYPE_CHECKING

from nvembed.train.data.mine_negatives import add_negatives
from nvembed.train.data.tables import read_table, sample, text_of


if TYPE_CHECKING:
    from nvembed.train.data.registry import DatasetSource

MIN_SCORE = 4.0


def load(source: "DatasetSource", num_negatives: int, seed: int) -> list[dict]:
    """Both directions of every close pair; negatives are mined among the texts of all pairs."""
    pairs, texts = [], {}
    for name, row in read_table(source, ("sentence1", "sentence2", "score")):
        first, second = text_of(row, "sentence1", name), text_of(row, "sentence2", name)
        texts |= {first: None, second: None}
        if float(row["score"]) >= MIN_SCORE:
            pairs += [{"query": first, "positive": second}, {"query": second, "positive": first}]
    return add_negatives(sample(pairs, source.samples, seed), list(texts), num_negatives, seed)
