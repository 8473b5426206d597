"""A grid of trainings: a base recipe, axes of overrides, seeds; as YAML, and as the runs that it asks for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import combinations, product
from pathlib import Path

import yaml

from nvembed.eval.ablation.grid_file import (
    as_list,
    find_file,
    find_grid,
    listed,
    mapping,
    read_content,
    settings_digest,
)
from nvembed.eval.ablation.runs import STEPS, Run, Step, cell_name, spell
from nvembed.eval.commands import SCRIPTS, is_training, known_options, recipe_settings


WITHOUT_RECIPE = ("init",)
OWN_OPTIONS = ("seed", "output_dir", "model_name_or_path", "config", "resume_from_checkpoint")
FIXED_START = ("init", "seed")  # may be set all the same: every seed then begins with the same new weights
MEASURE, MERGED = "measure", "merged"  # what takes time beside the steps
RESERVED = ("recipe", "steps")  # keys of an axis's value beside the steps
OWN = "its own set"  # in place of what a zero-shot grid leaves out: for each task, its own training split


@dataclass(frozen=True)
class Claim:
    """Something to test: cells of one value of an axis score higher than those of another.

    Args:
        text: in words.
        better, worse: axis -> value; cells that differ in nothing else are compared.
        score: "average", or the name of a task.
    """

    text: str
    better: Mapping[str, str]
    worse: Mapping[str, str]
    score: str = "average"


@dataclass
class Grid:
    """A grid as its YAML file has it; see `eval/ablations/`.

    A file's `like` names another grid, whose settings (`SETTINGS`) are the defaults of this one's.

    Args:
        file: the YAML file; relative paths of recipes and tasks start at its folder where they exist there.
        title, caption: of the page's section: what is compared, and how to read the table.
        recipe: of the trainings, unless a value of an axis names another.
        steps: what makes a checkpoint, in order, of `STEPS`, unless a value of an axis has others.
        axes: axis -> value -> what the value changes: step -> options, and maybe `recipe` and `steps`.
        tasks: files of local tasks, or names of mteb's, that every checkpoint is measured on.
        seeds: each cell is trained once with each.
        start: the checkpoint, or base, that the first step takes, in place of a step `init`.
        options: step -> options of every run.
        max_length, dtype: of measuring, as run_mteb.py has them.
        minutes: step -> how long it takes, for the estimate; `measure` and `merged` among them.
        paper: cell, as "value, value" -> the paper's score.
        claims: what to test.
        merge_seeds: measure the mean of each cell's seeds, too (train/merge.py).
        zero_shot: axis -> value -> the tasks whose own training splits it leaves out, and which alone it is measured
            on; all values of the axis but one, which leaves out nothing.
    """

    file: Path
    title: str
    recipe: Path
    steps: list[str]
    axes: dict[str, dict[str, dict]]
    tasks: list[str]
    seeds: list[int]
    caption: str = ""
    start: str | None = None
    options: dict[str, dict] = field(default_factory=dict)
    max_length: int = 512
    dtype: str = "auto"
    minutes: dict[str, float] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    merge_seeds: bool = False
    zero_shot: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    inherited: set[str] = field(default_factory=set, repr=False)  # steps with options of the grid that `like` names
    digests: dict[tuple[Path, str], str] = field(default_factory=dict, repr=False)  # of settings, as they were read

    @classmethod
    def read(cls, path: str) -> "Grid":
        """
        Raises:
            ValueError: the file cannot be read, lacks a key or has an unknown one; an axis has no values, or a value
                changes something unknown; two axes set one option; a claim or a score of the paper is of no cell.
        """
        file = find_grid(path)
        content = read_content(file)
        for key in ("title", "recipe", "axes", "tasks"):
            if key not in content:
                raise ValueError(f"{file} lacks {key}; see eval/ablations/ for grids")
        content["axes"] = {
            str(axis): {str(name): change or {} for name, change in mapping(values, f"{file}: axis {axis}").items()}
            for axis, values in mapping(content["axes"], f"{file}: axes").items()
        }
        content["zero_shot"] = {
            str(axis): {str(name): as_list(tasks) for name, tasks in mapping(of, f"{file}: zero_shot: {axis}").items()}
            for axis, of in mapping(content.get("zero_shot", {}), f"{file}: zero_shot").items()
        }
        content["claims"] = [read_claim(file, claim) for claim in as_list(content.get("claims"))]
        paper = mapping(content.get("paper", {}), f"{file}: paper")
        content["paper"] = {str(cell): score for cell, score in paper.items()}
        content["minutes"] = mapping(content.get("minutes", {}), f"{file}: minutes")
        content.setdefault("steps", ["init", "stage1", "stage2"])
        content.setdefault("seeds", [42, 43, 44])
        grid = cls(file, **content)
        grid.check()
        return grid

    def check(self) -> None:
        """Raises the `ValueError`s of `read` that concern what it holds."""
        check_seeds(self.seeds)
        for axis, values in self.axes.items():
            if not values:
                raise ValueError(f"{self.file}: axis {axis} has no values; map their names to what each changes")
            for name, change in values.items():
                self._check_change(f"{axis}: {name}", mapping(change, f"{self.file}: {axis}: {name}"))
        self._check_change("options", self.options)
        for (one, first), (other, second) in combinations(self.axes.items(), 2):
            both = {name for change in first.values() for name in set_by(change)}
            if shared := both & {name for change in second.values() for name in set_by(change)}:
                raise ValueError(f"{self.file}: axes {one} and {other} both set {min(shared)}; let one of them set it")
        names = [cell_name(cell) for cell in self.cells()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{self.file}: two cells are called {twice[0]!r}; give their values other names")
        for cell in self.cells():
            self._check_cell(cell)
        run = {step for cell in self.cells() for step in self._steps(cell)}
        for axis, values in self.axes.items():
            for value, change in values.items():
                # Another axis may leave a step out: what sets its options is idle only where no cell has the step.
                steps = {step for cell in self.cells() if (axis, value) in cell for step in self._steps(cell)}
                if idle := change.keys() - {*RESERVED, *steps}:
                    raise ValueError(
                        f"{self.file}: {axis}: {value} sets options of {min(idle)}, which no cell with this value runs"
                    )
        if idle := self.options.keys() - run - self.inherited:
            raise ValueError(f"{self.file}: options are set of {min(idle)}, which no run has: leave them out")
        first_of: dict[tuple[str, ...], str] = {}  # by the keys of a cell's last steps
        for name, cell in zip(names, self.cells(), strict=True):
            keys = tuple(self._last_step(cell, seed).key for seed in self.seeds)
            if (same := first_of.setdefault(keys, name)) != name:
                raise ValueError(f"{self.file}: {name} is the same run as {same}; leave one of them out")
        if unknown := self.minutes.keys() - {*STEPS, MEASURE, MERGED}:
            known = ", ".join((*STEPS, MEASURE, MERGED))
            raise ValueError(f"{self.file}: minutes are given of {min(unknown)!r}; they can be of {known}")
        for name, figures in (("minutes", self.minutes), ("paper", self.paper)):
            if wrong := [key for key, value in figures.items() if type(value) not in (int, float)]:
                raise ValueError(f"{self.file}: {name}: {wrong[0]} is {figures[wrong[0]]!r}; it must be a number")
        if unknown := self.paper.keys() - {*names}:
            raise ValueError(f"{self.file}: paper has {min(unknown)!r}, which is no cell; cells are {listed(names)}")
        if self.zero_shot:
            self._check_zero_shot()
        values, scores = self.claimable(), known_scores(self.tasks)
        if left_out := self.zero_shot_tasks():
            for task in left_out:
                if scores and task not in scores - {"average"}:
                    raise ValueError(f"{self.file}: zero_shot names {task!r}; the tasks are {listed(scores)}")
            scores = {*left_out, "average"}
        for claim in self.claims:
            if scores and claim.score not in scores:
                raise ValueError(f"{self.file} names the score {claim.score!r}; the tasks give {listed(scores)}")
            for axis, value in [*claim.better.items(), *claim.worse.items()]:
                if value not in values.get(axis, ()):
                    raise ValueError(
                        f"{self.file}: claim {claim.text!r} names {axis}: {value}, which is no value to compare; "
                        f"these are {listed(values.get(axis, values))}"
                    )
            if claim.better.keys() != claim.worse.keys() or claim.better == claim.worse:
                raise ValueError(
                    f"{self.file}: claim {claim.text!r} must name other values of the same axes as better and worse"
                )

    def _check_zero_shot(self) -> None:
        """That one axis leaves out sets: each of its values some, for tasks of its own, and one value none."""
        if len(self.zero_shot) > 1 or self.zero_shot.keys() - self.axes.keys():
            named = listed(self.zero_shot)
            raise ValueError(f"{self.file}: zero_shot must name one axis, of {listed(self.axes)}; not {named}")
        ((axis, tasks_of),) = self.zero_shot.items()
        for value, change in self.axes[axis].items():
            leaves_out = any("leave_out" in options for step, options in change.items() if step in STEPS)
            if leaves_out != bool(tasks_of.get(value)):
                raise ValueError(
                    f"{self.file}: {axis}: {value} must leave out a set (leave_out) and name its tasks under "
                    "zero_shot, or do neither"
                )
        if unknown := tasks_of.keys() - self.axes[axis].keys():
            raise ValueError(f"{self.file}: zero_shot has {min(unknown)!r}; {axis} has {listed(self.axes[axis])}")
        if len(self.axes[axis]) != len(tasks_of) + 1:
            raise ValueError(f"{self.file}: {axis} must have one value that leaves out nothing")
        tasks = self.zero_shot_tasks()
        if twice := [task for task in tasks if tasks.count(task) > 1]:
            raise ValueError(f"{self.file}: zero_shot names {twice[0]!r} twice")
        for name in ("paper", "merge_seeds"):
            if getattr(self, name):
                raise ValueError(f"{self.file}: {name} cannot stand beside zero_shot")

    def zero_shot_tasks(self) -> list[str]:
        """The tasks whose own training splits some runs leave out."""
        return [task for tasks_of in self.zero_shot.values() for tasks in tasks_of.values() for task in tasks]

    def claimable(self) -> dict[str, list[str]]:
        """The values of each axis as the page has them; of the one that leaves sets out, nothing and `OWN`."""
        values = {axis: [*values] for axis, values in self.axes.items()}
        for axis, tasks_of in self.zero_shot.items():
            values[axis] = [value for value in values[axis] if value not in tasks_of] + [OWN]
        return values

    def _check_change(self, where: str, change: Mapping) -> None:
        for key, options in change.items():
            if key not in STEPS and (key not in RESERVED or where == "options"):
                raise ValueError(
                    f"{self.file}: {where} changes {key!r}; it must be a step ({', '.join(STEPS)}), with its "
                    f"options, or, of an axis's value, {' or '.join(RESERVED)}"
                )
            if key in STEPS:
                for name, value in mapping(options, f"{self.file}: {where}: {key}").items():
                    if name in OWN_OPTIONS and (key, name) != FIXED_START:
                        raise ValueError(f"{self.file}: {where}: {key} sets {name}, which the grid sets itself")
                    if value is None or value == [] or isinstance(value, dict):
                        raise ValueError(f"{self.file}: {where}: {key}: {name} is {value!r}, which no command line has")

    def _check_cell(self, cell: tuple[tuple[str, str], ...]) -> None:
        """That its steps exist, and begin as those of a run do."""
        steps = self._steps(cell)
        if not isinstance(steps, list) or not steps:
            raise ValueError(f"{self.file}: steps is {steps!r}; it must be a list of some of {', '.join(STEPS)}")
        if unknown := [step for step in steps if step not in STEPS]:
            raise ValueError(f"{self.file}: there is no step {unknown[0]!r}; the steps are {', '.join(STEPS)}")
        if "init" in steps[1:]:
            raise ValueError(
                f"{self.file}: the steps are {', '.join(steps)}; init must be the first, for it begins anew"
            )
        if self.start is not None and "init" in steps:
            raise ValueError(f"{self.file}: start is {self.start}, and the steps begin with init: leave one out")
        changes = [self.options, *(self.axes[axis][value] for axis, value in cell)]
        if steps == ["init"] and len(self.seeds) > 1 and any("seed" in change.get("init", ()) for change in changes):
            raise ValueError(f"{self.file}: init alone, of one seed, is the same for all seeds: leave its seed out")

    def _steps(self, cell: tuple[tuple[str, str], ...]) -> list[str]:
        changes = (self.axes[axis][value] for axis, value in cell)
        return next((change["steps"] for change in changes if "steps" in change), self.steps)

    def _left_out(self, cell: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
        """The tasks whose own training splits a cell leaves out; of a grid that is not zero-shot, none."""
        return tuple(task for axis, value in cell for task in self.zero_shot.get(axis, {}).get(value, ()))

    def train_on_gpu(self) -> None:
        """Overrules `use_cpu`, which recipes for a CPU set, in every training of every run.

        Raises:
            ValueError: an axis sets it, or no run trains.
        """
        steps = {step for cell in self.cells() for step in self._steps(cell) if is_training(SCRIPTS[step])}
        if not steps:
            raise ValueError(f"{self.file}: --use_gpu is for trainings, and no run has one: leave it out")
        for axis, values in self.axes.items():
            if any(name.endswith(".use_cpu") for change in values.values() for name in set_by(change)):
                raise ValueError(f"{self.file}: axis {axis} sets use_cpu: leave it, or --use_gpu, out")
        for step in steps:
            self.options[step] = self.options.get(step, {}) | {"use_cpu": False}

    def changes(self) -> Iterator[dict]:
        for values in self.axes.values():
            yield from values.values()

    def cells(self) -> list[tuple[tuple[str, str], ...]]:
        return [tuple(zip(self.axes, values)) for values in product(*self.axes.values())]

    def runs(self) -> list[Run]:
        """Every cell of the first seed, then of the next: a grid that is stopped early has compared something."""
        return [
            Run(cell, seed, self._last_step(cell, seed), self._left_out(cell))
            for seed in self.seeds
            for cell in self.cells()
        ]

    def _last_step(self, cell: tuple[tuple[str, str], ...], seed: int) -> Step:
        changes = [self.axes[axis][value] for axis, value in cell]
        recipe, last = self.recipe, None
        for change in changes:
            recipe = find_file(self.file, change["recipe"]) if "recipe" in change else recipe
        for step in self._steps(cell):
            options = {"seed": seed} | self.options.get(step, {})
            for change in changes:
                options |= change.get(step, {})
            spelled = tuple(part for name, value in options.items() for part in spell(name, value))
            if step in WITHOUT_RECIPE:
                last = Step(step, spelled, None, "", last)
            else:
                last = Step(step, spelled, recipe, self._settings(recipe, step), last)
        return last

    def _settings(self, recipe: Path, step: str) -> str:
        """The digest of what a recipe set for a step when it was first read, so that keys stay what they are."""
        if (recipe, step) not in self.digests:
            self.digests[recipe, step] = settings_digest(recipe, step)
        return self.digests[recipe, step]


def read_claim(file: Path, entry: object) -> Claim:
    known = [field.name for field in fields(Claim)]
    content = mapping(entry, f"{file}: a claim")
    if content.keys() - {*known} or {"text", "better", "worse"} - content.keys():
        raise ValueError(f"{file}: claim {entry!r} must have text, better, worse, and maybe score")
    for side in ("better", "worse"):
        values = mapping(content[side], f"{file}: claim {content['text']!r}: {side}")
        content = content | {side: {str(axis): str(value) for axis, value in values.items()}}
    return Claim(**content)


def known_scores(tasks: list[str]) -> set[str]:
    """The names of the scores that tasks give, and "average"; nothing if some are mteb's, whose names come later."""
    names = {"average"}
    for task in tasks:
        if not Path(task).is_file():
            return set()
        content = yaml.safe_load(Path(task).read_text(encoding="utf-8"))
        entries = as_list(content.get("tasks")) if isinstance(content, dict) else []
        if not entries or not all(isinstance(entry, dict) and "path" in entry for entry in entries):
            raise ValueError(f"{task} must have a list `tasks:`, each with a path; see eval/tasks/local.py")
        names |= {entry.get("name") or Path(entry["path"]).name for entry in entries}
    return names


def check_seeds(seeds: object) -> None:
    """Raises a `ValueError` unless they are different numbers: a seed twice would be one training twice."""
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"seeds is {seeds!r}; it must be a list of numbers")
    if len({*seeds}) < len(seeds):
        raise ValueError(f"seeds is {seeds}; each must be another")


def set_by(change: Mapping) -> set[str]:
    """What an axis's value sets, such as "stage1.temperature"."""
    options = {f"{step}.{name}" for step in change.keys() - RESERVED for name in change[step]}
    return options | (change.keys() & RESERVED)


def check_options(grid: Grid) -> None:
    """Asks every script of the grid which options it knows.

    Raises:
        ValueError: it does not know one, of the grid or of a recipe; a recipe has sections for other steps and none for
            this one.
    """
    asked: dict[str, dict[str, Path]] = {}  # step -> option -> the file that sets it
    for source in (grid.options, *grid.changes()):
        for step in source.keys() - RESERVED:
            asked.setdefault(step, {}).update(dict.fromkeys(source[step], grid.file))
    for recipe, step in {(step.recipe, step.name) for run in grid.runs() for step in run.last.chain} - {(None, "init")}:
        settings = recipe_settings(recipe, step).keys() - {"env"}  # which trl takes from any recipe
        asked.setdefault(step, {}).update(dict.fromkeys(settings, recipe))
    for step, names in asked.items():
        if unknown := names.keys() - known_options(SCRIPTS[step]):
            name = min(unknown)
            raise ValueError(f"{names[name]}: {SCRIPTS[step]} has no option {name!r}; see its --help")
