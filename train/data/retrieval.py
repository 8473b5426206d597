"""Retrieval data: BEIR's and MTEB's layout, questions with their passages, and natural language inference."""

import random
from collections import Counter

from nvembed.eval.data.beir import read_beir
from nvembed.train.data.source import DatasetSource, Pairs, merge_known_positives, read_rows, sample, text_of


ENTAILMENT, CONTRADICTION = ("entailment", "0"), ("contradiction", "2")  # as words, or numbered as in SNLI and MNLI
LABELS = (*ENTAILMENT, *CONTRADICTION, "neutral", "1", "-1", "-")  # the last two: annotators did not agree


def load(source: DatasetSource, num_negatives: int, seed: int) -> Pairs:
    """Pairs of query and relevant document; `samples` counts pairs. Those with an empty text are left out and counted.

    Raises:
        ValueError: as `read_beir`.
    """
    task = read_beir(source.path, source.split)
    pairs = [
        {"query": task.queries[query], "positive": task.corpus[document]}
        for query, documents in task.qrels.items()
        for document in documents
    ]
    counts = Counter(rows=len(pairs))
    pairs = merge_known_positives([pair for pair in pairs if pair["query"].strip() and pair["positive"]])
    counts["empty query or document"] = counts["rows"] - len(pairs)
    chosen = sample(pairs, source.samples, seed)
    counts["not sampled"] = len(pairs) - len(chosen)
    return Pairs(chosen, list(task.corpus.values()), +counts)


def load_qa(source: DatasetSource, num_negatives: int, seed: int) -> Pairs:
    """Pairs of a `query` and its passage, `positive`, with the passages of all rows as the corpus.

    Raises:
        ValueError: a row lacks a column or has an empty text.
    """
    positives: dict[str, dict[str, None]] = {}  # query -> its passages
    counts = Counter()
    for name, row in read_rows(source, ("query", "positive")):
        counts["rows"] += 1
        passages = positives.setdefault(text_of(row, "query", name), {})
        passage = text_of(row, "positive", name)
        counts["repeated"] += passage in passages
        passages[passage] = None
    pairs = [{"query": query, "positive": passage} for query, passages in positives.items() for passage in passages]
    pairs = merge_known_positives(pairs)
    corpus = list(dict.fromkeys(passage for passages in positives.values() for passage in passages))
    chosen = sample(pairs, source.samples, seed)
    counts["not sampled"] = len(pairs) - len(chosen)
    return Pairs(chosen, corpus, +counts)


def load_nli(source: DatasetSource, num_negatives: int, seed: int) -> Pairs:
    """Pairs of a `premise` and a `hypothesis` that it entails; the negatives are hypotheses that contradict it.

    A pair whose premise no hypothesis contradicts is left out.

    Raises:
        ValueError: a row lacks a column, has an empty text, or a label that is none of NLI's.
    """
    by_premise: dict[str, tuple[dict, dict]] = {}  # premise -> hypotheses that it entails, that contradict it
    counts = Counter()
    for name, row in read_rows(source, ("premise", "hypothesis", "label")):
        premise, hypothesis = text_of(row, "premise", name), text_of(row, "hypothesis", name)
        label = str(row["label"])
        if label not in LABELS:
            raise ValueError(f'{name}: "label" is {row["label"]!r}; it must be one of {", ".join(LABELS)}')
        counts["rows"] += 1
        entailed, contradicting = by_premise.setdefault(premise, ({}, {}))
        if label in ENTAILMENT:
            counts["repeated"] += hypothesis in entailed
            entailed[hypothesis] = None
        elif label in CONTRADICTION:
            contradicting[hypothesis] = None
            counts["contradictions, as negatives"] += 1
        else:
            counts["neutral or without a label"] += 1
    rng, pairs = random.Random(seed), []
    for premise, (entailed, contradicting) in by_premise.items():
        negatives = [text for text in contradicting if text not in entailed and text != premise]
        for hypothesis in entailed:
            if not negatives:
                counts["no contradiction"] += 1
                continue
            drawn = rng.sample(negatives, min(num_negatives, len(negatives)))
            pairs.append({"query": premise, "positive": hypothesis, "negatives": drawn})
    chosen = sample(pairs, source.samples, seed)
    counts["not sampled"] = len(pairs) - len(chosen)
    return Pairs(chosen, counts=+counts)
