"""Classification and clustering data (`text`, `label`) as triplets (paper section 4.1).

Example-based, as in NV-Embed-v2: another text of the class is the positive, texts of other classes are the negatives.
Label-based, as in v1 and for two classes: the label's own words are the positive, those of other labels the negatives.
"""

import random
from typing import TYPE_CHECKING

from nvembed.eval import tables
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
    others = {label: [text for text, other in rows if other != label] for label in by_label}
    records = []
    for text, label in sample(rows, source.samples, seed):
        positive = _other_text(by_label[label], text, rng)
        if positive is not None:
            drawn = rng.sample(others[label], min(num_negatives, len(others[label])))
            negatives = [negative for negative in dict.fromkeys(drawn) if negative not in (text, positive)]
            records.append({"query": text, "positive": positive, "negatives": negatives})
    return records


def _other_text(texts: list[str], text: str, rng: random.Random) -> str | None:
    """A random one of `texts` that is not `text`; None if there is none."""
    for candidate in rng.choices(texts, k=20):  # nearly always the first will do
        if candidate != text:
            return candidate
    return next((candidate for candidate in texts if candidate != text), None)


def load_label_based(source: "DatasetSource", num_negatives: int, seed: int) -> list[dict]:
    rows = _read(source)
    labels = sorted({label for _, label in rows})
    _check_labels(source, labels)
    if all(label.isdigit() for label in labels):
        raise ValueError(f"{source.path}: labels are the numbers {labels[:5]}; label_classification needs their words")
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
    if not isinstance(label, (str, int, bool)):
        raise ValueError(f'{name}: "label" is {label!r}; it must be a string or a number')
    if label == "":
        raise ValueError(f'{name}: "label" is empty; every text needs a label')
    return tables.text_of({"label": str(label)}, "label", name)


def _words(label: str) -> str:
    return label.replace("_", " ").strip()


def _check_labels(source: "DatasetSource", labels) -> None:
    if len(labels) < 2:
        raise ValueError(f"{source.path}: one label only, {list(labels)}; negatives need at least two")
