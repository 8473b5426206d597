"""Runs scripts of the project in processes that are forked from one with their imports, which take most of a short run.

Each is a process of its own that can be killed, with its own arguments and environment. Three things are not tested so:
what libraries read when they are imported, other hash seeds, which the order of sets depends on, and how the
interpreter ends. Tests that are about these, or about a launcher, start `python` themselves.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml


ROOT = Path(__file__).parents[1]
READ_AT_IMPORT = ("HF_", "CUDA_", "OMP_", "MKL_")
GRACE = 5  # seconds that the other processes get to end once one has failed

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["nvembed.train.run_stage", "nvembed.eval.run_mteb"])
read_by_server: dict[str, str] = {}


def start(
    script: Path, *arguments: object, env: dict[str, str] | None = None, output: tuple[Path | str, ...] = ()
) -> BaseProcess:
    """Starts a script.

    Args:
        env: what is added to the environment.
        output: files to which its standard output and its errors are added; none: nowhere.

    Raises:
        ValueError: the environment has, by now, other values of variables that libraries read when they are imported.
    """
    if not read_by_server:
        read_by_server.update(_read_at_import(os.environ))
    environment = os.environ | (env or {})
    if changed := sorted(_read_at_import(environment).items() ^ read_by_server.items()):
        raise ValueError(f"{changed[0][0]} would change nothing: libraries have read it when they were imported")
    argv = [str(part) for part in (script, *arguments)]
    process = SERVER.Process(target=_run, args=(argv, environment, output or (os.devnull, os.devnull)))
    process.start()
    atexit.register(_kill, process)  # a test that fails may leave it
    return process


def run(
    script: Path, *arguments: object, env: dict[str, str] | None = None, processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs a script to its end, as `subprocess.run` would.

    Args:
        env: what is added to the environment.
        processes: how many run it together, each with its RANK, WORLD_SIZE and so on, as torchrun gives them. If one
            fails, the others are killed, as are the processes that they have started.
        timeout: seconds after which all are killed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    command = [script, *arguments]
    running: list[BaseProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "stdout"), Path(folder, "stderr")
        for file in output:
            file.touch()
        try:
            for rank in [{}] if processes == 1 else _ranks(processes):
                running.append(start(*command, env=rank | (env or {}), output=output))
            code, deadline = 0, time.monotonic() + timeout
            while running and time.monotonic() < deadline:
                ended = wait([process.sentinel for process in running], deadline - time.monotonic())
                for process in [process for process in running if process.sentinel in ended]:
                    process.join()
                    running.remove(process)
                    if code == 0 and process.exitcode != 0:
                        code, deadline = process.exitcode, min(deadline, time.monotonic() + GRACE)
        finally:
            for process in running:
                _kill(process)
        stdout, stderr = (file.read_text(encoding="utf-8", errors="replace") for file in output)
    if running and code == 0:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    return subprocess.CompletedProcess(command, code, stdout, stderr)


def run_sharded(script: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a training script in two processes of gloo, with the weights in shards of FSDP2."""
    settings = yaml.safe_load((ROOT / "train" / "recipes" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    # What `accelerate launch --config_file` sets with this file; it starts no CPU processes.
    env = {"ACCELERATE_USE_FSDP": "true"} | {
        name.upper(): str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()
    }
    stage = ROOT / "tests" / "train" / "fsdp2_stage.py"
    return run(stage, script, *arguments, "--ddp_backend=gloo", processes=2, env=env)


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def _ranks(processes: int) -> Iterator[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    for rank in range(processes):
        yield common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))


def _kill(process: BaseProcess) -> None:
    """Kills a process and those that it has started, if it is still there."""
    if process.is_alive():
        process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _run(argv: list[str], environment: dict[str, str], output: tuple[Path | str, ...]) -> None:
    """In the new process."""
    os.setsid()
    for descriptor, path in enumerate(output, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # more are no faster on tests' models
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
