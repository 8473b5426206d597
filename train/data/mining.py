"""Hard negatives: the best-ranked documents that score clearly below the positive (section 4.2, arXiv 2407.15831)."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm
from transformers.utils.logging import get_logger

from nvembed.eval.files import text_id
from nvembed.train.data.corpus import Corpus
from nvembed.train.data.source import Pairs, check_fields, merge_known_positives
from nvembed.train.data.teachers import BM25, Teacher
from nvembed.train.data.words import normalize


logger = get_logger(__name__)

SEARCHED = 100  # documents ranked for a query at first; ten times as many whenever those are not enough
RANKS = 2_000_000  # held in memory at a time: queries times documents ranked for each


@dataclass(frozen=True)
class MiningRules:
    """Which ranked documents become negatives; a document must pass all rules that are set.

    NV-Retriever's names (arXiv 2407.15831, section 4) are in brackets; the paper uses the first alone.

    Args:
        max_ratio: a negative scores below this share of its positive's score (TopK-PercPos). Where the positive scores
            below 0, the bound is as far below it: score - (1 - max_ratio) * |score|.
        margin: a negative scores below its positive's score minus this (TopK-MarginPos).
        max_score: a negative scores below this (TopK-Abs).
        first_rank, last_rank: ranks that negatives are taken from (Top-k shifted by N), 1 being the best document,
            positives included; `last_rank` None: as far down as needed.
        pick: the best-ranked of the documents that pass, or random ones among them (needs `last_rank`).
        fill: where too few pass, draw the rest at random from the corpus's documents that score low enough. None: yes
            if ranks are not limited; a limit of ranks rules it out.

    Raises:
        ValueError: a value is out of range.
    """

    max_ratio: float | None = 0.95
    margin: float | None = None
    max_score: float | None = None
    first_rank: int = 1
    last_rank: int | None = None
    pick: Literal["best", "random"] = "best"
    fill: bool | None = None

    def __post_init__(self):
        check_fields(self, "mining")
        if self.max_ratio is not None and not 0 < self.max_ratio <= 1:
            raise ValueError(f"max_ratio is {self.max_ratio}; it is a share above 0 and up to 1 (the paper's: 0.95)")
        if self.margin is not None and not self.margin >= 0:
            raise ValueError(f"margin is {self.margin}; it must be 0 or more")
        if self.first_rank < 1 or (self.last_rank is not None and self.last_rank < self.first_rank):
            raise ValueError(f"ranks {self.first_rank} to {self.last_rank} hold no document; the best one is of rank 1")
        is_limited = self.first_rank > 1 or self.last_rank is not None
        if self.fill and is_limited:
            raise ValueError(
                "fill: true draws from all ranks, and first_rank or last_rank limits them; drop one of them"
            )
        if self.fill is None:
            object.__setattr__(self, "fill", not is_limited)
        if self.pick == "random" and self.last_rank is None:
            raise ValueError("pick: random needs last_rank: random ones of which documents?")

    def limit(self, positive: float) -> float:
        """What a negative of a positive with this score must score below."""
        limits = [np.inf if self.max_score is None else self.max_score]
        if self.margin is not None:
            limits.append(positive - self.margin)
        if self.max_ratio is not None:
            # BM25 scores 0 where it cannot tell: there, documents may score as much as the positive.
            share = positive - (1 - self.max_ratio) * abs(positive)
            limits.append(share if positive != 0 else np.nextafter(np.float32(0), np.float32(1)))
        return min(limits)


def mine_negatives(
    pairs: Pairs,
    num_negatives: int,
    seed: int = 0,
    make_teacher: Callable[[Corpus], Teacher] = BM25,
    rules: MiningRules = MiningRules(),  # noqa: B008
    name: str = "the data",
) -> Iterator[dict]:
    """Yields each pair with `num_negatives` documents of its corpus that pass the rules.

    The query itself and every positive of the same query are never negatives, nor are texts that differ from one of
    these in case, punctuation or spaces alone. Which negatives a pair gets does not depend on the pairs beside it, but
    for that. A corpus with too few documents gives fewer negatives. Pairs without a corpus have their negatives already
    and pass unchanged.

    Args:
        pairs: see `Pairs`; texts of the corpus that hold only white space are ignored.
        make_teacher: makes the teacher, from the distinct texts of the corpus and the positives.
        name: of the data, in warnings.

    Yields:
        The pairs with `negatives`, hardest first, their `negative_scores` and the `positive_score` by the teacher, and
        without `known_positives`.
    """
    if pairs.corpus is None:
        yield from pairs.pairs
        return
    rows = merge_known_positives(list(pairs.pairs))
    if num_negatives == 0 or not rows:
        yield from ({**_without_known(row), "negatives": []} for row in rows)
        return
    corpus = Corpus(distinct_texts(pairs.corpus, rows))
    miner = Miner(make_teacher(corpus), corpus, num_negatives, rules, seed)
    yield from miner.mine(rows)
    if unranked := miner.counts["no document ranked"]:
        logger.warning(
            f"{name}: {unranked} of {len(rows)} queries match no document of the corpus (for BM25: share no word "
            f"with it), so {'their negatives are drawn at random' if rules.fill else 'they get no negatives'}"
        )


def distinct_texts(corpus: Sequence[str], rows: Sequence[dict]) -> list[str]:
    """The distinct texts of a corpus and of its pairs' positives, without those that hold only white space."""
    texts = (text for source in (corpus, (row["positive"] for row in rows)) for text in source)
    return list(dict.fromkeys(text for text in texts if text.strip()))


def _without_known(pair: dict) -> dict:
    return {key: value for key, value in pair.items() if key != "known_positives"}


class Miner:
    """Chooses negatives from a teacher's ranking.

    Attributes:
        counts: of pairs, so far: "no document ranked" by the teacher, "fewer negatives" than asked for.
    """

    def __init__(self, teacher: Teacher, corpus: Corpus, num_negatives: int, rules: MiningRules, seed: int):
        self.teacher, self.corpus = teacher, corpus
        self.num_negatives, self.rules, self.seed = num_negatives, rules, seed
        self.counts = Counter()

    def mine(self, pairs: Sequence[dict]) -> Iterator[dict]:
        """Yields the pairs as `mine_negatives`; they have all their `known_positives`."""
        with tqdm(total=len(pairs), desc="Mining negatives", unit="query") as progress:
            for start in range(0, len(pairs), self.teacher.block):
                block = pairs[start : start + self.teacher.block]
                bounds, found = self._mine_block(block)
                for pair, bound, negatives in zip(block, bounds, found, strict=True):
                    self.counts["fewer negatives"] += len(negatives) < self.num_negatives
                    yield _without_known(pair) | {
                        "negatives": list(negatives),
                        "positive_score": float(bound),
                        "negative_scores": [float(score) for score in negatives.values()],
                    }
                progress.update(len(block))

    def _mine_block(self, pairs: Sequence[dict]) -> tuple[np.ndarray, list[dict[str, float]]]:
        """Each positive's score, and its negatives with theirs, hardest first."""
        queries = [pair["query"] for pair in pairs]
        bounds = self.teacher.pair_scores(queries, [pair["positive"] for pair in pairs])
        limits = [self.rules.limit(bound) for bound in bounds]
        excluded = [{normalize(text) for text in (pair["query"], *pair["known_positives"])} for pair in pairs]
        chosen: list[dict[str, float]] = [{} for _ in pairs]
        unfinished, k = list(range(len(pairs))), min(SEARCHED, self.rules.last_rank or SEARCHED)
        if self.rules.pick == "random":
            k = self.rules.last_rank  # of all of them
        first = True
        while unfinished:
            deeper = []
            at_once = max(1, RANKS // k)
            for part in (unfinished[i : i + at_once] for i in range(0, len(unfinished), at_once)):
                scores, positions = self.teacher.search([queries[i] for i in part], k)
                if first:
                    self.counts["no document ranked"] += int((positions[:, 0] < 0).sum())
                for i, row_scores, row_positions in zip(part, scores, positions):
                    chosen[i] = self._choose(pairs[i], row_scores, row_positions, limits[i], excluded[i])
                    # A positive that scores exactly 0 is one that BM25 cannot rank: nothing is ranked below it.
                    is_exhausted = row_positions[-1] < 0 or bounds[i] == 0 or len(row_positions) < k
                    if len(chosen[i]) < self.num_negatives and not is_exhausted:
                        deeper.append(i)
            first = False
            next_k = min(10 * k, self.rules.last_rank or 10 * k)
            unfinished, k = deeper if next_k > k else [], next_k
        if self.rules.fill:
            for i, pair in enumerate(pairs):
                self._fill(pair, chosen[i], limits[i], excluded[i])
        return bounds, chosen

    def _choose(self, pair: dict, scores, positions, limit: float, excluded: set[str]) -> dict[str, float]:
        """The negatives among a query's ranked documents."""
        ranks = np.arange(1, len(positions) + 1)
        passes = (scores < limit) & (positions >= 0) & (ranks >= self.rules.first_rank)
        eligible = np.flatnonzero(passes)
        if self.rules.pick == "random":
            eligible = self._rng(pair, "pick").permutation(eligible)
        found: dict[str, float] = {}
        for place in eligible:
            if len(found) == self.num_negatives:
                break
            text = self.corpus[int(positions[place])]
            if normalize(text) not in excluded:
                found[text] = scores[place]
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _fill(self, pair: dict, chosen: dict[str, float], limit: float, excluded: set[str]) -> None:
        """Adds random documents that score below `limit` until there are `num_negatives`, or no more documents."""
        rng, draws = self._rng(pair, "fill"), 4 * self.num_negatives
        while len(chosen) < self.num_negatives:
            # A small corpus is drawn whole; from a large one a few draws are usually enough.
            everything = draws >= len(self.corpus)
            drawn = rng.choice(len(self.corpus), min(draws, len(self.corpus)), replace=False)
            texts = [self.corpus[int(position)] for position in drawn]
            texts = [text for text in texts if normalize(text) not in excluded]
            for text, score in zip(texts, self.teacher.pair_scores([pair["query"]] * len(texts), texts)):
                if score < limit and len(chosen) < self.num_negatives:
                    chosen.setdefault(text, score)
            if everything:
                break
            draws *= 16

    def _rng(self, pair: dict, purpose: str) -> np.random.Generator:
        """The same for a pair, whichever pairs it is mined with, and in whichever process."""
        return np.random.default_rng([self.seed, *map(text_id, (purpose, pair["query"], pair["positive"]))])
