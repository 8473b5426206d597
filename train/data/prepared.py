"""Triplets on disk, one Arrow file per source, with a record of what they were made from."""

import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from transformers.utils.logging import get_logger

from nvembed.eval.files import sha256, whole
from nvembed.train.data.kinds import KINDS, LABELLED, kind_of
from nvembed.train.data.mining import mine_negatives
from nvembed.train.data.source import DatasetSource, check_exists, find_files, is_beir, is_nemotron


logger = get_logger(__name__)

MADE_OF = "made_of.json"  # within the folder of tables
NEWER = (
    "config",
    "columns",
    "label_separator",
    "set",
    "mteb",
    "decontaminate",
)  # of an entry; runs of earlier versions resume without them

TRIPLET_FEATURES = Features(
    {
        "query": Value("string"),
        "positive": Value("string"),
        "negatives": ListOf(Value("string")),
        "dataset": Value("string"),
        "instruction": Value("string"),
        "symmetric": Value("bool"),
        "positive_score": Value("float64"),  # a teacher's, where the data came with one
        "negative_scores": ListOf(Value("float64")),
        "class": Value("string"),  # of query and positive, in labelled data
    }
)


def iterate_triplets(
    source: DatasetSource, num_negatives: int, seed: int = 0, instruction: str | None = None
) -> Iterator[dict]:
    """Yields the triplets of one source with the columns of `TRIPLET_FEATURES`, scores and class where there are any.

    Logs at the end how many negatives are missing.

    Args:
        instruction: for triplets to which neither the recipe's entry nor the row gives one.

    Raises:
        ValueError: the path does not exist, the source gives no triplets, or one has no instruction from anywhere.
    """
    check_exists(source)
    pairs = KINDS[kind_of(source)].load(source, num_negatives, seed)
    mined = mine_negatives(pairs, num_negatives, seed, name=source.path)
    rows = ragged = missing = 0
    for triplet in described(mined, source, instruction):
        lacking = max(0, num_negatives - len(triplet["negatives"]))
        rows += 1
        ragged += lacking > 0
        missing += lacking
        yield triplet
    if missing:
        logger.warning(
            f"{source.path}: {ragged} of {rows} triplets have fewer than num_negatives = {num_negatives} negatives; "
            f"{missing} of {rows * num_negatives} places stay empty"
        )
    if not rows:
        raise ValueError(f"{source.path}: split {source.split!r} gave no triplets; add rows, or leave it out")


def described(rows: Iterable[dict], source: DatasetSource, instruction: str | None) -> Iterator[dict]:
    """Yields the rows with `dataset`, `instruction` and `symmetric`: the entry's, else the row's own, else the usual.

    Raises:
        ValueError: a row has no instruction from anywhere.
    """
    usual = {"dataset": source.name, "instruction": instruction, "symmetric": KINDS[kind_of(source)].symmetric}
    asked = {"instruction": source.instruction, "symmetric": source.symmetric}  # a recipe outranks the file
    asked = {column: value for column, value in asked.items() if value is not None}
    for row in rows:
        row = {**usual, **row, **asked}
        if row["instruction"] is None:
            raise ValueError(
                f"{source.path} has no instruction, which every query carries (paper section 3.1): set `instruction:` "
                'in its entry, or one for all; "" is for none'
            )
        yield row


OPEN = "\0open"  # an instruction that no row has


def leave_instruction_open(triplet: dict) -> dict:
    """A triplet without the column if it is `OPEN`: "" in a file would mean none, and training could not give one."""
    return {key: value for key, value in triplet.items() if (key, value) != ("instruction", OPEN)}


# --- Writing and reading


def write_tables(
    folder: Path,
    sources: Sequence[DatasetSource],
    num_negatives: int,
    seed: int,
    instruction: str | None,
    checkpoints: Sequence[Path] = (),
) -> None:
    """Writes one Arrow file per source into `folder`, unless its tables were made from the same data and settings.

    Args:
        checkpoints: the training checkpoints made with the tables in `folder`, in order; with any, the tables are not
            replaced.

    Raises:
        ValueError: as `iterate_triplets`; there are checkpoints, and their tables were made from something else.
    """
    settings = {"num_negatives": num_negatives, "seed": seed, "instruction": instruction}
    made_of = settings | {"datasets": [provenance(source) for source in sources]}
    before = read_provenance(folder)
    if before == made_of and (checkpoints or have_all_columns(folder)):
        return
    if before is not None and checkpoints:
        raise ValueError(
            f"{checkpoints[-1]} was trained on other data: {first_difference(before, made_of)}; give what it began "
            "with, or name another --output_dir"
        )
    if checkpoints:
        logger.warning(f"{folder} is gone, so whether {checkpoints[-1].name} was trained on this data is not known")
    with whole(folder) as partial:
        partial.mkdir()
        for index, source in enumerate(sources):
            write_table(partial / table_name(index), iterate_triplets(source, num_negatives, seed, instruction))
        (partial / MADE_OF).write_text(json.dumps(made_of, indent=1))


def have_all_columns(folder: Path) -> bool:
    """Whether the tables have the columns of today; those of earlier versions are made anew, unless a run has begun."""
    return all(
        TRIPLET_FEATURES.keys() <= {*Dataset.from_file(str(table)).column_names} for table in folder.glob("*.arrow")
    )


def table_name(index: int) -> str:
    return f"{index:03}.arrow"


def write_table(path: Path, triplets: Iterable[dict]) -> None:
    """Writes triplets to an Arrow file that `Dataset.from_file` reads, a thousand in memory at a time."""
    schema = TRIPLET_FEATURES.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        triplets = iter(triplets)
        while rows := list(islice(triplets, 1000)):
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def write_jsonl(path: Path, triplets: Iterable[dict]) -> int:
    """Writes triplets to a JSON Lines file and returns how many.

    Raises:
        FileExistsError: the file exists; nothing is mined then.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; name another --output or remove it")
    lines = 0
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for triplet in triplets:
            file.write(json.dumps(triplet, ensure_ascii=False) + "\n")
            lines += 1
    return lines


def read_tables(folder: Path, sources: Sequence[DatasetSource]) -> list[Dataset]:
    """The tables of `write_tables`, memory-mapped.

    Raises:
        FileNotFoundError: a table is not on this machine's disk.
    """
    tables = []
    for index in range(len(sources)):
        path = folder / table_name(index)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is absent on {socket.gethostname()}, though the main process has written it: output_dir must "
                "be on a disk that all machines share"
            )
        tables.append(Dataset.from_file(str(path)))
    return tables


def check_have_negatives(
    table: Dataset, source: DatasetSource, num_negatives: int, in_batch_negatives: bool | str, rows: float
) -> None:
    """That a data set has negatives, or its rows get some from their batch; else their loss would always be 0.

    Args:
        num_negatives: how many of its negatives a row brings.
        rows: of those that in-batch negatives come from, how many a batch has on average.

    Raises:
        ValueError: they have none.
    """
    if num_negatives and pc.sum(pc.list_value_length(table.data.column("negatives"))).as_py():
        return
    reason = why_without_negatives(table, source, in_batch_negatives, rows)
    if reason is not None:
        raise ValueError(
            f"{source.path}: {'' if num_negatives else 'num_negatives is 0, so '}none of its {len(table)} triplets has "
            f"a negative, and rows get none from their batch ({reason}), so nothing would be learned from it: "
            f"{'' if num_negatives else 'raise num_negatives, '}give it negatives, leave them out of the file to have "
            "them mined, or drop the set"
        )
    column = told_apart_by(table, source, in_batch_negatives)
    if column == "class" and (unknown := table.data.column(column).null_count):
        logger.warning(
            f"{source.path}: {unknown} of {len(table)} triplets have no class or several, so they get no negative and "
            "nothing is learned from them"
        )


def why_without_negatives(
    table: Dataset, source: DatasetSource, in_batch_negatives: bool | str, rows: float
) -> str | None:
    """Why no row of a set gets a negative from its batch; None: some do. Arguments as of `check_have_negatives`."""
    if not in_batch_negatives:
        return "in_batch_negatives is off"
    if in_batch_negatives is True:
        return "a batch has one row" if rows < 2 else None
    column = told_apart_by(table, source, in_batch_negatives)
    if column is None:
        way_out = ": sets would do" if in_batch_negatives == "labels" else ""
        return f"in_batch_negatives is {in_batch_negatives}, and the set has no classes{way_out}"
    if pc.count_distinct(table.data.column(column)).as_py() < 2:
        return f"all have one {column}"
    return f"a batch has {rows:.3g} rows of the set" if rows < 2 else None


def told_apart_by(table: Dataset, source: DatasetSource, in_batch_negatives: bool | str) -> str | None:
    """The column whose values tell that rows of a set are negatives of each other; None: nothing does, or all are."""
    if in_batch_negatives == "sets" and are_told_apart_by_positives(table, source):
        return "positive"
    return "class" if in_batch_negatives in ("labels", "sets") and have_classes(table) else None


def have_classes(table: Dataset) -> bool:
    """Whether any triplet has a class; tables of earlier versions have no such column."""
    return "class" in table.column_names and table.data.column("class").null_count < len(table)


def are_told_apart_by_positives(table: Dataset, source: DatasetSource) -> bool:
    """Whether rows of other positives are sure negatives: not of labelled texts, which may have a label in common."""
    is_labelled = source.kind in LABELLED or source.label_separator is not None
    return not (is_labelled or have_classes(table))


def with_positives_as_classes(table: Dataset) -> Dataset:
    """A table without classes, with each row's positive as its class: rows of one positive are of one class."""
    return table.with_transform(_positives_as_classes)


def _positives_as_classes(batch: dict[str, list]) -> dict[str, list]:
    return batch | {"class": batch["positive"]}


def check_apart(tables: Sequence[Dataset]) -> None:
    """Raises a `ValueError` if tables with classes and without have rows of one data set (a column `dataset`)."""
    names = {True: set(), False: set()}
    for table in tables:
        names[have_classes(table)] |= {*pc.unique(table.data.column("dataset")).to_pylist()}
    if both := names[True] & names[False]:
        raise ValueError(
            f"in_batch_negatives is sets, and of the data set {min(both)!r} some files have classes and others none, "
            "which would be taken for other classes: give all of them a column `class`, or other names of `dataset`"
        )


def check_have_classes(tables: Sequence[Dataset]) -> None:
    """Raises a `ValueError` if no triplet of any table has a class."""
    if not any(map(have_classes, tables)):
        raise ValueError(
            "in_batch_negatives is labels and none of the triplets has a class (data of kind classification, "
            "clustering or label_classification, or triplets with a column `class`; a run begun by an earlier version "
            "has none), so nothing would be taken from the batch: set it to false"
        )


def check_have_scores(tables: Sequence[Dataset]) -> None:
    """Raises a `ValueError` if no triplet of any table has a teacher's scores of its positive and its negatives."""
    columns = [
        [table.data.column(name).is_valid() for name in ("positive_score", "negative_scores")] for table in tables
    ]
    if not any(pc.any(pc.and_(*pair)).as_py() for pair in columns):
        raise ValueError(
            "false_negative_margin leaves out in-batch negatives, which are off, and hard negatives by their teacher's "
            "scores, which no triplet has: leave it out, or mine the negatives with a teacher"
        )


# --- What tables were made of


def read_provenance(folder: Path) -> dict | None:
    """The settings, sources and digests that the tables in `folder` were made from; None without tables."""
    file = folder / MADE_OF
    return json.loads(file.read_text()) if file.is_file() else None


def provenance(source: DatasetSource) -> dict:
    """What a source's table is made from: its entry and the SHA-256 of each local file, but not the files' location."""
    if is_nemotron(source):
        files = sorted(path for path in Path(source.path, source.config or "").iterdir() if path.is_file())
    elif source.kind == "retrieval" or (source.kind is None and is_beir(source)):
        files = [Path(source.path, name) for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{source.split}.tsv")]
    else:
        files = find_files(source)
    digests = {file.name: sha256(file) for file in files if file.is_file()}
    entry = {name: value for name, value in asdict(source).items() if value is not None or name not in NEWER}
    return entry | {"path": None if digests else source.path, "files": digests}


def _difference(key: str, was: object, is_: object) -> str:
    """Of mappings, the first value that differs."""
    if isinstance(was, dict) and isinstance(is_, dict):
        part = next(part for part in {**is_, **was} if was.get(part) != is_.get(part))
        return _difference(f"{key}.{part}", was.get(part), is_.get(part))
    return f"{key} was {was!r} and is {is_!r}"


def first_difference(before: dict, now: dict) -> str:
    """The first setting or file in which the provenance of two folders of tables differs."""
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
                return name + _difference(key, was.get(key), value)
    return "an earlier version of nvembed made it"
