"""The kinds of data: what turns a source's rows into pairs."""

from collections.abc import Callable
from dataclasses import dataclass

from nvembed.train.data import classification, nemotron, retrieval, sts, triplets
from nvembed.train.data.source import DatasetSource, Pairs, columns_of, is_beir, is_nemotron


@dataclass
class Kind:
    """A loader and its default for a recipe's `symmetric:`.

    Args:
        load: (source, num_negatives, seed) -> `Pairs`; `num_negatives` is for loaders that draw negatives themselves.
    """

    load: Callable[[DatasetSource, int, int], Pairs]
    symmetric: bool


KINDS = {
    "triplets": Kind(triplets.load, symmetric=False),
    "retrieval": Kind(retrieval.load, symmetric=False),
    "qa": Kind(retrieval.load_qa, symmetric=False),
    "nli": Kind(retrieval.load_nli, symmetric=True),
    "nemotron": Kind(nemotron.load, symmetric=False),
    "sts": Kind(sts.load, symmetric=True),
    "classification": Kind(classification.load_example_based, symmetric=True),
    "clustering": Kind(classification.load_example_based, symmetric=True),
    "label_classification": Kind(classification.load_label_based, symmetric=False),
}

# The columns that tell a table's kind. One is enough for triplets: their loader names the line that lacks another.
COLUMNS = (
    ("triplets", {"query"}),
    ("triplets", {"anchor"}),
    ("sts", {"sentence1", "sentence2", "score"}),
    ("nli", {"premise", "hypothesis", "label"}),
    ("classification", {"text", "label"}),
)


def check_kind(source: DatasetSource) -> None:
    """Raises a `ValueError` if the recipe names a kind that does not exist."""
    if source.kind is not None and source.kind not in KINDS:
        raise ValueError(f"{source.path}: kind is {source.kind!r}; known kinds are {', '.join(sorted(KINDS))}")


def kind_of(source: DatasetSource) -> str:
    """The recipe's kind, else the one whose layout or columns the source has.

    Raises:
        ValueError: the recipe's kind does not exist, or none fits; the columns found are named.
    """
    check_kind(source)
    if source.kind is not None:
        return source.kind
    if is_nemotron(source):
        return "nemotron"
    if is_beir(source):
        return "retrieval"
    found = columns_of(source)
    for kind, required in COLUMNS:
        if required <= found:
            return kind
    raise ValueError(
        f"{source.path}: unknown dataset layout with columns {sorted(found)}; expected query (or anchor), positive "
        "(and negatives), or sentence1, sentence2, score, or text, label, or a BEIR folder with corpus.jsonl"
    )
