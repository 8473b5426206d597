"""Times a training step on random weights against sentence-transformers' and a padded one, in one run.

    python eval/speed/train.py                              # SmolLM2's shape, 10 layers, bf16, this CPU
    python eval/speed/train.py --pooling_type mean
    python eval/speed/train.py --data triplets.jsonl        # as train/data/mine_negatives.py writes them
    python eval/speed/train.py --shape mistral-7b --device cuda --rows 128 --negatives 7 --max_length 512 \
        --chunk_tokens 16384 --mini_batch_size 32 --gradient_checkpointing --ways cached sentence-transformers

Four ways to take the same steps (LoRA on every linear layer, AdamW, InfoNCE over the batch's positives and hard
negatives) from the same decoder on the same triplets:

- `whole`: train/stage1.py, the batch in one piece;
- `cached`: train/stage1.py with gradient caching, `--chunk_tokens` at a time;
- `padded`: queries, positives and hard negatives each padded to their longest, one call each; same model as ours;
- `sentence-transformers`: its trainer with `CachedMultipleNegativesRankingLoss`, `--mini_batch_size` texts at a time,
  the decoder alone with mean pooling.

`whole` and `padded` keep all activations, the other two those of a part and embed twice: compare the two of a pair.
`--mini_batch_size 8` was sentence-transformers' best of five tried on two cores (RESULTS.md). Each way runs as a
command of its own, the ways take turns, and the batch of a round is the same for all ways and steps. Seconds of a step
are those between two lines of the log, the first step left out; medians are reported. Tokens are those of the texts
with their instruction, counted alike for all ways, no padding. Prints a Markdown table. Needs the extras `eval` and
`train`.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from transformers import MistralConfig, MistralModel
from transformers.utils.logging import tqdm

from nvembed import NVEmbedModel
from nvembed.eval.log_history import LOG_FILE
from nvembed.eval.speed.encode import SHAPES, random_model, real_paragraphs, train_tokenizer
from nvembed.texts_nvembed import format_instruction, tokenize


WAYS = ("whole", "cached", "padded", "sentence-transformers")
INSTRUCTION = "Given a sentence, retrieve the paragraph that it begins"
SPEED, SCRIPT = Path(__file__).parent, Path(__file__).parents[2] / "train" / "stage1.py"


class Run(NamedTuple):
    """The figures of one run."""

    seconds: list[float]  # of every step but the first
    losses: list[float]
    peak_gb: float
    share_of_peak: float | None  # on GPUs, of our steps


# --- Model and triplets


def write_models(folder: Path, args: argparse.Namespace) -> NVEmbedModel:
    """Writes `folder`/model, a checkpoint of ours, and `folder`/decoder, its decoder as transformers' own Mistral."""
    dtype = getattr(torch, args.dtype)
    if args.model is not None:
        model = NVEmbedModel.from_pretrained(args.model, dtype=dtype)
    else:
        layers = args.layers or {"smollm2": 10, "mistral-7b": 32}[args.shape]
        model = random_model(args.shape, layers, args.device, dtype, args.pooling_type)
        model.tokenizer = train_tokenizer(real_paragraphs())
    model.save_pretrained(folder / "model")
    if "sentence-transformers" not in args.ways:
        return model
    fields = model.config.text_config.to_dict()
    known = MistralConfig().to_dict().keys() - {"architectures", "model_type", "auto_map"}
    with torch.device("meta"):
        decoder = MistralModel(MistralConfig(**{name: fields[name] for name in known & fields.keys()}))
    decoder.load_state_dict(model.embedding_model.state_dict(), assign=True)
    decoder.save_pretrained(folder / "decoder")
    model.tokenizer.save_pretrained(folder / "decoder")
    return model


def paragraph_triplets(negatives: int) -> list[dict]:
    """A paragraph's first sentence, the rest of it, and other paragraphs, of Python's own reference; no text twice.

    The paragraphs have the lengths that they have: quartiles of 14, 24 and 43 words, the longest 780.
    """
    paragraphs = iter(dict.fromkeys(real_paragraphs()))
    triplets = []
    for paragraph in paragraphs:
        query, _, positive = paragraph.partition(". ")
        others = [text for text, _ in zip(paragraphs, range(negatives))] if positive else []
        if positive and len(others) == negatives:
            triplets.append({"query": query + ".", "positive": positive, "negatives": others})
    return triplets


def read_triplets(path: str | None, negatives: int) -> list[dict]:
    """Triplets with so many hard negatives, in an order of their own.

    Raises:
        ValueError: the file has none.
    """
    if path is None:
        triplets = paragraph_triplets(negatives)
    else:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        triplets = [
            {"query": row["query"], "positive": row["positive"], "negatives": row["negatives"][:negatives]}
            for row in rows
            if len(row["negatives"]) >= negatives
        ]
        if not triplets:
            raise ValueError(f"{path} has no triplet with {negatives} negatives; lower --negatives")
    order = torch.randperm(len(triplets), generator=torch.Generator().manual_seed(0))
    return [triplets[i] for i in order]


# --- One way


def write_job(folder: Path, batch: list[dict], args: argparse.Namespace) -> None:
    """Writes the batch, `job.json` for the baselines, and a recipe for either of our two ways."""
    with (folder / "batch.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(triplet) + "\n" for triplet in batch)
    trainer = {
        "output_dir": str(folder / "run"),
        "max_steps": args.steps,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "bf16": args.dtype == "bfloat16",
        "use_cpu": args.device == "cpu",
        "gradient_checkpointing": args.gradient_checkpointing,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    lora = {"lora_r": 16, "lora_alpha": 32}
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    common = {"dtype": args.dtype, "max_length": args.max_length, "temperature": 0.02, **lora}
    job = common | {
        "model": str(folder / "model"),
        "decoder": str(folder / "decoder"),
        "data": str(folder / "batch.jsonl"),
        "instruction": args.instruction,
        "lora_modules": modules,
        "mini_batch_size": args.mini_batch_size,
        "trainer": trainer | {"per_device_train_batch_size": args.rows},
    }
    (folder / "job.json").write_text(json.dumps(job))
    recipe = (
        common
        | trainer
        | {
            "model_name_or_path": str(folder / "model"),
            "datasets": [{"path": str(folder / "batch.jsonl"), "instruction": args.instruction}],
            "num_negatives": args.negatives,
            "batch_size": args.rows,
            "lora_dropout": 0.0,
            "lora_target_modules": modules,
        }
    )
    (folder / "whole.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "cached.yaml").write_text(yaml.safe_dump(recipe | {"chunk_tokens": args.chunk_tokens}))


def command(way: str, folder: Path) -> list[str]:
    if way in ("whole", "cached"):
        script = [SCRIPT, "--config", folder / f"{way}.yaml"]
    else:
        script = [SPEED / "baselines.py", way, folder / "job.json"]
    return [sys.executable, *map(str, [SPEED / "measured.py", folder / "peak.json", *script])]


def run(way: str, folder: Path, steps: int) -> Run:
    """Runs a way as a command and reads its log.

    Raises:
        RuntimeError: the command failed, or logged another number of steps; with what it printed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(folder / "run", ignore_errors=True)  # of the way before
    process = subprocess.run(
        command(way, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    log_file = folder / "run" / LOG_FILE
    entries = map(json.loads, log_file.read_text().splitlines()) if log_file.is_file() else ()
    logs = [entry for entry in entries if "loss" in entry]
    if process.returncode or len(logs) != steps:
        raise RuntimeError(f"{way}: exit code {process.returncode}, {len(logs)} steps of {steps}\n{process.stdout}")
    shares = [log["share_of_peak"] for log in logs[1:] if "share_of_peak" in log]
    return Run(
        [after["time"] - before["time"] for before, after in zip(logs, logs[1:])],
        [log["loss"] for log in logs],
        json.loads((folder / "peak.json").read_text())["peak_gb"],
        statistics.median(shares) if shares else None,
    )


def check_agreement(losses: dict[str, float], dtype: str) -> None:
    """Checks that our ways and `padded` have the same loss before the first update.

    Raises:
        AssertionError: they have not.
    """
    losses = {way: loss for way, loss in losses.items() if way != "sentence-transformers"}
    tolerance = 0.05 if dtype == "bfloat16" else 1e-3
    if losses and max(losses.values()) - min(losses.values()) > tolerance * max(losses.values()):
        raise AssertionError(f"the first losses of one batch differ: {losses}")


# --- The table


def count_tokens(model: NVEmbedModel, batch: list[dict], args: argparse.Namespace) -> list[int]:
    """Tokens of each text of a batch, as our ways read it."""
    instruction = format_instruction(args.instruction)
    texts = [(row["query"], instruction) for row in batch]
    texts += [(text, "") for row in batch for text in (row["positive"], *row["negatives"])]
    return [len(x.input_ids) for x in tokenize(model.tokenizer, model.config, *map(list, zip(*texts)), args.max_length)]


def table(runs: dict[str, list[Run]], tokens: list[int], rows: int) -> Iterator[str]:
    """A row for each way; `tokens` are those of each round's batch."""
    seconds = {way: [statistics.median(run.seconds) for run in rounds] for way, rounds in runs.items()}

    def times(way: str, baseline: str) -> str:
        """How much faster than a baseline: the median of the rounds' own ratios, and their extremes."""
        if baseline not in seconds:
            return "-"
        ratios = [b / s for b, s in zip(seconds[baseline], seconds[way])]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

    yield "| way | s/step | triplets/s | tokens/s | x padded | x sentence-transformers | peak GB | % of peak FLOP/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for way, rounds in runs.items():
        middle = statistics.median(seconds[way])
        rate = statistics.median(n / s for n, s in zip(tokens, seconds[way]))
        share = rounds[-1].share_of_peak
        yield (
            f"| {way} | {middle:.2f} | {rows / middle:.2f} | {rate:,.0f} | {times(way, 'padded')} | "
            f"{times(way, 'sentence-transformers')} | {max(run.peak_gb for run in rounds):.2f} | "
            f"{'-' if share is None else f'{100 * share:.1f}'} |"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint instead of random weights")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, help="default: 10 of smollm2's 30, all 32 of mistral-7b")
    parser.add_argument("--pooling_type", choices=("latent_attention", "mean"), default="latent_attention")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--data", help="JSONL with query, positive, negatives; default: Python's own reference")
    parser.add_argument("--instruction", default=INSTRUCTION)
    parser.add_argument("--rows", type=int, default=32, help="triplets of a batch")
    parser.add_argument("--negatives", type=int, default=3, help="hard negatives of a triplet")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--chunk_tokens", type=int, default=2048, help="of `cached`")
    parser.add_argument("--mini_batch_size", type=int, default=8, help="texts, of sentence-transformers")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}; the first is not counted, so take 2 or more")
    return args


def main() -> None:
    args = parse_args()
    triplets = read_triplets(args.data, args.negatives)
    if len(triplets) < args.rows * args.rounds:
        sys.exit(
            f"{len(triplets)} triplets with {args.negatives} negatives, {args.rounds} rounds of {args.rows} need "
            f"{args.rounds * args.rows}: lower --rows or --rounds"
        )
    runs: dict[str, list[Run]] = {way: [] for way in args.ways}
    tokens, lengths = [], []
    with tempfile.TemporaryDirectory() as name, tqdm(total=args.rounds * len(args.ways), desc="Timing") as progress:
        folder = Path(name)
        model = write_models(folder, args).cpu()
        torch.cuda.empty_cache()  # the ways have the GPU to themselves; does nothing without CUDA
        for i in range(args.rounds):
            batch = triplets[i * args.rows : (i + 1) * args.rows]
            lengths += (counts := count_tokens(model, batch, args))
            tokens.append(sum(counts))
            write_job(folder, batch, args)
            for way in args.ways:
                runs[way].append(run(way, folder, args.steps))
                progress.update()
            check_agreement({way: rounds[-1].losses[0] for way, rounds in runs.items()}, args.dtype)

    source = args.model or f"{args.shape}, random weights"
    decoder = model.config.text_config
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    quartiles = "/".join(f"{q:.0f}" for q in statistics.quantiles(lengths, n=4))
    print(
        f"{source}, {decoder.num_hidden_layers} layers, {model.config.pooling_type}, {args.dtype}; {device}, "
        f"{platform.processor() or platform.machine()}"
    )
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {date.today()}, {args.rounds} rounds")
    print(
        f"{args.rows} x (1 + 1 + {args.negatives}) texts of {quartiles} tokens (quartiles), longest {max(lengths)}; "
        f"{args.data or 'the Python reference'}"
    )
    print("\n".join(table(runs, tokens, args.rows)))


if __name__ == "__main__":
    main()
