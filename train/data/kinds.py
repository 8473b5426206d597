"""The kinds of data: what turns a source's rows into pairs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

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

LABELLED = ("classification", "clustering", "label_classification")

# The columns that tell a table's kind. One is enough for triplets: their loader names the line that lacks another.
COLUMNS = (
    ("triplets", {"query"}),
    ("triplets", {"anchor"}),
    ("sts", {"sentence1", "sentence2", "score"}),
    ("nli", {"premise", "hypothesis", "label"}),
    ("classification", {"text", "label"}),
)


# Keys of an entry that a kind's layout has no use for.
WITHOUT_EFFECT = {
    "retrieval": ("config", "columns", "label_separator"),
    "nemotron": ("columns", "label_separator"),
    "triplets": ("label_separator",),
    "qa": ("label_separator",),
    "nli": ("label_separator",),
    "sts": ("label_separator",),
}


def check_kind(source: DatasetSource) -> None:
    """Raises a `ValueError` if the recipe names a kind that does not exist, or a key that has no effect on its kind."""
    if source.kind is None:
        return
    if source.kind not in KINDS:
        raise ValueError(f"{source.path}: kind is {source.kind!r}; known kinds are {', '.join(sorted(KINDS))}")
    for name in WITHOUT_EFFECT.get(source.kind, ()):
        if getattr(source, name) is not None:
            raise ValueError(f"{source.path}: {name} has no effect on data of kind {source.kind}; leave it out")
    if source.kind == "nemotron" and source.split != "train":
        raise ValueError(f"{source.path}: split is {source.split!r}, but sets of kind nemotron have train alone")


def kind_of(source: DatasetSource) -> str:
    """The recipe's kind, else the one whose layout or columns the source has.

    Raises:
        ValueError: as `check_kind`, or no kind fits; the columns found are named.
    """
    kind = source.kind or _kind_of_layout(source)
    check_kind(replace(source, kind=kind))
    return kind


def _kind_of_layout(source: DatasetSource) -> str:
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
        "(and negatives), or sentence1, sentence2, score, or text, label, or a BEIR folder with corpus.jsonl; in a "
        "recipe, `columns:` names yours, such as `kind: triplets, columns: {query: question, positive: answer}`"
        + (f"; a copy of the set {source.set} in its own layout needs its `kind:`" if source.set is not None else "")
    )
