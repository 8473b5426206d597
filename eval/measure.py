"""Runs tasks on a model through mteb and saves each result as soon as it is done."""

import atexit
import logging
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import mteb
import numpy as np
from huggingface_hub import constants
from mteb import ResultCache, TaskResult
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from tqdm import tqdm

from nvembed.eval.encoder import TaskEncoder
from nvembed.eval.tasks.lookup import with_parts


logger = logging.getLogger(__name__)

LOADER_BATCH = 256  # texts that mteb hands over at a time; the model makes its own batches of them


class TasksNotLoadedError(ValueError):
    """The data of some tasks failed to load; all others were measured."""


def measure(tasks: Sequence[AbsTask], encoder: TaskEncoder, cache: ResultCache | None = None) -> dict[str, TaskResult]:
    """mteb's results by task; results in the cache are not computed again.

    Args:
        cache: saves each result when it is done; None: no result is saved.

    Raises:
        ConnectionError: the Hub cannot be reached for a task's data; the message says how to work without it.
        TasksNotLoadedError: the data of some tasks is wrong or was not found; the others were measured and saved.
    """
    failures = {}
    results: dict[str, TaskResult] = {}
    plan = list(with_parts(tasks))  # what aggregates others finds them in the cache
    with tqdm(plan, desc="Tasks", unit="task", disable=cache is None) as progress:
        for task in progress:
            name = task.metadata.name
            progress.set_postfix_str(name)
            if isinstance(task, AbsTaskAggregate):
                if any(part.metadata.name in failures for part in task.metadata.tasks):
                    continue
            elif not is_measured(task, encoder, cache):
                try:
                    load(task)
                except ConnectionError:
                    raise
                except Exception as error:
                    logger.error("%s is left out: %s", name, error)
                    failures[name] = error
                    continue
            # A second evaluation in this process samples as the first one did.
            task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)
            options = {"batch_size": LOADER_BATCH, "show_progress_bar": False}
            try:
                evaluation = mteb.evaluate(
                    encoder, task, cache=cache, co2_tracker=False, encode_kwargs=options, show_progress_bar=False
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            (results[name],) = evaluation.task_results
            if cache is not None:
                # Rounded, as a resumed run has it.
                results[name] = cache.load_task_result(name, encoder.mteb_model_meta)
                task.unload_data()  # the next one may be large
    if failures:
        reasons = "".join(f"\n  {name}: {error}" for name, error in failures.items())
        raise TasksNotLoadedError(
            f"not measured, so there is no average: {len(failures)} of {len(plan)} tasks{reasons}"
        )
    return {task.metadata.name: results[task.metadata.name] for task in tasks}


def is_measured(task: AbsTask, encoder: TaskEncoder, cache: ResultCache | None) -> bool:
    """Whether the cache has all splits and subsets of the task."""
    result = cache and cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
    return result is not None and not result.get_missing_evaluations(task)


def load(task: AbsTask) -> None:
    """Loads the task's data unless it is in memory.

    Raises:
        ConnectionError: the Hub cannot be reached.
    """
    path = task.metadata.dataset["path"]
    try:
        if not task.data_loaded and Path(path).is_dir():
            logger.warning("%s: the data is that of the folder ./%s, not the Hub's", task.metadata.name, path)
            with fresh_cache():
                task.load_data()
        else:
            task.load_data()
    except ConnectionError as error:
        raise unreachable(
            f"{task.metadata.name} (data set {path!r}, revision {task.metadata.revision})", error
        ) from error


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Gives `datasets` an empty cache: its own identifies a local folder by name and would miss changed files."""
    folder, usual = tempfile.mkdtemp(prefix="nvembed-"), datasets.config.HF_DATASETS_CACHE
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # not before: tables are read from it
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = usual


def unreachable(what: str, error: Exception | str) -> ConnectionError:
    """An error that says what was tried and how to work without the Hub."""
    return ConnectionError(
        f"{what}: the data is not in the cache and failed to load from {constants.ENDPOINT} ({error}). Without a "
        "connection: copy the data set's repository to a folder of its name below the working directory, such as "
        "./mteb/scifact, which is taken first; or fill the cache on another machine and set HF_HOME to it; or measure "
        "data of your own (eval/tasks/local.py). What is done is kept: run again to go on."
    )
