"""Real public data beside the clone: rows as its README counts them, pairs as an independent reading does."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from nvembed.train.build_data import read_recipe
from nvembed.train.data.kinds import KINDS


ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"
ROWS = {  # of ../shared/data/README.md
    "squad": 3807, "debian": 8000, "banking77": 10003, "tweet_emotion": 3257, "amazon_counterfactual": 4018,
    "stackoverflow_titles": 10000, "sts12": 1484, "stsb": 5749,
}  # fmt: skip


def rows(name):
    return [json.loads(line) for line in (SHARED / name / "train.jsonl").read_text().splitlines()]


def count_pairs(name, kind):
    """How many pairs each family's rule makes, counted another way."""
    if kind == "retrieval":
        with (SHARED / name / "qrels" / "train.tsv").open() as file:
            return sum(int(row["score"]) > 0 for row in csv.DictReader(file, delimiter="\t"))
    if kind == "sts":
        return 2 * sum(row["score"] >= 4 for row in rows(name))
    if kind == "label_classification":
        return len(rows(name))
    classes = {}
    for row in rows(name):
        classes.setdefault(str(row["label"]), Counter())[row["text"]] += 1
    return sum(sum(texts.values()) for texts in classes.values() if len(texts) > 1)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data: counts on real data are not compared")
def test_rows_and_pairs_equal_an_independent_count():
    settings = read_recipe(ROOT / "train" / "recipes" / "shared-data.yaml")
    assert [source.name for source in settings.datasets] == list(ROWS)
    for source in settings.datasets:
        pairs = KINDS[source.kind].load(source, 7, 0)
        listed = list(pairs.pairs)
        assert pairs.counts["rows"] == ROWS[source.name]
        assert len(listed) == count_pairs(source.name, source.kind)
        if source.kind in ("classification", "clustering"):
            label_of = {}
            for row in rows(source.name):
                label_of.setdefault(row["text"], set()).add(str(row["label"]))
            for pair in listed:
                assert label_of[pair["query"]] & label_of[pair["positive"]]
                assert not any(label_of[pair["query"]] & label_of[text] for text in pair["negatives"])
                assert len(set(pair["negatives"])) == 7
