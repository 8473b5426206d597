"""Hard negatives: the best-ranked documents that score clearly below the positive (section 4.2, arXiv 2407.15831)."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
from tqdm import tqdm
from transformers.utils.logging import get_logger

from nvembed.train.data.source import Pairs
from nvembed.train.data.teachers import BM25, Teacher


logger = get_logger(__name__)

MAX_RATIO = 0.95  # TopK-PercPos: a negative scores below this share of its positive's score
SEARCHED = 100  # documents ranked for a query at first; ten times as many whenever those are not enough
BLOCK = 256  # pairs ranked at a time
RANKS = 2_000_000  # held in memory at a time: queries times documents ranked for each


def mine_negatives(
    pairs: Pairs,
    num_negatives: int,
    seed: int = 0,
    make_teacher: Callable[[Sequence[str]], Teacher] = BM25,
    max_ratio: float = MAX_RATIO,
    name: str = "the data",
) -> Iterator[dict]:
    """Yields each pair with the `num_negatives` best documents that score below `max_ratio` times its positive.

    The query itself and every positive of the same query are never negatives. Where the teacher cannot rank any more
    documents, the rest are drawn at random from those that score low enough. A corpus with too few documents gives
    fewer negatives. Pairs without a corpus have their negatives already and pass unchanged.

    Args:
        pairs: see `Pairs`; texts of the corpus that hold only white space are ignored.
        make_teacher: makes the teacher, from the distinct texts of the corpus and the positives.
        max_ratio: a negative scores below this share of its positive's score.
        name: of the data, in warnings.

    Yields:
        The pairs with `negatives`, hardest first, and without `known_positives`.
    """
    if pairs.corpus is None:
        yield from pairs.pairs
        return
    rows = list(pairs.pairs)
    if num_negatives == 0 or not rows:
        yield from ({**_without_known(row), "negatives": []} for row in rows)
        return
    positives: dict[str, set[str]] = {}
    for row in rows:
        positives.setdefault(row["query"], set()).update({row["positive"], *row.get("known_positives", ())})
    texts = (text for source in (pairs.corpus, (row["positive"] for row in rows)) for text in source)
    corpus = list(dict.fromkeys(text for text in texts if text.strip()))
    miner = Miner(make_teacher(corpus), corpus, num_negatives, max_ratio, seed)
    with tqdm(total=len(rows), desc="Mining negatives", unit="query") as progress:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            excluded = [positives[row["query"]] | {row["query"]} for row in block]
            for row, negatives in zip(block, miner.mine(block, excluded)):
                yield {**_without_known(row), "negatives": negatives}
            progress.update(len(block))
    if miner.unranked:
        logger.warning(
            f"{name}: {miner.unranked} of {len(rows)} queries match no document of the corpus (for BM25: share no word "
            "with it), so their negatives are drawn at random"
        )


def _without_known(pair: dict) -> dict:
    return {key: value for key, value in pair.items() if key != "known_positives"}


class Miner:
    """Chooses negatives from a teacher's ranking.

    Attributes:
        unranked: number of queries so far for which the teacher ranked no document.
    """

    def __init__(self, teacher: Teacher, corpus: Sequence[str], num_negatives: int, max_ratio: float, seed: int):
        self.teacher, self.corpus = teacher, corpus
        self.num_negatives, self.max_ratio = num_negatives, max_ratio
        self.rng = np.random.default_rng(seed)
        self.unranked = 0

    def mine(self, pairs: Sequence[dict], excluded: Sequence[set[str]]) -> list[list[str]]:
        """The negatives of each pair, hardest first, none of them among the pair's `excluded` texts."""
        queries = [pair["query"] for pair in pairs]
        bounds = self.teacher.pair_scores(queries, [pair["positive"] for pair in pairs])
        # A share of a score of 0 or less is no stricter limit; there, documents may score as much as the positive.
        limits = [self.max_ratio * bound if bound > 0 else np.nextafter(bound, np.inf) for bound in bounds]
        ranked: list[list[str]] = [[] for _ in pairs]
        unfinished, k = list(range(len(pairs))), SEARCHED
        while unfinished:
            deeper = []
            at_once = max(1, RANKS // k)
            for part in (unfinished[i : i + at_once] for i in range(0, len(unfinished), at_once)):
                scores, positions = self.teacher.search([queries[i] for i in part], k)
                if k == SEARCHED:
                    self.unranked += int((positions[:, 0] < 0).sum())
                for i, row_scores, row_positions in zip(part, scores, positions):
                    eligible = row_positions[(row_scores < limits[i]) & (row_positions >= 0)]
                    texts = (self.corpus[position] for position in eligible)
                    ranked[i] = list(islice((t for t in texts if t not in excluded[i]), self.num_negatives))
                    # A positive that scores exactly 0 is one that BM25 cannot rank: nothing is ranked below it.
                    is_exhausted = row_positions[-1] < 0 or bounds[i] == 0 or len(row_positions) < k
                    if len(ranked[i]) < self.num_negatives and not is_exhausted:
                        deeper.append(i)
            unfinished, k = deeper, 10 * k
        return [self._fill(queries[i], ranked[i], limits[i], excluded[i]) for i in range(len(pairs))]

    def _fill(self, query: str, ranked: list[str], limit: float, excluded: set[str]) -> list[str]:
        """Adds random documents that score below `limit` until there are `num_negatives`, or no more documents."""
        chosen = dict.fromkeys(ranked)
        draws = 4 * self.num_negatives
        while len(chosen) < self.num_negatives:
            # A small corpus is drawn whole; from a large one a few draws are usually enough.
            everything = draws >= len(self.corpus)
            drawn = self.rng.choice(len(self.corpus), min(draws, len(self.corpus)), replace=False)
            texts = [text for text in map(self.corpus.__getitem__, drawn) if text not in excluded]
            low = self.teacher.pair_scores([query] * len(texts), texts) < limit
            for text, is_low in zip(texts, low):
                if is_low and len(chosen) < self.num_negatives:
                    chosen.setdefault(text)
            if everything:
                break
            draws *= 16
        return list(chosen)
