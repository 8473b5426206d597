"""Runs scripts of the project in processes forked from one that has their imports, nine of a short run's ten seconds.

Each is a process of its own that can be killed, with its own arguments and environment. What libraries read when they
are imported is the pytest process's: tests that set such variables, or are about a launcher, start `python` themselves.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml


ROOT = Path(__file__).parents[1]
READ_AT_IMPORT = ("HF_", "CUDA_", "OMP_", "MKL_", "TOKENIZERS_")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["nvembed.train.run_stage", "nvembed.eval.run_mteb", "llmcompressor"])


def start(
    script: Path, *arguments: object, env: dict[str, str] | None = None, output: tuple[Path | str, ...] = ()
) -> BaseProcess:
    """Starts a script.

    Args:
        env: what is added to the environment.
        output: files to which its standard output and its errors are added; none: nowhere.

    Raises:
        ValueError: `env` has a variable that libraries have read by then.
    """
    if too_late := [name for name in env or {} if name.startswith(READ_AT_IMPORT)]:
        raise ValueError(f"{', '.join(too_late)} would change nothing: libraries read it when they are imported")
    argv = [str(part) for part in (script, *arguments)]
    process = SERVER.Process(target=_run, args=(argv, env or {}, output or (os.devnull, os.devnull)))
    process.start()
    return process


def run(
    script: Path, *arguments: object, env: dict[str, str] | None = None, processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs a script to its end, as `subprocess.run` would.

    Args:
        env: what is added to the environment.
        processes: how many run it together, with the variables that torchrun gives them; if one fails, the others are
            killed.
        timeout: seconds after which all are killed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    command = [script, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "stdout"), Path(folder, "stderr")
        ranks = [{}] if processes == 1 else _ranks(processes)
        running = {start(*command, env=rank | (env or {}), output=output) for rank in ranks}
        code, deadline = 0, time.monotonic() + timeout
        while running and code == 0:
            ended = wait([process.sentinel for process in running], deadline - time.monotonic())
            for process in [process for process in running if process.sentinel in ended]:
                process.join()
                running.remove(process)
                code = code or process.exitcode
            if not ended:
                break
        for process in running:
            process.kill()
            process.join()
        stdout, stderr = (file.read_text(encoding="utf-8") for file in output)
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


def _ranks(processes: int) -> Iterator[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    for rank in range(processes):
        yield common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))


def _run(argv: list[str], env: dict[str, str], output: tuple[Path | str, ...]) -> None:
    """In the new process."""
    for descriptor, path in enumerate(output, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(env)
    torch.set_num_threads(1)  # more are no faster on tests' models
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
