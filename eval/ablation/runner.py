"""Runs a grid's commands, several at a time, and keeps every result as it comes."""

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

import torch

from nvembed.eval.ablation.grid import SCRIPTS, Grid, Run, Step, cell_name, code_digest, data_of
from nvembed.eval.commands import TRAININGS, make_checkpoint, score
from nvembed.eval.files import sha256, write_json
from nvembed.eval.models import digest_model


STATE = "grid.json"
MERGED = "merged"  # in place of a seed
FAILURES = (subprocess.CalledProcessError, ValueError, OSError)  # of a run, which do not end the others
MEASURING = ":scores"  # behind the key of the step that is measured


@dataclass
class Results:
    """What a grid has given so far, as `grid.json` keeps it.

    Args:
        made_of: recipes, data and tasks; results of others are not mixed in.
        scores: cell -> seed, as text, or "merged" -> task -> score in percent, "average" among them.
        failed: cell -> seed -> why.
        seconds: folder of a step, or of a measurement -> how long it took.
        code: folder of a step, or of a measurement -> digest of the code that made it.
    """

    made_of: dict
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)

    def missing(self, grid: Grid) -> list[Run]:
        """The runs without scores."""
        return [run for run in grid.runs() if str(run.seed) not in self.scores.get(cell_name(run.cell), {})]

    def save(self, folder: Path) -> None:
        write_json(folder / STATE, self.__dict__)


def open_results(grid: Grid, folder: Path, mix_revisions: bool) -> Results:
    """The results of a grid in `folder`, from earlier runs if there are any.

    Raises:
        ValueError: they were made from other data, recipes or tasks, or, without `mix_revisions`, by other code.
    """
    recipes = {run.last.recipe for run in grid.runs()} | {grid.recipe}
    made_of = {"data": {}, "recipes": {}, "tasks": {}, "max_length": grid.max_length, "dtype": grid.dtype}
    for recipe in sorted(recipe for recipe in recipes if recipe is not None):
        made_of["recipes"][recipe.name] = sha256(recipe)
        made_of["data"] |= data_of(recipe)
    made_of["tasks"] = {Path(task).name: sha256(Path(task)) for task in grid.tasks if Path(task).is_file()}
    if grid.start is not None:
        made_of["start"] = digest_model(Path(grid.start)) if Path(grid.start).is_dir() else grid.start
    file = folder / STATE
    if not file.is_file():
        return Results(made_of)
    results = Results(**json.loads(file.read_text(encoding="utf-8")))
    for name in made_of.keys() | results.made_of.keys():
        was, now = results.made_of.get(name), made_of.get(name)
        if was != now:
            if isinstance(was, dict) and isinstance(now, dict):
                name += f" {next(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))}"
            raise ValueError(f"{folder} has results of other {name}: name another output_dir, or remove this one")
    before = {*results.code.values()}
    if before - {code_digest()} and not mix_revisions:
        raise ValueError(
            f"{folder} has results of other code ({', '.join(sorted(before))}; this is {code_digest()}): name another "
            "output_dir, or say --mix_revisions, and the table will say so, too"
        )
    return results


@dataclass
class Runner:
    """Runs what is missing.

    Args:
        jobs: how many commands at a time: one for each GPU, or a share of the CPU's cores for each.
    """

    grid: Grid
    folder: Path
    results: Results
    jobs: int = 1

    def __post_init__(self):
        self.places: Queue[dict[str, str]] = Queue()
        for environment in environments(self.jobs):
            self.places.put(environment)

    def folder_of(self, step: Step) -> Path:
        return self.folder / "runs" / step.key

    def run(self) -> None:
        """Every step once its base is there, every measurement once its checkpoint is; what fails is kept, too."""
        self.results.failed = {}
        runs = self.results.missing(self.grid)
        done, broken = set(), {}  # keys of steps
        with ThreadPoolExecutor(self.jobs) as pool:
            working = {}
            while runs or working:
                for run in list(runs):
                    if len(working) == self.jobs:
                        break
                    missing = [step for step in run.last.chain if step.key not in done]
                    if blame := next((broken[step.key] for step in missing if step.key in broken), None):
                        self._fail(run, blame)
                        runs.remove(run)
                    elif not missing:
                        runs.remove(run)
                        key = run.last.key + MEASURING
                        working[pool.submit(self._timed, key, self._measure, run)] = run
                        self._claim(key)
                    elif (step := missing[0]).key not in {job.key for job in working.values() if isinstance(job, Step)}:
                        working[pool.submit(self._timed, step.key, self._make, step)] = step
                        self._claim(step.key)
                if not working:
                    continue
                for future in wait(working, return_when=FIRST_COMPLETED).done:
                    job, error = working.pop(future), future.exception()
                    if error is not None and not isinstance(error, FAILURES):
                        raise error
                    if isinstance(job, Step) and error is None:
                        done.add(job.key)
                    elif isinstance(job, Step):
                        broken[job.key] = self._reason(job.key, error)
                    elif error is not None:
                        self._fail(job, self._reason(f"{job.last.key}-scores", error))
                    self.results.save(self.folder)
        if self.grid.merge_seeds:
            self._merge()
        self.results.save(self.folder)

    def _claim(self, key: str) -> None:
        """Notes the code that makes something before it is made: a training that is stopped goes on later."""
        self.results.code.setdefault(key, code_digest())
        self.results.save(self.folder)

    def _timed(self, key: str, work, *arguments) -> None:
        environment, start = self.places.get(), time.perf_counter()
        try:
            is_new = work(*arguments, environment)
        finally:
            self.places.put(environment)
        if is_new:
            self.results.seconds[key] = self.results.seconds.get(key, 0.0) + time.perf_counter() - start

    def _make(self, step: Step, environment: dict[str, str]) -> bool:
        """Whether there was anything to do."""
        folder = self.folder_of(step)
        if (folder / "config.json").is_file():
            return False
        with self._log(step.key) as log:
            options = {"stdout": log, "stderr": log, "env": environment}
            make_checkpoint(folder, SCRIPTS[step.name], self.arguments(step), {}, **options)
        for checkpoint in folder.glob("checkpoint-*"):  # nothing needs them once the merged one is written
            shutil.rmtree(checkpoint)
        return True

    def arguments(self, step: Step) -> list[str]:
        """The script's, but `--output_dir`."""
        arguments = [] if step.recipe is None else ["--config", str(step.recipe)]
        base = self.grid.start if step.before is None else str(self.folder_of(step.before))
        if step.name != "init" and base is not None:
            arguments += ["--model_name_or_path", base]
        return [*arguments, *step.options]

    def commands(self, run: Run) -> list[str]:
        """What one would type to make and measure a run."""
        lines = []
        for step in run.last.chain:
            start = "accelerate launch" if Path(SCRIPTS[step.name]).name in TRAININGS else "python"
            parts = [SCRIPTS[step.name], *self.arguments(step), "--output_dir", str(self.folder_of(step))]
            lines.append(f"{start} {' '.join(parts)}")
        return lines

    def _measure(self, run: Run, environment: dict[str, str]) -> bool:
        self.results.scores.setdefault(cell_name(run.cell), {})[str(run.seed)] = self._score(
            self.folder_of(run.last), run.last.key, environment
        )
        return True

    def _score(self, checkpoint: Path, name: str, environment: dict[str, str]) -> dict[str, float]:
        options = ("--max_length", str(self.grid.max_length), "--dtype", self.grid.dtype)
        with self._log(f"{name}-scores") as log:
            where = {"stdout": log, "stderr": log, "env": environment}
            return score(str(checkpoint), self.grid.tasks, self.folder / "scores" / name, *options, **where)

    def _merge(self) -> None:
        """Measures the mean of each cell's seeds."""
        for cell in self.grid.cells():
            scores = self.results.scores.get(cell_name(cell), {})
            lasts = [run.last for run in self.grid.runs() if run.cell == cell and str(run.seed) in scores]
            if MERGED in scores or len(lasts) < max(2, len(self.grid.seeds)):
                continue
            name = f"{MERGED}-{'-'.join(last.key.split('-')[1][:4] for last in lasts)}"
            environment = self.places.get()
            try:
                with self._log(name) as log:
                    where = {"stdout": log, "stderr": log, "env": environment}
                    models = ["--models", *(str(self.folder_of(last)) for last in lasts)]
                    make_checkpoint(self.folder / "runs" / name, "train/merge.py", models, {}, **where)
                scores[MERGED] = self._score(self.folder / "runs" / name, name, environment)
            except FAILURES as error:
                self.results.failed.setdefault(cell_name(cell), {})[MERGED] = self._reason(name, error)
            finally:
                self.places.put(environment)
            self.results.save(self.folder)

    def _log(self, name: str):
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        return (self.folder / "logs" / f"{name}.log").open("a", encoding="utf-8")

    def _reason(self, name: str, error: Exception) -> str:
        """In one line: the last of a command's log."""
        log = self.folder / "logs" / f"{name}.log"
        if not isinstance(error, subprocess.CalledProcessError) or not log.is_file():
            return str(error)
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if "Error" in line or line.startswith(("stage", "run_mteb", "init", "center"))]
        return f"{(told or lines or ['no output'])[-1].strip()[:300]} ({log})"

    def _fail(self, run: Run, reason: str) -> None:
        self.results.failed.setdefault(cell_name(run.cell), {})[str(run.seed)] = reason


def environments(jobs: int) -> Iterator[dict[str, str]]:
    """The environments of commands that run beside each other: a GPU each, or a share of the cores."""
    cores = max(1, (os.cpu_count() or 1) // jobs)
    for job in range(jobs):
        if torch.cuda.is_available():
            yield os.environ | {"CUDA_VISIBLE_DEVICES": str(job)}
        else:
            yield os.environ | ({"OMP_NUM_THREADS": str(cores)} if jobs > 1 else {})


def check_jobs(jobs: int) -> None:
    """Raises a `ValueError` if there are more jobs than GPUs, or than cores."""
    if torch.cuda.is_available():
        most, of = torch.cuda.device_count(), "GPUs"
    else:
        most, of = os.cpu_count() or 1, "cores"
    if not 1 <= jobs <= most:
        raise ValueError(f"jobs is {jobs}; it must be 1 to {most}, the number of {of}")


def estimate(grid: Grid, results: Results) -> list[tuple[str, int, float | None]]:
    """(Step, how many are missing, minutes of each): by what was measured, else by the grid's `minutes`."""
    runs = results.missing(grid)
    steps = {step.key: step for run in runs for step in run.last.chain if step.key not in results.seconds}
    counts = {"measure": len(runs)}
    for step in steps.values():
        counts[step.name] = counts.get(step.name, 0) + 1
    rows = []
    measured: dict[str, list[float]] = {}
    for key, seconds in results.seconds.items():
        name = "measure" if key.endswith(MEASURING) else key.split("-")[0]
        measured.setdefault(name, []).append(seconds / 60)
    for name in sorted(counts, key=[*SCRIPTS, "measure"].index):
        minutes = statistics.mean(measured[name]) if name in measured else grid.minutes.get(name)
        rows.append((name, counts[name], minutes))
    return rows
