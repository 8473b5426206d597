"""What a recipe's `datasets:` says, and how each kind of data becomes triplets."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from transformers import TrainingArguments

from nvembed.train.data import classification, retrieval, sts, triplets
from nvembed.train.data.tables import columns_of


@dataclass
class DatasetSource:
    """One entry of a recipe's `datasets:`; on the command line, `--datasets PATH ...`.

    Args:
        path: a local file (JSONL, CSV, Parquet), a local folder, or a Hub dataset.
        kind: how rows become triplets, a key of `KINDS`; None: by the layout and columns found.
        split: which part of it.
        instruction: the task definition, without "Instruct:"; every query carries it.
        symmetric: the instruction goes on positives and negatives, too; None: as is usual for the kind.
        samples: at most so many, chosen at random; None: all.
        name: what logs call it; None: the last part of `path`.
    """

    path: str
    kind: str | None = None
    split: str = "train"
    instruction: str = ""
    symmetric: bool | None = None
    samples: int | None = None
    name: str | None = None

    def __post_init__(self):
        for name, kinds in FIELD_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (name == "samples" and isinstance(value, bool)):
                raise ValueError(f"datasets: {name} is {value!r} of type {type(value).__name__} in {self}")
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"{self.path}: kind is {self.kind!r}; known kinds are {', '.join(sorted(KINDS))}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"{self.path}: samples is {self.samples}; it must be at least 1, or left out for all")
        if self.name is None:
            self.name = Path(self.path).stem


FIELD_TYPES = {"path": str, "kind": (str, type(None)), "split": str, "instruction": str}
FIELD_TYPES |= {"symmetric": (bool, type(None)), "samples": (int, type(None)), "name": (str, type(None))}


def as_source(entry: DatasetSource | dict | str) -> DatasetSource:
    """A recipe's mapping, or a path alone, as a `DatasetSource`.

    Raises:
        ValueError: the entry is something else, a key is unknown, or `path` is missing.
    """
    if isinstance(entry, DatasetSource):
        return entry
    if isinstance(entry, str):
        return DatasetSource(entry)
    if not isinstance(entry, dict):
        raise ValueError(f"datasets: {entry!r} is neither a mapping with a path nor a path")
    known = [field.name for field in fields(DatasetSource)]
    unknown = sorted(entry.keys() - set(known))
    if unknown or "path" not in entry:
        fault = f"unknown key {unknown[0]!r}" if unknown else "no path"
        raise ValueError(f"datasets: {entry} has {fault}; an entry has path and, as needed, {', '.join(known[1:])}")
    return DatasetSource(**entry)


@dataclass
class Kind:
    """`load(source, num_negatives, seed)` gives dictionaries of query, positive and negatives."""

    load: Callable[[DatasetSource, int, int], list[dict]]
    symmetric: bool


KINDS = {
    "triplets": Kind(triplets.load, symmetric=False),
    "retrieval": Kind(retrieval.load, symmetric=False),
    "sts": Kind(sts.load, symmetric=True),
    "classification": Kind(classification.load_example_based, symmetric=True),
    "clustering": Kind(classification.load_example_based, symmetric=True),
    "label_classification": Kind(classification.load_label_based, symmetric=False),
}

TRIPLET_FEATURES = Features(
    {
        "query": Value("string"),
        "positive": Value("string"),
        "negatives": Sequence(Value("string")),
        "dataset": Value("string"),
        "instruction": Value("string"),
        "symmetric": Value("bool"),
    }
)


def load_triplets(sources: list[DatasetSource], num_negatives: int, seed: int = 0, instruction: str = "") -> Dataset:
    """All sources as one dataset of triplets; the Trainer's shuffling blends them within each batch.

    Args:
        instruction: for the triplets whose recipe entry and row name none.

    Raises:
        ValueError: no source, a source that gives no triplet, or an unknown layout.
    """
    if not sources:
        raise ValueError("datasets is empty: name at least one dataset in the recipe, or with --datasets PATH")
    return concatenate_datasets([_load_source(source, num_negatives, seed, instruction) for source in sources])


def load_triplets_once(training_args: TrainingArguments, *args, **kwargs) -> Dataset:
    """`load_triplets` on the main process; the others read what it left in `output_dir`/triplets.

    Mining on the main process can outlast the others' patience: raise `ddp_timeout`, or mine beforehand.
    """
    if training_args.world_size == 1:
        return load_triplets(*args, **kwargs)
    folder = Path(training_args.output_dir) / "triplets"
    with training_args.main_process_first(local=False, desc="loading triplets"):
        if training_args.process_index == 0:
            load_triplets(*args, **kwargs).save_to_disk(folder)
    return Dataset.load_from_disk(folder)


def _load_source(source: DatasetSource, num_negatives: int, seed: int, instruction: str) -> Dataset:
    kind = KINDS[source.kind or infer_kind(source)]
    records = kind.load(source, num_negatives, seed)
    if not records:
        raise ValueError(f"{source.path}: split {source.split!r} gave no triplets")
    usual = {"dataset": source.name, "instruction": instruction, "symmetric": kind.symmetric}
    asked = {"instruction": source.instruction or None, "symmetric": source.symmetric}  # a recipe outranks the file
    asked = {column: value for column, value in asked.items() if value is not None}
    return Dataset.from_list([{**usual, **record, **asked} for record in records], features=TRIPLET_FEATURES)


def infer_kind(source: DatasetSource) -> str:
    """The kind whose layout or columns the source has.

    Raises:
        ValueError: none fits; what was found is named.
    """
    if (Path(source.path) / "corpus.jsonl").is_file():
        return "retrieval"
    columns = columns_of(source)
    for kind, required in (
        ("triplets", {"query"}),  # one column is enough to know it: the loader names the line that lacks another
        ("sts", {"sentence1", "sentence2", "score"}),
        ("classification", {"text", "label"}),
    ):
        if required <= columns:
            return kind
    raise ValueError(
        f"{source.path}: unknown dataset layout with columns {sorted(columns)}; expected query, positive (and "
        "negatives), or sentence1, sentence2, score, or text, label, or a BEIR folder with corpus.jsonl"
    )
