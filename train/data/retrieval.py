"""Retrieval data (BEIR layout): one triplet for every relevant document of a query, negatives mined in the corpus."""

from typing import TYPE_CHECKING

from nvembed.eval.retrieval import read_beir
from nvembed.train.data.mine_negatives import add_negatives
from nvembed.train.data.tables import sample


if TYPE_CHECKING:
    from nvembed.train.data.registry import DatasetSource


def load(source: "DatasetSource", num_negatives: int, seed: int) -> list[dict]:
    task = read_beir(source.path, source.split)
    relevant = {query: [task.corpus[document] for document in documents] for query, documents in task.qrels.items()}
    pairs = [
        {"query": task.queries[query], "positive": positive, "known_positives": positives}
        for query, positives in relevant.items()
        for positive in positives
        if task.queries[query].strip() and positive
    ]
    pairs = sample(pairs, source.samples, seed)
    return add_negatives(pairs, list(task.corpus.values()), num_negatives, seed)
