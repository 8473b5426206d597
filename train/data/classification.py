"""Classification and clustering data (`text`, `label`) as triplets (paper section 4.1).

Example-based, as in NV-Embed-v2: another text of the class is the positive, texts of other classes are the negatives.
Label-based, as in v1 and for two classes: the label's own words are the positive, those of other labels the negatives.
"""

import random
from typing import TYPE_CHECKING

from nvembed.train.data.tables import read_table, sample, text_of


if TYPE_CHECKING:
    from nvembed.train.data.registry import DatasetSource


def load_example_based(source: "DatasetSource", num_negatives: int, seed: int) -> list[dict]:
    """A class of one text gives no triplet: it has no positive.

    Raises:
        ValueError: all texts are of one class.
    """
    rows = _read(source)
    by_label: dict[str, list[str]] = {}
    for text, label in rows:
        by_label.setdefault(label, []).append(text)
    _check_labels(source, by_label)
    rng = random.Random(seed)
    records = []
    for text, label in sample(rows, source.samples, seed):
        positives = [other for other in by_label[label] if other != text]
        if positives:
            negatives = []
            others = len(rows) - len(by_label[label])
            while len(negatives) < min(num_negatives, others):
                candidate, candidate_label = rng.choice(rows)
                if candidate_label != label:
                    negatives.append(candidate)
            records.append({"query": text, "positive": rng.choice(positives), "negatives": negatives})
    return records


def load_label_based(source: "DatasetSource", num_negatives: int, seed: int) -> list[dict]:
    rows = _read(source)
    labels = sorted({label for _, label in rows})
    _check_labels(source, labels)
    rng = random.Random(seed)
    records = []
    for text, label in sample(rows, source.samples, seed):
        others = [_words(other) for other in labels if other != label]
        negatives = rng.sample(others, min(num_negatives, len(others)))
        records.append({"query": text, "positive": _words(label), "negatives": negatives})
    return records


def _read(source: "DatasetSource") -> list[tuple[str, str]]:
    return [(text_of(row, "text", name), _label(row, name)) for name, row in read_table(source, ("text", "label"))]


def _label(row: dict, name: str) -> str:
    label = row.get("label_text", row["label"])  # MTEB's tables on the Hub have the words in `label_text`
    if label is None or label == "":
        raise ValueError(f'{name}: "label" is empty; every text needs a label')
    return str(label)


def _words(label: str) -> str:
    return label.replace("_", " ").strip()


def _check_labels(source: "DatasetSource", labels) -> None:
    if len(labels) < 2:
        raise ValueError(f"{source.path}: one label only, {list(labels)}; negatives need at least two")
