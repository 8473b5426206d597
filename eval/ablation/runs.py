"""What a grid asks for: commands of the project's scripts, one after the other, that make a checkpoint to measure."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path


STEPS = ("init", "stage1", "stage2", "distill", "center")
Table = dict[str, dict[str, dict[str, float]]]  # cell -> seed -> task -> score in percent


@dataclass(frozen=True)
class Step:
    """One command of a run; runs that begin alike share their first steps.

    Args:
        name: one of `STEPS`.
        options: the script's, but for the folders.
        recipe: file that holds the others; None: there is none.
        settings: digest of what the recipe sets for this step (`grid_file.settings_digest`), "" without one.
        before: the step whose checkpoint it begins with; None: it begins anew, or with the grid's `start`.
    """

    name: str
    options: tuple[str, ...]
    recipe: Path | None
    settings: str
    before: "Step | None"

    @property
    def key(self) -> str:
        """Of its folder: the step's name and a digest of all that leads to it."""
        parts = [self.name, *self.options, self.settings, "" if self.before is None else self.before.key]
        return f"{self.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]}"

    @property
    def chain(self) -> list["Step"]:
        """The steps from the first to this one."""
        return [*(self.before.chain if self.before is not None else ()), self]


@dataclass(frozen=True)
class Run:
    """One training of one cell.

    Args:
        cell: axis -> the name of its value.
        last: the step whose checkpoint is measured.
        tasks: names of the tasks that it is measured on; none: all of the grid's.
    """

    cell: tuple[tuple[str, str], ...]
    seed: int
    last: Step
    tasks: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Of its scores."""
        return ":".join([self.last.key, *self.tasks])


def spell(name: str, value: object) -> list[str]:
    """An option as on the command line."""
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(str(value).lower() if isinstance(value, bool) else str(value) for value in values)]


def cell_name(cell: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(value for _, value in cell)
