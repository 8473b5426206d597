"""Runs a grid's commands, several at a time, and keeps every result as it comes."""

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

import torch

from nvembed.eval.ablation.grid import MEASURE, MERGED, Grid
from nvembed.eval.ablation.grid_file import settings_digest
from nvembed.eval.ablation.provenance import code_digest, commit, made_of
from nvembed.eval.ablation.runs import STEPS, Run, Step, Table, cell_name
from nvembed.eval.commands import SCRIPTS, as_typed, cores, make_checkpoint, score
from nvembed.eval.files import write_json
from nvembed.eval.training_data import SEEN


STATE = "grid.json"
MEASURING = ":scores"  # behind the key of the step that is measured
FAILED = ":failed"  # behind the key of what was tried in vain
FAILURES = (subprocess.CalledProcessError, ValueError, OSError)  # of a run, which do not end the others
ERROR = re.compile(r"^(\w+(\.\w+)*(Error|Exception|Interrupt)|[a-z_0-9]+(\.py)?): ")  # a line that says what went wrong


@dataclass
class Results:
    """What a grid has given so far, as `grid.json` keeps it.

    Args:
        made_of: recipes, data and tasks (`provenance.made_of`); results of others are not mixed in.
        scores: key of a run, or of a mean of checkpoints -> task -> score in percent, and "average".
        seconds: key of a step, or of a measurement -> how long it took; with `FAILED`, attempts that failed.
        code: key of a step, or of a measurement -> digest of the code that made it; several, with commas, of one that
            went on with other code.
        failed: key of a run, or of a mean of checkpoints -> why it has no scores.
        commits: digest of the code -> the commit that it is of, where there is one.
    """

    made_of: dict
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)

    def missing(self, grid: Grid) -> list[Run]:
        """The runs without scores."""
        return [run for run in grid.runs() if run.key not in self.scores]

    def failures(self, grid: Grid) -> dict[str, str]:
        """Why runs and means have no scores, by name."""
        return {name: self.failed[key] for name, key in named_keys(grid).items() if key in self.failed}

    def by_cell(self, grid: Grid) -> Table:
        """Cell -> seed, as text, or "merged" -> scores, of this grid's cells and seeds."""
        table: Table = {cell_name(cell): {} for cell in grid.cells()}
        for run in grid.runs():
            if run.key in self.scores:
                table[cell_name(run.cell)][str(run.seed)] = self.scores[run.key]
        for name, key in merged_keys(grid).items():
            if key in self.scores:
                table[name][MERGED] = self.scores[key]
        return table

    def save(self, folder: Path) -> None:
        write_json(folder / STATE, self.__dict__)


def lasts_of(grid: Grid) -> dict[str, list[Step]]:
    """The last steps of each cell's runs, a seed each, by the cell's name."""
    lasts: dict[str, list[Step]] = {}
    for run in grid.runs():
        lasts.setdefault(cell_name(run.cell), []).append(run.last)
    return lasts


def merged_keys(grid: Grid) -> dict[str, str]:
    """The keys of the means of each cell's seeds, by the cell's name; none if the grid does not ask for them."""
    if not grid.merge_seeds or len(grid.seeds) < 2:
        return {}
    keys = {name: json.dumps([step.key for step in steps]) for name, steps in lasts_of(grid).items()}
    return {name: f"{MERGED}-{hashlib.sha256(text.encode()).hexdigest()[:10]}" for name, text in keys.items()}


def named_keys(grid: Grid) -> dict[str, str]:
    """The keys of a grid's runs and of the means of its seeds, by what a page calls them."""
    keys = {f"{cell_name(run.cell)}, seed {run.seed}": run.key for run in grid.runs()}
    return keys | {f"{name}, seeds merged": key for name, key in merged_keys(grid).items()}


def keys_of(grid: Grid) -> set[str]:
    """What `Results.seconds` and `.code` hold of this grid, in a folder that others may share."""
    runs, means = grid.runs(), merged_keys(grid).values()
    made = {step.key for run in runs for step in run.last.chain} | {*means}
    made |= {key + MEASURING for key in (*(run.key for run in runs), *means)}
    return made | {key + FAILED for key in made}


def digests_in(codes: Iterable[str]) -> set[str]:
    """The digests that values of `Results.code` name."""
    return {digest for code in codes for digest in code.split(", ")}


def open_results(grid: Grid, folder: Path, mix_revisions: bool, to_report: bool = False) -> Results:
    """The results of a grid in `folder`, from earlier runs if there are any.

    Args:
        to_report: nothing will be added to them, so that code, data and libraries may have changed since.

    Raises:
        ValueError: they were made from other data, recipes or tasks, or, without `mix_revisions`, by other code.
    """
    now, file = made_of(grid), folder / STATE
    if not file.is_file():
        return Results(now)
    results = Results(**json.loads(file.read_text(encoding="utf-8")))
    for name in now.keys() - ({"files", "libraries"} if to_report else set()):
        was = results.made_of.get(name)  # None: an earlier version did not say
        if name == "files":  # other axes may name other files; the same ones must have the same contents
            changed = [path for path, digest in was.items() if now["files"].get(path, digest) != digest]
            if changed:
                raise ValueError(f"{folder} has results of another {changed[0]}: name another output_dir")
        elif was != now[name]:
            raise ValueError(f"{folder} has results of {name} {was!r}, not {now[name]!r}: name another output_dir")
    if to_report:
        return results
    results.made_of["files"] |= now["files"]
    others = digests_in(results.code.values()) - {code_digest()}
    if others and not mix_revisions:
        raise ValueError(
            f"{folder} has results of other code ({', '.join(sorted(others))}; this is {code_digest()}): name another "
            "output_dir, or say --mix_revisions, and the table will say so, too"
        )
    return results


@dataclass
class Runner:
    """Runs what is missing.

    Args:
        jobs: how many commands at a time, each with a share of the CPU's cores, spread over the GPUs if there are any.
    """

    grid: Grid
    folder: Path
    results: Results
    jobs: int = 1

    def __post_init__(self):
        self.places: Queue[dict[str, str]] = Queue()
        for environment in environments(self.jobs):
            self.places.put(environment)

    def folder_of(self, key: str) -> Path:
        return self.folder / "runs" / key

    def _scores_of(self, key: str) -> Path:
        """Where the checkpoint of a step is measured."""
        return self.folder / "scores" / key

    def run(self) -> None:
        """Every step once its base is there, every measurement once its checkpoint is; what fails is kept, too.

        Threads wait for the commands; all that is known is written by this one.
        """
        for key in named_keys(self.grid).values():
            self.results.failed.pop(key, None)
        runs = self.results.missing(self.grid)
        done, broken = set(), {}  # keys of steps that are there, and why others are not
        working = {}  # futures and their jobs
        with ThreadPoolExecutor(self.jobs) as pool:
            while runs or working:
                for run in list(runs):
                    missing = [step for step in run.last.chain if step.key not in done]
                    job = missing[0] if missing else run
                    if run.key in self.results.scores or run.key in self.results.failed:  # another cell's run, too
                        runs.remove(run)
                    elif blame := next((broken[step.key] for step in missing if step.key in broken), None):
                        self.results.failed[run.key] = blame
                        runs.remove(run)
                    elif len(working) == self.jobs or job.key in {other.key for other in working.values()}:
                        continue  # recipes that differ in other steps alone give two steps of one key
                    elif missing:
                        working[self._submit(pool, job.key, self._make, job)] = job
                    else:
                        runs.remove(run)
                        working[self._submit(pool, run.key + MEASURING, self._measure, run.last.key, run.tasks)] = run
                for future in wait(working, return_when=FIRST_COMPLETED).done if working else ():
                    job = working.pop(future)
                    if isinstance(job, Step):
                        _, error = self._take(future, job.key)
                        done |= {job.key} if error is None else set()
                        broken |= {job.key: error} if error is not None else {}
                    else:
                        found, error = self._take(future, job.key + MEASURING)
                        if error is None:
                            self.results.scores[job.key] = found
                        else:
                            self.results.failed[job.key] = error
                    self.results.save(self.folder)
            self._merge(pool)
        self.results.save(self.folder)

    def _submit(self, pool: ThreadPoolExecutor, key: str, work, *arguments):
        """Starts a job, noting the code that does it: one that is stopped goes on later."""
        if not (self.folder_of(key) / "config.json").is_file():
            code, before = code_digest(), self.results.code.get(key)
            goes_on = before is not None and self._is_begun(key)
            self.results.code[key] = ", ".join(sorted({code} | (digests_in([before]) if goes_on else set())))
            if (of := commit()) is not None:
                self.results.commits[code] = of
            self.results.save(self.folder)
        return pool.submit(self._timed, work, *arguments)

    def _is_begun(self, key: str) -> bool:
        """Whether an earlier attempt has left something to go on with: a checkpoint, or tasks that were measured."""
        if key.endswith(MEASURING):
            return any(self._scores_of(key.split(":")[0]).glob("results/*/*/*.json"))
        return any(self.folder_of(key).glob("checkpoint-*"))

    def _timed(self, work, *arguments) -> tuple[object, Exception | None, float]:
        """(Result, error, seconds) of a job in one of the places."""
        environment, start = self.places.get(), time.perf_counter()
        result, error = None, None
        try:
            result = work(*arguments, environment)
        except FAILURES as caught:
            error = caught
        finally:
            self.places.put(environment)
        return result, error, time.perf_counter() - start

    def _take(self, future, key: str) -> tuple[object, str | None]:
        """A job's result, or why there is none."""
        result, error, seconds = future.result()
        if result is not None or error is not None:
            spent = key + (FAILED if error is not None else "")
            self.results.seconds[spent] = self.results.seconds.get(spent, 0.0) + seconds
        return result, None if error is None else self._reason(key, error)

    def _make(self, step: Step, environment: dict[str, str]) -> bool | None:
        """Makes a step's checkpoint; None if it was there.

        Raises:
            ValueError: the recipe is another by now.
        """
        if step.recipe is not None and settings_digest(step.recipe, step.name) != step.settings:
            raise ValueError(f"{step.recipe} has changed since the grid began: run it again")
        return self._checkpoint(step.key, SCRIPTS[step.name], self.arguments(step), environment)

    def _checkpoint(self, key: str, script: str, arguments: list[str], environment: dict[str, str]) -> bool | None:
        folder = self.folder_of(key)
        if (folder / "config.json").is_file():
            return None
        with self._log(key) as log:
            make_checkpoint(folder, script, arguments, {}, stdout=log, stderr=log, env=environment)
        for checkpoint in folder.glob("checkpoint-*"):  # nothing needs them once the merged one is written
            shutil.rmtree(checkpoint)
        return True

    def arguments(self, step: Step) -> list[str]:
        """The script's, but `--output_dir`."""
        arguments = [] if step.recipe is None else ["--config", str(step.recipe)]
        base = self.grid.start if step.before is None else str(self.folder_of(step.before.key))
        if step.name != "init" and base is not None:
            arguments += ["--model_name_or_path", base]
        return [*arguments, *step.options]

    def merging(self, name: str) -> list[str]:
        """The arguments of train/merge.py for a cell."""
        return ["--models", *(str(self.folder_of(step.key)) for step in lasts_of(self.grid)[name])]

    def commands(self) -> dict[str, list[str]]:
        """What one would type, by what it makes: a cell of a seed, or a mean of seeds."""
        lines = {}
        for run in self.grid.runs():
            own = [command(SCRIPTS[s.name], self.arguments(s), self.folder_of(s.key)) for s in run.last.chain]
            measuring = self._measuring(run.last.key, run.tasks)
            lines[f"{cell_name(run.cell)}, seed {run.seed}"] = [*own, measuring]
        for name, key in merged_keys(self.grid).items():
            own = command("train/merge.py", self.merging(name), self.folder_of(key))
            lines[f"{name}, seeds merged"] = [own, self._measuring(key, ())]
        return lines

    def _measuring(self, key: str, names: Sequence[str]) -> str:
        """The command that measures a checkpoint, on tasks of these names if there are any, else on all."""
        arguments = ["--model", str(self.folder_of(key)), "--tasks", *self.grid.tasks, *self._options(names)]
        return command("eval/run_mteb.py", arguments, self._scores_of(key))

    def _options(self, names: Sequence[str]) -> list[str]:
        options = ["--max_length", str(self.grid.max_length), "--dtype", self.grid.dtype]
        return options + (["--task_names", *names] if names else [])

    def _measure(self, key: str, names: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
        with self._log(key + MEASURING) as log:
            where = {"stdout": log, "stderr": log, "env": environment}
            model, folder = str(self.folder_of(key)), self._scores_of(key)
            found = score(model, self.grid.tasks, folder, *self._options(names), **where)
        details = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["details"]
        if seen := [name for name in names if details[name]["training_data"] == SEEN]:
            raise ValueError(
                f"{seen[0]} is measured as zero-shot, and the model was trained on its training data: leave_out must "
                "name the set in every step that reads it, and neither start nor teacher may have been trained on it"
            )
        return found

    def _merge(self, pool: ThreadPoolExecutor) -> None:
        """Makes and measures the mean of each cell's seeds, where all of them are there."""
        for name, key in merged_keys(self.grid).items():
            if key in self.results.scores or len(self.results.by_cell(self.grid)[name]) < len(self.grid.seeds):
                continue
            future = self._submit(pool, key, self._checkpoint, key, "train/merge.py", self.merging(name))
            found, error = self._take(future, key)
            if error is None:
                found, error = self._take(self._submit(pool, key + MEASURING, self._measure, key, ()), key + MEASURING)
            if error is None:
                self.results.scores[key] = found
            else:
                self.results.failed[key] = error
            self.results.save(self.folder)

    def _log(self, key: str):
        """The file that a command's output goes to; an earlier attempt's is replaced."""
        path = self._log_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")

    def _log_path(self, key: str) -> Path:
        return self.folder / "logs" / f"{key.replace(':', '-')}.log"

    def _reason(self, key: str, error: Exception) -> str:
        """What went wrong, in one line, and where to read more."""
        log = self._log_path(key)
        if not isinstance(error, subprocess.CalledProcessError) or not log.is_file():
            return str(error)
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        if told := [line for line in lines if ERROR.match(line)]:
            return f"{told[-1][:300]} ({log})"
        last = next((line[:200] for line in reversed(lines) if line), "nothing")
        return f"ended with status {error.returncode} and no error, as where memory runs out; last said: {last} ({log})"


def command(script: str, arguments: list[str], output_dir: Path) -> str:
    return as_typed(script, *arguments, "--output_dir", str(output_dir))


def environments(jobs: int) -> Iterator[dict[str, str]]:
    """The environments of commands that run beside each other: a share of the cores each, and one of the GPUs."""
    share = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))} if jobs > 1 else {}
    devices = visible_devices()
    for job in range(jobs):
        device = {"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]} if devices else {}
        yield os.environ | share | device


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return asked.split(",")[:count] if asked else [str(number) for number in range(count)]


def check_jobs(jobs: int) -> None:
    """Raises a `ValueError` if there are more jobs than cores; a GPU may serve several, as small models need it to."""
    if not 1 <= jobs <= cores():
        raise ValueError(f"jobs is {jobs}; it must be 1 to {cores()}, the number of cores")


def estimate(grid: Grid, results: Results) -> list[tuple[str, int, float | None]]:
    """(Step, how many are missing, minutes of each): by what was measured, else by the grid's `minutes`."""
    runs = results.missing(grid)
    steps = {step.key: step for run in runs for step in run.last.chain if step.key not in results.seconds}
    merges = [key for key in merged_keys(grid).values() if key not in results.scores]
    counts = {MEASURE: len(runs) + len(merges)}
    for name in (*(step.name for step in steps.values()), *([MERGED] * len(merges))):
        counts[name] = counts.get(name, 0) + 1
    measured: dict[str, list[float]] = {}
    for key, seconds in results.seconds.items():
        if key.endswith(FAILED):
            continue
        name = MEASURE if key.endswith(MEASURING) else key.split("-")[0]
        measured.setdefault(name, []).append(seconds / 60)
    rows = []
    for name in sorted(counts, key=[*STEPS, MERGED, MEASURE].index):
        minutes = statistics.mean(measured[name]) if name in measured else grid.minutes.get(name)
        rows.append((name, counts[name], minutes))
    return rows
