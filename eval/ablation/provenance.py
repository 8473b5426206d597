"""What decides a grid's scores beside its options: data, tasks, bases and code, as digests that tell others apart."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import yaml

from nvembed.eval.ablation.grid import Grid
from nvembed.eval.ablation.grid_file import as_list
from nvembed.eval.ablation.runs import Step
from nvembed.eval.commands import ROOT, recipe_settings
from nvembed.eval.files import sha256


PATHS = ("base", "data_dir", "datasets", "eval_tasks", "teacher")  # options that name files or folders
WRITTEN = ("teacher_cache",)  # options that name what runs themselves write
LIBRARIES = ("torch", "transformers", "peft", "mteb")  # whose versions move a score


def data_of(file: Path, content: dict) -> dict[tuple[str, str], Path]:
    """The local data that a recipe's settings, or a tasks file, name: by file and name."""
    paths = {}
    for entry in (entry for key in ("datasets", "tasks") for entry in as_list(content.get(key))):
        name = entry if isinstance(entry, str) else entry.get("path")
        if name is None and content.get("data_dir") and entry.get("set"):
            name = str(Path(content["data_dir"]).absolute() / entry["set"])  # what build_data.py wrote
        if name is not None and (path := file.parent / Path(name).expanduser()).exists():
            paths[f"{file.name}: ", name] = path
    return paths


def digest_path(path: Path, name: str) -> dict[str, str]:
    """SHA-256 of a file, or of all files of a folder and of the list of them, by their names."""
    if not path.is_dir():
        return {name: sha256(path)}
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    listed = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {f"{name}/": listed} | {str(Path(name, file)): sha256(path / file) for file in files}


def made_of(grid: Grid) -> dict:
    """What decides a grid's scores beside the options and recipes' settings, which are in its runs' keys, and the code.

    Recipes' and tasks' data, models on disk (a base, a teacher), the tasks, how they are measured, and libraries.
    """
    steps = {step.key: step for run in grid.runs() for step in run.last.chain}.values()
    known = {"tasks": [Path(task).name for task in grid.tasks], "max_length": grid.max_length, "dtype": grid.dtype}
    known |= {"start": grid.start, "libraries": {name: version(name) for name in LIBRARIES}, "files": {}}
    paths: dict[tuple[str, str], Path] = {}  # both stages may name a set, which is read once
    for file, name in sorted({(step.recipe, step.name) for step in steps if step.recipe is not None}):
        paths |= data_of(file, recipe_settings(file, name))
    for file in sorted(file for file in map(Path, grid.tasks) if file.is_file()):
        paths |= {("", file.name): file} | data_of(file, yaml.safe_load(file.read_text(encoding="utf-8")))
    named = {value for step in steps for value in paths_of(step)} | ({grid.start} - {None})
    named = named.union(*(models_of(grid, step) for step in steps))
    paths |= {("", value): Path(value) for value in sorted(named) if Path(value).exists()}
    for (prefix, name), path in paths.items():
        known["files"] |= {prefix + part: digest for part, digest in digest_path(path, name).items()}
    return known


def paths_of(step: Step) -> Iterator[str]:
    """The values of a step's options that may be paths: those of options that are, and what looks like one."""
    option = None
    for part in step.options:
        if part.startswith("--"):
            option = part.removeprefix("--")
        elif option not in WRITTEN and (option in PATHS or "/" in part):
            yield part


def models_of(grid: Grid, step: Step) -> set[str]:
    """The models that a step's recipe names and that it reads."""
    if step.recipe is None:
        return set()
    settings, keys = recipe_settings(step.recipe, step.name), {"teacher"}
    if step.before is None and grid.start is None:
        keys.add("model_name_or_path")
    return {str(settings[key]) for key in keys if settings.get(key)}


def commit() -> str | None:
    """The commit that the code is of, "-dirty" behind it where files differ; None outside a git checkout."""
    if not (ROOT / ".git").exists():  # installed: a repository around it is the user's
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def code_digest() -> str:
    """Of the code that trains and measures, so that results of different code are told apart."""
    files = [*ROOT.glob("*.py"), *(ROOT / "train").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]
    files += (ROOT / "eval/tasks").glob("*.json")  # instructions
    files += (ROOT / "train/data").glob("*.yaml")  # what the paper's sets are
    digests = {str(file.relative_to(ROOT)): sha256(file) for file in sorted(files)}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]
