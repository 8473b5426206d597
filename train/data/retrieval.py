"""Retrieval data in BEIR layout: one pair for every relevant document of a query, with the whole corpus to mine."""

from transformers.utils.logging import get_logger

from nvembed.eval.data.beir import read_beir
from nvembed.train.data.source import DatasetSource, Pairs, sample


logger = get_logger(__name__)


def load(source: DatasetSource, num_negatives: int, seed: int) -> Pairs:
    """Pairs of query and relevant document; `samples` counts pairs. Those with an empty text are left out and counted.

    Raises:
        ValueError: as `read_beir`.
    """
    task = read_beir(source.path, source.split)
    relevant = {query: [task.corpus[document] for document in documents] for query, documents in task.qrels.items()}
    pairs = [
        {"query": task.queries[query], "positive": positive, "known_positives": positives}
        for query, positives in relevant.items()
        for positive in positives
        if task.queries[query].strip() and positive
    ]
    if empty := sum(map(len, relevant.values())) - len(pairs):
        logger.warning(f"{source.path}: {empty} pairs are left out: the query or the document is empty")
    return Pairs(sample(pairs, source.samples, seed), list(task.corpus.values()))
