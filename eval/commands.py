"""Runs the project's scripts as a user would, for scripts that go through several of them."""

import io
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path

import yaml

from nvembed.eval.files import write_json


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {  # of the steps that recipes and grids name
    "init": "train/init_checkpoint.py",
    "stage1": "train/stage1.py",
    "stage2": "train/stage2.py",
    "prune": "train/compress/prune.py",
    "distill": "train/distill.py",
    "quantize": "train/compress/quantize.py",
    "center": "train/center.py",
    "ladder": "train/compress/ladder.py",
}
STAGES = tuple(step for step in SCRIPTS if step != "init")  # whose settings a recipe may hold, each under its own key
TRAININGS = ("stage1.py", "stage2.py", "distill.py")


def cores() -> int:
    """How many cores this process may use."""
    # macOS has no affinity to ask for.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def recipe_settings(recipe: Path, step: str) -> dict:
    """What a recipe sets for a step: what is at its top, under what is under the step's own key.

    Raises:
        ValueError: it cannot be read as YAML, holds no mapping, or has other steps' keys and not the step's.
    """
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get(step) or {}, dict):
        raise ValueError(f"{recipe} must hold a mapping of settings, and so must its {step}, if it has one")
    if (sections := content.keys() & {*STAGES}) and step not in sections:
        raise ValueError(f"{recipe} has {', '.join(sorted(sections))} and no {step}: add `{step}:` with its settings")
    return {name: value for name, value in content.items() if name not in STAGES} | (content.get(step) or {})


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """For a script's `main`: ends it with the message of what is wrong with its settings or its data."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
    except subprocess.CalledProcessError as error:
        script = next((part for part in map(str, error.cmd) if part.endswith(".py")), error.cmd[0])
        sys.exit(f"{Path(sys.argv[0]).stem}: {script} failed; its error is above")


def launch(script: str, *arguments: str, **options) -> None:
    """Runs a training script through `accelerate launch`, on all cores that this process may use.

    Args:
        options: of `subprocess.run`; an OMP_NUM_THREADS in its `env` is how many cores the training gets.

    Raises:
        subprocess.CalledProcessError: it failed; its own error has been shown.
    """
    threads = (options.get("env") or {}).get("OMP_NUM_THREADS", cores())
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    accelerate += [
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--quiet",  # the script's own error is enough
        f"--num_cpu_threads_per_process={threads}",
    ]
    subprocess.run([*accelerate, script, *arguments], check=True, **options)


def run(script: str, *arguments: str, **options) -> str:
    """Runs another script of the project and returns what it printed; its progress and errors are shown.

    Args:
        options: of `subprocess.run`.

    Raises:
        subprocess.CalledProcessError: it failed; its own error has been shown.
    """
    options = {"stdout": subprocess.PIPE} | options
    return subprocess.run([sys.executable, script, *arguments], check=True, text=True, **options).stdout


def is_training(script: str) -> bool:
    """Whether it is started by `accelerate launch`, goes on from its checkpoints and has transformers' options."""
    return Path(script).name in TRAININGS


def as_typed(script: str, *arguments: str) -> str:
    """The command line of a script of the project as one would type it."""
    start = ["accelerate", "launch"] if is_training(script) else ["python"]
    return shlex.join([*start, script, *arguments])


@cache
def known_options(script: str) -> set[str]:
    """The options that a script of the project says it has (`--help`).

    It is asked in this process: the scripts share their imports, which would otherwise take ten seconds for each.

    Raises:
        ValueError: it cannot say so, for want of a package for example.
    """
    said, argv = io.StringIO(), sys.argv
    try:
        sys.argv = [str(ROOT / script), "--help"]
        with redirect_stdout(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise ValueError(f"{script} --help failed: {end.code}") from None
    except ImportError as error:
        raise ValueError(f"{script} does not start: {error}") from error
    finally:
        sys.argv = argv
    return {*re.findall(r"--([A-Za-z0-9_]+)", said.getvalue())}


def make_checkpoint(folder: Path, script: str, arguments: Sequence[str], made_of: Mapping, **options) -> None:
    """Runs a script that writes a checkpoint to `folder`, unless it has; a training that was stopped goes on.

    Args:
        script: a path from the root of the project.
        arguments: the script's, but `--output_dir`.
        made_of: what decides the result beside the arguments; kept beside the folder, so that another is noticed.
        options: of `subprocess.run`.

    Raises:
        ValueError: the folder was made, or begun, by other arguments or from something else.
        subprocess.CalledProcessError: the script failed.
    """
    made_of = {"script": script, "arguments": list(arguments)} | dict(made_of)
    record = folder.with_name(f"{folder.name}.json")
    is_begun = (folder / "config.json").is_file() or any(folder.glob("checkpoint-*"))
    if record.is_file() and is_begun:
        before = json.loads(record.read_text(encoding="utf-8"))
        for name in made_of.keys() | before.keys():
            if before.get(name) != made_of.get(name):
                raise ValueError(
                    f"{folder} was made with {name} {before.get(name)!r}, and this run has {made_of.get(name)!r}: "
                    f"remove {folder} and {record.name}, or name another output_dir"
                )
    elif is_begun:
        raise ValueError(f"{folder} holds a checkpoint that this script did not make; name another output_dir")
    if (folder / "config.json").is_file():
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, made_of)
    arguments = [*arguments, "--output_dir", str(folder)]
    if is_training(script):
        if any(folder.glob("checkpoint-*")):
            arguments += ["--resume_from_checkpoint", "true"]
        launch(str(ROOT / script), *arguments, **options)
    else:
        run(str(ROOT / script), *arguments, **options)


def score(checkpoint: str, tasks: Sequence[str], folder: Path, *arguments: str, **options) -> dict[str, float]:
    """Main scores in percent by task, and their "average", by `eval/run_mteb.py`; measured tasks are kept in `folder`.

    Raises:
        subprocess.CalledProcessError: measuring failed.
    """
    arguments = ["--model", checkpoint, "--tasks", *tasks, "--output_dir", str(folder), *arguments]
    run(str(ROOT / "eval/run_mteb.py"), *arguments, **options)
    scores = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["tasks"]
    return {name: 100 * value for name, value in scores.items()} | {"average": 100 * statistics.mean(scores.values())}
