"""Classification and clustering data (`text`, `label`) as pairs with negatives (paper section 4.1).

Example-based, as in NV-Embed-v2: the positive is another text of the class, the negatives are texts of other classes.
Label-based, as in v1 and for two classes: the positive is the label's own words, the negatives are other labels'.
"""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from nvembed.eval.data import tables
from nvembed.train.data.source import DatasetSource, Pairs, read_rows, sample, text_of


DRAWS = 20  # rounds of draws for a text's negatives: those that share a label or a text with it are drawn again


def load_example_based(source: DatasetSource, num_negatives: int, seed: int) -> Pairs:
    """Pairs of two texts of a class; a class of one text gives none, since it has no positive.

    A text with several labels is of the class of its first; its negatives share none of its labels. A pair has a
    `class` where neither of its texts has another label, so that a pair of another class is surely a negative.

    Raises:
        ValueError: all texts are of one class.
    """
    rows = _read(source)
    positions: dict[str, list[int]] = {}  # class -> its rows
    for position, (_, labels) in enumerate(rows):
        positions.setdefault(labels[0], []).append(position)
    _check_labels(source, positions)
    counts = Counter(rows=len(rows))
    return Pairs(_example_pairs(rows, positions, source.samples, num_negatives, seed, counts), counts=counts)


def _example_pairs(rows, positions, samples: int | None, num_negatives: int, seed: int, counts) -> Iterator[dict]:
    rng = random.Random(seed)
    others = {label: Others(own, len(rows)) for label, own in positions.items()}
    labels_of = gather_labels(rows)
    chosen = sample(rows, samples, seed)
    if len(chosen) < len(rows):
        counts["not sampled"] = len(rows) - len(chosen)
    for text, (label, *_) in chosen:
        positive = _other_text([rows[i][0] for i in rng.choices(positions[label], k=20)], text)
        if positive is None:  # twenty draws of the text itself: look through the class
            positive = _other_text((rows[i][0] for i in positions[label]), text)
        if positive is None:
            counts["no other text in its class"] += 1
            continue
        own = labels_of[text]
        negatives: dict[str, None] = {}
        for _ in range(DRAWS):
            drawn = rng.sample(others[label], min(num_negatives - len(negatives), len(others[label])))
            texts = [rows[i][0] for i in drawn]
            allowed = [t for t in texts if t not in (text, positive) and not labels_of[t] & own]
            counts["drawn, but also of the class"] += sum(bool(labels_of[t] & own) for t in texts)
            negatives |= dict.fromkeys(allowed)
            if len(negatives) == num_negatives or len(texts) == len(others[label]):
                break
        is_sure = labels_of[text] == labels_of[positive] == {label}
        yield {"query": text, "positive": positive, "negatives": list(negatives), "class": label if is_sure else None}


def gather_labels(rows: Iterable[tuple[str, list[str]]]) -> dict[str, set[str]]:
    """All labels of each text, which may stand in several rows."""
    labels_of: dict[str, set[str]] = {}
    for text, labels in rows:
        labels_of.setdefault(text, set()).update(labels)
    return labels_of


def _other_text(candidates, text: str) -> str | None:
    return next((candidate for candidate in candidates if candidate != text), None)


class Others(Sequence):
    """The rows of all classes but one, in order, without a list of them: the n-th is found by bisection.

    Args:
        own: positions of the class's rows, ascending.
        rows: how many rows there are in all.
    """

    def __init__(self, own: list[int], rows: int):
        self.before = [position - rank for rank, position in enumerate(own)]  # other rows before each own one
        self.length = rows - len(own)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> int:
        if not 0 <= n < self.length:
            raise IndexError(n)
        return n + bisect_right(self.before, n)


def load_label_based(source: DatasetSource, num_negatives: int, seed: int) -> Pairs:
    """Pairs of a text and its label's words, of several the first's; none of its labels, in any row, is a negative.

    Raises:
        ValueError: all texts are of one class, all labels are numbers, or one has no words.
    """
    rows = _read(source)
    every = [label for _, labels in rows for label in labels]
    if blank := [label for label in every if not _words(label)]:
        raise ValueError(f"{source.path}: label {blank[0]!r} has no words; label_classification needs some")
    names = sorted({_words(label) for label in every})  # two labels may be the same in words
    _check_labels(source, names)
    if all(name.isdigit() for name in names):
        raise ValueError(f"{source.path}: labels are the numbers {names[:5]}; label_classification needs their words")
    rng = random.Random(seed)
    pairs, labels_of = [], gather_labels(rows)
    chosen = sample(rows, source.samples, seed)
    for text, labels in chosen:
        own = {_words(label) for label in labels_of[text]}
        others = [name for name in names if name not in own]
        negatives = rng.sample(others, min(num_negatives, len(others)))
        name = _words(labels[0])
        pairs.append(
            {"query": text, "positive": name, "negatives": negatives, "class": name if own == {name} else None}
        )
    counts = Counter({"rows": len(rows), "not sampled": len(rows) - len(chosen)})
    return Pairs(pairs, counts=+counts)


def _read(source: DatasetSource) -> list[tuple[str, list[str]]]:
    """(Text, its labels) of every row; without a `label_separator`, one label."""
    rows = []
    for name, row in read_rows(source, ("text", "label")):
        label = _label(row, name, is_named=source.columns is not None and "label" in source.columns)
        parts = [label] if source.label_separator is None else label.split(source.label_separator)
        labels = [part.strip() for part in parts if part.strip()]
        if not labels:
            raise ValueError(f'{name}: "label" is {label!r}, which holds no label beside {source.label_separator!r}')
        rows.append((text_of(row, "text", name), labels))
    return rows


def _label(row: dict, name: str, is_named: bool) -> str:
    # MTEB's tables on the Hub have the words in `label_text`; a recipe's `columns:` outranks it.
    label = row["label"] if is_named else row.get("label_text", row["label"])
    if not isinstance(label, (str, int, bool)):
        raise ValueError(f'{name}: "label" is {label!r}; it must be a string or a number')
    if isinstance(label, str) and not label.strip():
        raise ValueError(f'{name}: "label" is empty; every text needs a label')
    return tables.text_of({"label": str(label).strip()}, "label", name)


def _words(label: str) -> str:
    return label.replace("_", " ").strip()


def _check_labels(source: DatasetSource, labels) -> None:
    if len(labels) < 2:
        raise ValueError(f"{source.path}: one label only, {list(labels)}; negatives need at least two")
