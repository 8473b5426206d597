"""What a recipe's `datasets:` says, and how each kind of data becomes triplets."""

import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import get_logger

from nvembed.modeling_nvembed import check_characters
from nvembed.train.data import classification, retrieval, sts, triplets
from nvembed.train.data.blend import Blend
from nvembed.train.data.tables import columns_of, find_file


logger = get_logger(__name__)


@dataclass
class DatasetSource:
    """One entry of a recipe's `datasets:`; on the command line, `--datasets PATH ...`.

    Args:
        path: a local file (JSONL, CSV, Parquet), a local folder, or a Hub dataset.
        kind: how rows become triplets, a key of `KINDS`; None: by the layout and columns found.
        split: which part of it.
        instruction: the task definition, without "Instruct:"; every query carries it. "" is none, None: not given.
        symmetric: the instruction goes on positives and negatives, too; None: as is usual for the kind.
        samples: at most so many, chosen at random; None: all.
        weight: its share of the blend beside the other sets' weights; None for all sets: by their triplets.
        name: what logs call it; None: the last part of `path`.
    """

    path: str
    kind: str | None = None
    split: str = "train"
    instruction: str | None = None
    symmetric: bool | None = None
    samples: int | None = None
    weight: float | None = None
    name: str | None = None

    def __post_init__(self):
        for name, kinds in FIELD_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (name in ("samples", "weight") and isinstance(value, bool)):
                raise ValueError(f"datasets: {name} is {value!r} of type {type(value).__name__} in {self}")
        for name in ("instruction", "name"):
            check_characters(getattr(self, name) or "", f"datasets: {name} of {self.path}")
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"{self.path}: kind is {self.kind!r}; known kinds are {', '.join(sorted(KINDS))}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"{self.path}: samples is {self.samples}; it must be at least 1, or left out for all")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"{self.path}: weight is {self.weight}; it must be above 0, or left out")
        if self.name is None:
            self.name = Path(self.path).stem


FIELD_TYPES = {"path": str, "kind": (str, type(None)), "split": str, "instruction": (str, type(None))}
FIELD_TYPES |= {"symmetric": (bool, type(None)), "samples": (int, type(None)), "name": (str, type(None))}
FIELD_TYPES |= {"weight": (float, int, type(None))}


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

    load: Callable[[DatasetSource, int, int], Iterable[dict]]
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
        "positive_score": Value("float64"),  # a teacher's, where the data came with one
        "negative_scores": Sequence(Value("float64")),
    }
)


def load_triplets(
    sources: list[DatasetSource], num_negatives: int, seed: int = 0, instruction: str | None = ""
) -> Dataset:
    """All sources as one dataset of triplets, in memory.

    Args:
        instruction: for the triplets whose recipe entry and row name none.

    Raises:
        ValueError: no source, a source that gives no triplet, one without an instruction, or an unknown layout.
    """
    tables = []
    for source in check_sources(sources):
        records = list(iterate_triplets(source, num_negatives, seed, instruction))
        tables.append(Dataset(pa.Table.from_pylist(records, schema=TRIPLET_FEATURES.arrow_schema)))
    return concatenate_datasets(tables)


def check_sources(sources: list[DatasetSource]) -> list[DatasetSource]:
    """The sources, if a blend can be made of them.

    Raises:
        ValueError: there is none, two have one name, or only some have a weight.
    """
    if not sources:
        raise ValueError("datasets is empty: name at least one dataset in the recipe, or with --datasets PATH")
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"datasets: two are named {twice.pop()!r}, and logs would mix them up; give one a `name:`")
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(f"datasets: {without[0]} has no weight and others have one; give one to all, or to none")
    return sources


def load_blend(
    training_args: TrainingArguments, sources: list[DatasetSource], num_negatives: int, instruction: str | None = None
) -> Blend:
    """The triplets of the whole run, blended, from tables in `output_dir`/triplets that the main process writes.

    Made once: a restart with the same settings and files reads them again. The blend is as long as the run, so the
    Trainer passes over it once, and `num_train_epochs` is set to 1. Mining can outlast the patience of the other
    processes: raise `ddp_timeout`, or mine beforehand.

    Raises:
        FileNotFoundError: `output_dir` is not on a disk that this process's machine shares with the main process's.
        TimeoutError: the main process took longer than `ddp_timeout`.
        ValueError: as `load_triplets`; fewer triplets than a batch has rows; a set without negatives where rows get
            them from nowhere else; `output_dir` has training checkpoints of other data.
    """
    folder = Path(training_args.output_dir, "triplets")
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    with after_main_process(training_args):
        if training_args.process_index == 0:
            write_tables(folder, check_sources(sources), num_negatives, seed, instruction)
        tables = [read_triplets(folder / table_name(i)) for i in range(len(sources))]
    if not training_args.in_batch_negatives or training_args.per_device_train_batch_size * training_args.world_size < 2:
        check_have_negatives(tables, sources)
    batch = training_args.per_device_train_batch_size * training_args.world_size
    batch *= training_args.gradient_accumulation_steps
    triplets = sum(map(len, tables))
    if triplets < batch:
        raise ValueError(
            f"{triplets} triplets do not fill one batch of {batch} (per_device_train_batch_size x processes x "
            "gradient_accumulation_steps); lower the batch size or add data"
        )
    samples = training_args.max_steps * batch
    if training_args.max_steps <= 0:
        samples = math.ceil(triplets * training_args.num_train_epochs)
    training_args.num_train_epochs = 1.0
    weights = None if sources[0].weight is None else [source.weight for source in sources]
    return Blend(tables, samples, weights, seed)


@contextmanager
def after_main_process(training_args: TrainingArguments) -> Iterator[None]:
    """The body runs on the main process first, then on the others, which say so when they have waited too long."""
    advice = (
        f"The other processes wait ddp_timeout = {training_args.ddp_timeout} s for the triplets, and the run ends if "
        "reading and mining take longer: raise --ddp_timeout then, or mine beforehand (train/data/mine_negatives.py)."
    )
    if training_args.world_size > 1 and training_args.process_index == 0:
        logger.warning(advice)
    entered = False
    try:
        with training_args.main_process_first(local=False, desc="loading triplets"):
            entered = True
            yield
    except RuntimeError as error:
        if entered:
            raise
        raise TimeoutError(f"the main process did not finish the triplets ({error}). {advice}") from error


def read_triplets(path: Path) -> Dataset:
    """A table of `write_tables`, memory-mapped.

    Raises:
        FileNotFoundError: the main process wrote it to a disk of its own.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is absent on {socket.gethostname()}, though the main process has written it: output_dir must be "
            "on a disk that all machines share"
        )
    return Dataset.from_file(str(path))


def check_have_negatives(tables: list[Dataset], sources: list[DatasetSource]) -> None:
    """Raises a `ValueError` for a set none of whose rows has a negative: its loss would be 0 whatever is learned."""
    for table, source in zip(tables, sources):
        if not pc.sum(pc.list_value_length(table.data.column("negatives"))).as_py():
            raise ValueError(
                f"{source.path}: none of its {len(table)} triplets has a negative, and rows get none from their batch "
                "(in_batch_negatives off, or one row a batch), so nothing would be learned from it: give it negatives, "
                "leave them out of the file to have them mined, or drop the set"
            )


def table_name(index: int) -> str:
    return f"{index:03}.arrow"


def write_tables(
    folder: Path, sources: list[DatasetSource], num_negatives: int, seed: int, instruction: str | None
) -> None:
    """Writes one Arrow file a source beside `folder`, then renames; tables made of the same are kept.

    Raises:
        ValueError: as `iterate_triplets`; the tables that are there are made of something else, and checkpoints beside
            them were trained on them.
    """
    settings = {"num_negatives": num_negatives, "seed": seed, "instruction": instruction}
    made_of = settings | {"datasets": [account(source) for source in sources]}
    trained = sorted(path.name for path in folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    if (folder / "made_of.json").is_file():
        before = json.loads((folder / "made_of.json").read_text())
        if before == made_of:
            return
        if trained:
            raise ValueError(
                f"{folder.parent / trained[-1]} was trained on other data: {difference(before, made_of)}; give what it "
                "began with, or name another --output_dir"
            )
    elif trained:
        logger.warning(f"{folder} is gone, so whether {trained[-1]} was trained on this data is not known")
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index, source in enumerate(sources):
        write_table(partial / table_name(index), iterate_triplets(source, num_negatives, seed, instruction))
    (partial / "made_of.json").write_text(json.dumps(made_of, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def provenance(output_dir: str) -> dict | None:
    """What the triplets of a run were made of: settings, and each source with its files' digests."""
    file = Path(output_dir, "triplets", "made_of.json")
    return json.loads(file.read_text()) if file.is_file() else None


def account(source: DatasetSource) -> dict:
    """What a source's table is made of: its entry, and the SHA-256 of each local file, wherever that lies."""
    if source.kind == "retrieval" or (source.kind is None and is_beir(source)):
        files = [Path(source.path, name) for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{source.split}.tsv")]
    else:
        files = [find_file(source)]
    digests = {}
    for file in files:
        if file is not None and file.is_file():
            with file.open("rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return asdict(source) | {"path": None if digests else source.path, "files": digests}


def difference(before: dict, now: dict) -> str:
    """The first setting or file in which tables that are there differ from those that would be made."""
    old, new = ([source["name"] for source in made_of["datasets"]] for made_of in (before, now))
    if old != new:
        return f"datasets were {', '.join(old)} and are {', '.join(new)}"
    pairs = [("", before, now), *((f"{a['name']}: ", a, b) for a, b in zip(before["datasets"], now["datasets"]))]
    for name, was, is_ in pairs:
        for key, value in is_.items():
            if key == "files" and value != was.get(key):
                files = was.get(key, {})
                changed = [file for file in files.keys() | value.keys() if files.get(file) != value.get(file)]
                return f"{name}{min(changed)} has changed"
            if key != "datasets" and value != was.get(key):
                return f"{name}{key} was {was.get(key)!r} and is {value!r}"
    return "an earlier version of nvembed made it"


def write_table(path: Path, records: Iterable[dict]) -> None:
    """Triplets to an Arrow file, as `Dataset.from_file` reads it, a thousand in memory at a time."""
    schema = TRIPLET_FEATURES.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        records = iter(records)
        while rows := list(islice(records, 1000)):
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def iterate_triplets(
    source: DatasetSource, num_negatives: int, seed: int = 0, instruction: str | None = None
) -> Iterator[dict]:
    """The triplets of one source, each with all columns of `TRIPLET_FEATURES` but the scores, where there are none.

    How many negatives are missing is logged at the end.

    Raises:
        ValueError: the source gives none, or neither it nor a row nor `instruction` has an instruction.
    """
    kind = KINDS[source.kind or infer_kind(source)]
    usual = {"dataset": source.name, "instruction": instruction, "symmetric": kind.symmetric}
    asked = {"instruction": source.instruction, "symmetric": source.symmetric}  # a recipe outranks the file
    asked = {column: value for column, value in asked.items() if value is not None}
    rows = ragged = missing = 0
    for record in kind.load(source, num_negatives, seed):
        triplet = {**usual, **record, **asked}
        if triplet["instruction"] is None:
            raise ValueError(
                f"{source.path} has no instruction, which every query carries (paper section 3.1): set `instruction:` "
                'in its entry, or --instruction for all; "" is for none'
            )
        lacking = max(0, num_negatives - len(triplet["negatives"]))
        rows, ragged, missing = rows + 1, ragged + (lacking > 0), missing + lacking
        yield triplet
    if missing:
        logger.warning(
            f"{source.path}: {ragged} of {rows} triplets have fewer than num_negatives = {num_negatives} negatives; "
            f"{missing} of {rows * num_negatives} places stay empty"
        )
    if not rows:
        raise ValueError(f"{source.path}: split {source.split!r} gave no triplets; add rows, or leave it out")


def is_beir(source: DatasetSource) -> bool:
    return Path(source.path, "corpus.jsonl").is_file()


def infer_kind(source: DatasetSource) -> str:
    """The kind whose layout or columns the source has.

    Raises:
        ValueError: none fits; what was found is named.
    """
    if is_beir(source):
        return "retrieval"
    columns = columns_of(source)
    for kind, required in (
        ("triplets", {"query"}),  # one column is enough to know it: the loader names the line that lacks another
        ("triplets", {"anchor"}),
        ("sts", {"sentence1", "sentence2", "score"}),
        ("classification", {"text", "label"}),
    ):
        if required <= columns:
            return kind
    raise ValueError(
        f"{source.path}: unknown dataset layout with columns {sorted(columns)}; expected query (or anchor), positive "
        "(and negatives), or sentence1, sentence2, score, or text, label, or a BEIR folder with corpus.jsonl"
    )
