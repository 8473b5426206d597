"""What checkpoints cost: bytes on disk, memory and texts per second, each in processes of its own that take turns.

python eval/speed/checkpoints.py runs/stage2 runs/int8 [--texts 256] [--rounds 3]

Memory: that of the weights as they are stored, by count, and the peak of encoding, above what the process had before
loading: its resident set or, on a GPU, torch's own count. Prints JSON, one object a checkpoint, with medians.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from nvembed import NVEmbedModel
from nvembed.eval.peak_memory import peak_memory, reset_peak_memory
from nvembed.eval.speed.encode import real_texts, timed
from nvembed.eval.stored import stored_bytes


def measure(checkpoint: str, texts: int, words: int, device: str) -> dict[str, float]:
    """One round, in this process."""
    disable_progress_bar()
    place = torch.device(device)
    _, passages = real_texts(words)
    prompts = [passages[i % len(passages)] for i in range(texts)]
    gc.collect()
    reset_peak_memory(place)
    before = peak_memory(place)  # what is there now
    model = NVEmbedModel.from_pretrained(checkpoint, dtype="auto").to(place).eval()
    model.encode(prompts[:8], max_length=512)
    gc.collect()
    reset_peak_memory(place)
    seconds = timed(lambda: model.encode(prompts, max_length=512), place)
    peak = peak_memory(place) - before
    return {"weights_gb": stored_bytes(model) / 1e9, "peak_gb": peak, "texts_per_second": texts / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--words", type=int, default=60, help="words of a text, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--once", action="store_true", help="measure the first checkpoint once, in this process")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure(args.checkpoints[0], args.texts, args.words, args.device)))
        return
    for checkpoint in args.checkpoints:
        if not any(Path(checkpoint).glob("*.safetensors")):
            parser.error(f"{checkpoint} is no folder with *.safetensors files")
    options = [f"--texts={args.texts}", f"--words={args.words}", f"--device={args.device}", "--once"]
    rounds: dict[str, list[dict]] = {checkpoint: [] for checkpoint in args.checkpoints}
    for _ in range(args.rounds):
        for checkpoint, results in rounds.items():
            command = [sys.executable, __file__, checkpoint, *options]
            results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    for checkpoint, results in rounds.items():
        medians = {name: statistics.median(result[name] for result in results) for name in results[0]}
        size = sum(path.stat().st_size for path in Path(checkpoint).glob("*.safetensors"))
        print(json.dumps({"checkpoint": checkpoint, "disk_gb": size / 1e9} | medians))


if __name__ == "__main__":
    main()
