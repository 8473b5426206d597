"""Looks up what `--tasks` names (mteb's benchmarks and tasks, YAML files of local tasks) and its instructions."""

import difflib
import logging
from collections.abc import Collection, Iterable, Iterator
from functools import cache

import mteb
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.abstasks.aggregated_task import AbsTaskAggregate

from nvembed.eval.tasks.instructions import TaskInstruction, find_instruction
from nvembed.eval.tasks.local import read_entries, read_tasks


logger = logging.getLogger(__name__)

PAPER_BENCHMARK = "MTEB(eng, v1)"  # the paper's 56 tasks


def select_tasks(names: Iterable[str], only: Collection[str] | None = None) -> list[AbsTask]:
    """The tasks that the names stand for, in order and without duplicates.

    A task of the paper's benchmark is taken from it, with its language and split.

    Args:
        names: of benchmarks or tasks of mteb, or paths of YAML files (see `nvembed.eval.tasks.local`).
        only: names of the tasks to take of these; None: all.

    Raises:
        ValueError: a name is unknown (the error suggests similar ones), two different tasks share a name, a file is
            invalid, or there is no task of a name in `only`.
    """
    tasks: dict[str, AbsTask] = {}
    known: list[str] = []  # of a file's tasks, no data is read but of those to take
    for name in names:
        if name.endswith((".yaml", ".yml")):
            own = [entry.name for entry in read_entries(name)]
            found = read_tasks(name, [task for task in own if only is None or task in only])
        else:
            found = _mteb_tasks(name)
            own = [task.metadata.name for task in found]
        known += own
        for task in found:
            earlier = tasks.setdefault(task.metadata.name, task)
            if earlier.metadata != task.metadata or getattr(earlier, "instruction", None) != getattr(
                task, "instruction", None
            ):
                raise ValueError(f"two tasks are called {task.metadata.name!r}; give the local one another `name:`")
    for name in only or ():
        if name not in known:
            raise ValueError(f"--task_names {name!r} is none of the tasks, which are {', '.join(known)}")
    if not tasks:
        raise ValueError(f"no tasks: name a benchmark such as {PAPER_BENCHMARK!r}, tasks, or a YAML file of local ones")
    return [task for name, task in tasks.items() if only is None or name in only]


def _mteb_tasks(name: str) -> list[AbsTask]:
    benchmarks = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    if name in benchmarks:
        return list(benchmarks[name].tasks)
    for task in benchmarks[PAPER_BENCHMARK].tasks:
        if task.metadata.name == name:
            return [task]
    try:
        return [mteb.get_task(name)]
    except KeyError:
        near = _nearest(name, [*benchmarks, *_task_names()])
        raise ValueError(
            f"--tasks {name!r} is neither a benchmark nor a task of mteb {mteb.__version__}, nor a .yaml file; "
            + (f"near are {', '.join(map(repr, near))}" if near else "nothing has a name like it")
        ) from None


def _nearest(name: str, known: list[str], count: int = 5) -> list[str]:
    """Names that contain the name, shortest first, then similar ones; case is ignored."""
    holding = sorted((other for other in known if name.lower() in other.lower()), key=len)
    by_lower = {other.lower(): other for other in known}
    alike = [by_lower[other] for other in difflib.get_close_matches(name.lower(), by_lower, count, cutoff=0.5)]
    return list(dict.fromkeys([*holding, *alike]))[:count]


def check_task_names(names: Iterable[str], where: str) -> None:
    """Raises a `ValueError` if one is no task of mteb; a misspelt one would certify nothing."""
    for name in names:
        if name not in _task_names():
            near = ", ".join(map(repr, _nearest(name, _task_names()))) or "none"
            raise ValueError(f"{where} has {name!r}, which is no task of mteb {mteb.__version__}; near are {near}")


@cache
def _task_names() -> list[str]:
    return [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False, exclude_aggregate=False)]


def instructions_for(tasks: Iterable[AbsTask]) -> dict[str, TaskInstruction]:
    """One instruction per task, parts of aggregated tasks included.

    A local task has the instruction of its file, a task of the paper the paper's. Others get mteb's default, with a
    warning.
    """
    return {task.metadata.name: _instruction(task) for task in with_parts(tasks)}


def with_parts(tasks: Iterable[AbsTask]) -> Iterator[AbsTask]:
    """The tasks and, before each aggregated one, what it aggregates, such as CQADupstack's twelve forums."""
    for task in tasks:
        if isinstance(task, AbsTaskAggregate):
            yield from with_parts(task.metadata.tasks)
        yield task


def _instruction(task: AbsTask) -> TaskInstruction:
    given = getattr(task, "instruction", None)
    if given is not None:
        # Reranking is symmetric in the paper's list: its queries and documents are questions or titles alike.
        return TaskInstruction(given, "" if task.metadata.type == "Retrieval" else given)
    is_local = hasattr(task, "instruction")
    found = None if is_local else find_instruction(task.metadata.name, task.metadata.type)
    if found is not None:
        return found
    prompt = task.metadata.prompt or getattr(task, "abstask_prompt", "")
    if isinstance(prompt, dict):
        default = TaskInstruction(prompt.get("query", ""), prompt.get("document", ""))
    else:
        default = TaskInstruction(prompt, "" if isinstance(task, AbsTaskRetrieval) else prompt)
    if not isinstance(task, AbsTaskAggregate):  # which embeds nothing itself
        logger.warning("%s has no instruction; mteb's default is used: %r", task.metadata.name, default.query)
    return default
