"""Checks and measures on a machine with a GPU what `make test` cannot, by one command.

    python tests/gpu.py                     # all steps, on a machine where requirements.txt is installed
    python tests/gpu.py checks encode       # some of them
    python tests/gpu.py --pack gpu.tar.xz   # here, for a machine without network: what its image lacks, and the golden
    python tests/gpu.py --unpack gpu.tar.xz --out results    # there

Steps: `checks` (tests/test_cuda.py), and benchmarks of eval/speed on 7.85 B random weights: `encode` (its released way
took 112 GB of GPU memory for a list of 1,024 texts), `train`, `compressed` and `compiled` (about 60 GB). Each is a
command of its own under a time limit, its output goes to `--out`/STEP.log, and the rest goes on if one fails. Exit
code: the number of steps that failed.
"""

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
# What an image with torch, transformers, peft, accelerate and sentence-transformers lacks.
PACKAGES = [
    "annotated-types", "bitsandbytes", "bm25s", "datasets", "datatrove", "dill", "faiss-cpu", "gguf", "loguru", "mteb",
    "multiprocess", "orjson", "polars", "polars-runtime-32", "pydantic", "pydantic-core", "pytrec-eval-terrier",
    "trl", "typing-inspection",
]  # fmt: skip
# Files that no step reads, half of the size: statistics and assets, and libraries for other CUDA versions than 13.0.
LEFT_OUT = ("mteb/descriptive_stats/", "datatrove/assets/", "bitsandbytes/libbitsandbytes_")
KEPT = ("libbitsandbytes_cuda130.so",)


class Step(NamedTuple):
    command: list[str]
    seconds: int


MISTRAL = ["--shape", "mistral-7b", "--device", "cuda", "--dtype", "bfloat16"]
STEPS = {
    "checks": Step(["-m", "pytest", "--numprocesses", "6", "--durations", "5", "tests/test_cuda.py"], 240),
    "encode": Step(
        ["eval/speed/encode.py", *MISTRAL, "--passage_words", "420", "--queries", "2048", "--passages", "256",
         "--rounds", "3"], 240,
    ),
    "train": Step(
        ["eval/speed/train.py", *MISTRAL, "--rows", "128", "--negatives", "7", "--chunk_tokens", "16384",
         "--gradient_checkpointing", "--ways", "cached", "--steps", "3", "--rounds", "1"], 300,
    ),
    "compressed": Step(["eval/speed/compressed.py", *MISTRAL, "--words", "420", "--texts", "64"], 300),
    "compiled": Step(
        ["eval/speed/compressed.py", *MISTRAL, "--words", "420", "--texts", "64", "--ways", "dense", "--compiled",
         "dense", "int8", "fp8"], 300,
    ),
}  # fmt: skip


def pack(archive: Path, python: str) -> None:
    """Writes the installed versions of `PACKAGES` for another Python on Linux, and the golden files, to an archive.

    Raises:
        RuntimeError: pip found no wheel of one.
    """
    names = ["torchao==0.18.0", *(f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES)]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)] + ["manylinux2014_x86_64"]
    with tempfile.TemporaryDirectory() as name:
        wheels, site = Path(name, "wheels"), Path(name, "site")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp", "--dest", str(wheels)]
        command += [part for tag in platforms for part in ("--platform", tag)]
        result = subprocess.run([*command, *names], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise RuntimeError(f"pip download failed: {result.stdout}")
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as file:
                parts = [part for part in file.namelist() if not part.startswith(LEFT_OUT) or part.endswith(KEPT)]
                file.extractall(site, parts)
        with tarfile.open(archive, "w:xz", preset=6) as tar:
            tar.add(site, "site")
            if (golden := ROOT.parent / "shared" / "golden").is_dir():
                tar.add(golden, "golden")


def run(names: list[str], out: Path, environment: dict[str, str], deadline: float) -> int:
    """Runs steps in turn, each within its limit and the deadline; returns how many failed."""
    results = []
    for name in names:
        command, seconds = STEPS[name]
        start = time.monotonic()
        if (left := deadline - start) < 10:
            results.append((name, "no time left", 0.0))
            continue
        limit = min(seconds, left)
        with (out / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                outcome = "done" if process.wait(limit) == 0 else f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit:.0f} s"
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with what it started, which would keep the GPU
                    process.wait()
        results.append((name, outcome, time.monotonic() - start))
        lines = (out / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"--- {name}: {outcome}, {results[-1][2]:.0f} s", *lines[-40:], sep="\n", flush=True)
    for name, outcome, seconds in results:
        print(f"{name}: {outcome}, {seconds:.0f} s")
    return sum(outcome != "done" for _, outcome, _ in results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)}; default: all")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write the archive and run nothing")
    parser.add_argument("--python", default="3.12", help="version on the other machine, for --pack")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="of --pack")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the logs")
    parser.add_argument("--seconds", type=int, default=3600, help="for all steps together")
    args = parser.parse_args()
    for name in args.steps:
        if name not in STEPS:
            parser.error(f"there is no step {name!r}; there are {', '.join(STEPS)}")
    if args.pack is not None:
        pack(args.pack, args.python)
        return 0
    deadline = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        path = [name]
        Path(name, "nvembed").symlink_to(ROOT)  # the package, wherever the checkout lies
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if args.unpack is not None:
            with tarfile.open(args.unpack) as tar:
                tar.extractall(name, filter="data")
            path.append(str(Path(name, "site")))
            environment["NVEMBED_GOLDEN_DIR"] = str(Path(name, "golden"))
        environment["PYTHONPATH"] = os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])
        return run(args.steps or list(STEPS), args.out, environment, deadline)


if __name__ == "__main__":
    sys.exit(main())
