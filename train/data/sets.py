"""The paper's sets by name: `paper.yaml` as data, and a recipe's `{set: msmarco}` as a `DatasetSource`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from nvembed.eval.markdown_table import markdown_table
from nvembed.eval.tasks.instructions import find_instruction
from nvembed.eval.tasks.lookup import check_task_names
from nvembed.train.data import source
from nvembed.train.data.source import DatasetSource, check_keys


FILE = Path(__file__).with_name("paper.yaml")

# What an entry says to training; the rest is about the set.
OF_SOURCE = (
    "path", "kind", "split", "instruction", "symmetric", "samples", "config", "columns", "label_separator", "mteb",
    "decontaminate",
)  # fmt: skip


@dataclass(frozen=True)
class KnownSet:
    """An entry of `paper.yaml`; see there for its fields."""

    name: str
    kind: str
    license: str
    path: str | None = None
    config: str | None = None
    split: str = "train"
    columns: dict[str, str | list[str]] | None = None
    label_separator: str | None = None
    instruction: str | None = None
    symmetric: bool | None = None
    samples: int | None = None
    mteb: list[str] | None = None
    decontaminate: dict | None = None
    checked: str | None = None
    note: str | None = None

    def __post_init__(self):
        if self.path is None and self.note is None:
            raise ValueError(f"{FILE.name}: {self.name} has neither a path nor a note on what to give instead")
        if self.instruction is None and self.mteb:
            found = find_instruction(self.mteb[0], "STS" if self.kind == "sts" else "")
            object.__setattr__(self, "instruction", None if found is None else found.query)


@cache
def known_sets(file: Path = FILE) -> Mapping[str, KnownSet]:
    """All sets of a registry by name.

    Raises:
        ValueError: an entry lacks a field or has an unknown one.
    """
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name, entry in entries.items():
        check_keys(entry, KnownSet, f"{file.name}: {name}")
        if missing := sorted({"kind", "license"} - entry.keys()):
            raise ValueError(f"{file.name}: {name} has no {missing[0]}")
    return {name: KnownSet(name, **entry) for name, entry in entries.items()}


def find_set(name: object) -> KnownSet:
    """Raises a `ValueError` if there is no set of this name."""
    if name not in known_sets():
        raise ValueError(f"datasets: there is no set {name!r}; the sets are {', '.join(known_sets())}")
    return known_sets()[name]


def as_source(entry: DatasetSource | dict | str, data_dir: str | None = None) -> DatasetSource:
    """A recipe's entry as a `DatasetSource`; keys beside `set` override what `paper.yaml` says.

    Args:
        data_dir: a folder that `build_data.py` wrote: sets are read from there, as they were built, and may be sets of
            one's own.

    Raises:
        ValueError: as `source.as_source`; the set does not exist, or has no public source; `mteb` names no task of it.
    """
    if isinstance(entry, dict) and isinstance(entry.get("mteb"), list):
        check_task_names(map(str, entry["mteb"]), f"datasets: mteb of {entry.get('path') or entry.get('set')}")
    if not isinstance(entry, dict) or "set" not in entry or entry.get("set") is None:
        return source.as_source(entry)
    if data_dir is not None and "path" not in entry and (own := own_set(entry, data_dir)) is not None:
        return own
    known = find_set(entry["set"])
    given = {"name": known.name} | entry
    if data_dir is not None and "path" not in entry:
        folder = str(Path(data_dir, given["name"]))
        return source.as_source({"path": folder, "kind": "triplets", "mteb": known.mteb} | given)
    told = {name: getattr(known, name) for name in OF_SOURCE if getattr(known, name) is not None}
    if "path" not in told | given:
        raise ValueError(
            f"datasets: the set {known.name!r} has no public source that can be read: {known.note}, as "
            f"{{set: {known.name}, path: ...}}"
        )
    if "path" in entry and "kind" not in entry:
        for name in ("kind", "config", "columns", "label_separator"):
            told.pop(name, None)  # a file of one's own may be in another layout
    if "path" in entry and Path(str(entry["path"])).is_file():
        told.pop("split", None)  # and is read whole
    return source.as_source(told | given)


def own_set(entry: dict, data_dir: str) -> DatasetSource | None:
    """A set that was built in `data_dir` and is none of the paper's; None if it is one of them.

    Raises:
        ValueError: it is neither the paper's nor in `data_dir`.
    """
    name = entry["set"]
    if name in known_sets():
        return None
    folder = Path(data_dir, str(name))
    if not folder.is_dir():
        built = ", ".join(sorted(path.parent.name for path in Path(data_dir).glob("*/*.parquet"))) or "none"
        raise ValueError(
            f"datasets: the set {name!r} is neither in data_dir {data_dir}, which has {built}, nor one "
            f"of the paper's: {', '.join(known_sets())}"
        )
    rest = {key: value for key, value in entry.items() if key != "set"}
    return source.as_source({"path": str(folder), "kind": "triplets", "name": str(name)} | rest)


def list_sets() -> str:
    """The table of all sets in Markdown."""
    rows = [["set", "source", "kind", "samples", "license", "checked", "decontaminated against"]]
    for known in known_sets().values():
        place = known.path or f"none: {known.note}"
        against = ", ".join((known.decontaminate or {}).get("against", [])) or "-"
        samples = "all" if known.samples is None else f"{known.samples:,}"
        config = f" ({known.config})" if known.config else ""
        rows.append([known.name, place + config, known.kind, samples, known.license, known.checked or "no", against])
    return markdown_table(rows, len(rows[0]))
