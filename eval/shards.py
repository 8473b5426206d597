"""Steps over the shards of a corpus, on this machine's processes, on Slurm or on Ray; datatrove schedules them."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger as datatrove_logger
from multiprocess import parent_process  # of the library that datatrove's executors use
from tqdm import tqdm

from nvembed.eval.commands import cores
from nvembed.eval.files import whole


# Called with the number of a shard and the path to write it to.
Make = Callable[[int, Path], None]

POLL = 10  # seconds between looks at a Slurm job

datatrove_logger.disable("datatrove.executor.local")  # its log of starts and ends; a task's own log stays


class LocalExecutor(LocalPipelineExecutor):
    """Leaves no process behind when it is killed, and prints nothing of its own: datatrove shows the log of the first
    worker, whose local rank is 0, and the values of all variables with an error, which reaches `make_shards` anyway.
    """

    is_running = False

    def run(self):
        LocalExecutor.is_running = True
        try:
            return super().run()
        finally:
            LocalExecutor.is_running = False

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        datatrove_logger.disable("datatrove.executor.base")
        return super()._run_for_rank(rank, local_rank + 1, node_rank)


@dataclass
class ExecutorArguments:
    """Where the steps over shards run. The results are the same for any number of tasks, but for the last digits of
    embeddings, which differ with the threads that a task on a CPU has."""

    executor: Literal["local", "slurm", "ray"] = field(default="local", metadata={"help": "What runs the tasks."})
    tasks: int = field(default=1, metadata={"help": "Parts that a step's shards are divided into."})
    workers: int | None = field(default=None, metadata={"help": "Tasks at a time; all if left out. One GPU each."})
    executor_options: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of further arguments of datatrove's executor: partition, time, gpus_per_task, "
            "mem_per_cpu_gb, ..."
        },
    )

    def __post_init__(self):
        for name in ("tasks", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if self.executor_options is not None and not Path(self.executor_options).is_file():
            raise ValueError(f"executor_options is {self.executor_options!r}, which is not a file")

    def make(self, step: PipelineStep, tasks: int, logs: Path) -> PipelineExecutor:
        """The executor of one step.

        Raises:
            ValueError: `executor_options` does not hold a mapping, or datatrove's executor does not take it.
        """
        options = {} if self.executor_options is None else yaml.safe_load(Path(self.executor_options).read_text())
        if not isinstance(options, dict):
            raise ValueError(f"{self.executor_options} holds {options!r}, not a mapping of options")
        options = {"tasks": tasks, "workers": min(tasks, self.workers or tasks), "logging_dir": str(logs)} | options
        kinds = {"local": LocalExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
        try:
            return kinds[self.executor](pipeline=[step], **options)
        except TypeError as error:  # an argument that does not exist, or a required one that is not given
            raise ValueError(f"executor {self.executor} with {options}: {error}; see executor_options") from error


class MakeShards(PipelineStep):
    """Makes a task's shards, one after another: task r of n makes shards r, r + n, r + 2n, ...

    A shard is written whole or not at all, and one that exists is not made again, so an interrupted step repeats at
    most the shards that were being made.

    Args:
        name: of the step.
        prepare: loads what all shards of a task need, and returns what makes one; called only by tasks with shards to
            make. Both are pickled to be sent to other processes and machines.
        paths: of the shards, by number.
        threads: of a task; None: as the machine it runs on is set up.
    """

    type = "nvembed"

    def __init__(self, name: str, prepare: Callable[[], Make], paths: Sequence[Path], threads: int | None = None):
        self.name = name
        super().__init__()
        self.prepare, self.paths, self.threads = prepare, list(paths), threads

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        missing = [n for n in range(rank, len(self.paths), world_size) if not self.paths[n].exists()]
        if missing:
            if parent_process() is not None:
                watch_parent()
            if torch.cuda.is_available():  # on Slurm and Ray a task sees only its own
                torch.cuda.set_device(rank % torch.cuda.device_count())
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            make = self.prepare()
            for number in tqdm(missing, desc=f"{self.name}, task {rank + 1} of {world_size}", unit="shard"):
                with self.track_time("shard"), whole(self.paths[number]) as partial:
                    make(number, partial)
        yield from data or ()


def watch_parent() -> None:
    """Ends this process soon after its parent, also one that was killed, for which it would wait for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# Tasks call `watch_parent` themselves; this is for the process in which `multiprocess` keeps their queues.
os.register_at_fork(after_in_child=lambda: watch_parent() if LocalExecutor.is_running else None)


def make_shards(name: str, prepare: Callable[[], Make], paths: Sequence[Path], logs: Path, where: ExecutorArguments):
    """Runs a step until all its shards exist; see `MakeShards`.

    Args:
        logs: folder for datatrove's logs, one folder a step in it.

    Raises:
        RuntimeError: shards are missing although all tasks have ended; the logs are named.
        Exception: whatever a task on this machine raised.
    """
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if not missing:
        return
    tasks = min(where.tasks, len(paths))
    logs = logs / f"{name}-{tasks}"
    for number in missing:  # completed, but its shards were removed since
        (logs / "completions" / f"{number % tasks:05}").unlink(missing_ok=True)
    workers = min(tasks, where.workers or tasks)
    threads = max(1, cores() // workers) if where.executor == "local" else None
    executor = where.make(MakeShards(name, prepare, paths, threads), tasks, logs)
    executor.run()
    if isinstance(executor, SlurmPipelineExecutor):
        wait_for(executor)
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise RuntimeError(
            f"{name}: {len(missing)} of {len(paths)} shards were not made, the first is {missing[0]}; the reason is in "
            f"{logs / 'logs'}"
        )


def wait_for(executor: SlurmPipelineExecutor) -> None:
    """Waits until every task of a Slurm job is complete, or the job is no longer in the queue."""
    while executor.get_incomplete_ranks(skip_completed=True):
        command = ["squeue", "--noheader", "--jobs", str(executor.job_id)]
        found = subprocess.run(command, capture_output=True, text=True)
        is_gone = not found.stdout.strip() if found.returncode == 0 else "Invalid job id" in found.stderr
        if is_gone:  # any other failure of squeue says nothing about the job
            return
        time.sleep(POLL)
