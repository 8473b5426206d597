"""`DATA.md` of a build: a table and two random triplets of every set for a person to look at, and what was dropped."""

import random
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
from matplotlib.figure import Figure

from nvembed.eval.files import whole
from nvembed.eval.markdown_table import markdown_table


SHOWN = 2  # random triplets of a set
CHARACTERS = 300  # of a text that are shown
# Counts of what is there, not of what was left out.
KEPT = (
    "rows", "pairs", "documents", "triplets", "negatives", "further positives", "contradictions, as negatives",
    "no document ranked", "fewer negatives", "triplets without a negative",
)  # fmt: skip
PICTURE = "dropped.png"


def dropped_by(counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """What each step left out, by reason."""
    return {step: {why: n for why, n in its.items() if why not in KEPT and n} for step, its in counts.items()}


def write_page(sets: Mapping[str, dict], manifest: Mapping, output: Path) -> None:
    """Writes `DATA.md` and its picture into the folder of a build.

    Args:
        sets: of the manifest.
    """
    rows = [["set", "kind", "source", "mteb", "rows", "pairs", "triplets", "negatives each"]]
    for name, one in sets.items():
        source, mined = one["source"], one["counts"]["mine"]
        triplets = mined.get("triplets", 0)
        each = f"{mined.get('negatives', 0) / triplets:.2f}" if triplets else "-"
        pairs = one["counts"]["pairs"]
        mteb = ", ".join(source.get("mteb") or []) or "-"
        numbers = [f"{count:,}" for count in (pairs.get("rows", 0), pairs["pairs"], triplets)]
        rows.append([name, one["kind"], Path(source["path"]).name, mteb, *numbers, each])
    text = "# Training data\n\nBuilt by `train/build_data.py` of nvembed. Teacher: " + manifest["teacher"]
    text += f". {manifest['num_negatives']} hard negatives asked for, seed {manifest['seed']}.\n\n"
    text += markdown_table(rows, 4) + "\n\n## What was left out\n\n"
    reasons = [["set", "step", "reason", "texts"]]
    for name, one in sets.items():
        for step, its in dropped_by(one["counts"]).items():
            reasons += [[name, step, why, f"{count:,}"] for why, count in its.items()]
    if len(reasons) > 1:
        draw_dropped(sets, output / PICTURE)
        text += markdown_table(reasons, 3) + f"\n\n![Texts left out by step]({PICTURE})\n"
    else:
        text += "Nothing.\n"
    text += f"\n## {SHOWN} random triplets of every set\n"
    for name, one in sets.items():
        text += f"\n### {name}\n"
        for triplet in random_triplets(output / name, list(one["files"]), manifest["seed"]):
            negatives = triplet["negatives"]
            lines = [("instruction", triplet["instruction"] or "none"), ("query", triplet["query"])]
            lines += [("positive", triplet["positive"]), *(("negative", text) for text in negatives[:3])]
            text += "\n" + "\n".join(f"- {label}: {shorten(value)}" for label, value in lines)
            text += f"\n- and {len(negatives) - 3} more negatives\n" if len(negatives) > 3 else "\n"
    with whole(output / "DATA.md") as partial:
        partial.write_text(text, encoding="utf-8")


def random_triplets(folder: Path, files: list[str], seed: int) -> list[dict]:
    """Triplets of a set, drawn over all its shards."""
    sizes = [pq.read_metadata(folder / file).num_rows for file in files]
    chosen = sorted(random.Random(seed).sample(range(sum(sizes)), min(SHOWN, sum(sizes))))
    triplets, start = [], 0
    for file, size in zip(files, sizes):
        here = [place - start for place in chosen if start <= place < start + size]
        if here:
            triplets += pq.read_table(folder / file).take(here).to_pylist()
        start += size
    return triplets


def shorten(text: str) -> str:
    line = " ".join(text.split())
    shown = line if len(line) <= CHARACTERS else line[:CHARACTERS] + " ..."
    return f"`` {shown.replace('``', '` `')} ``" if shown else "none"


def _texts_dropped(one: Mapping, step: str) -> int:
    its = dropped_by(one["counts"])[step]
    return sum(count for why, count in its.items() if why != "contaminated pairs")  # their texts are counted


def draw_dropped(sets: Mapping[str, dict], path: Path) -> None:
    """A bar for each step of each set: how many texts it left out."""
    names = list(sets)
    steps = {
        "pairs": "reading: not sampled, repeated, without a partner",
        "decontaminate": "too close to evaluation sets",
        "mine": "checks after mining",
    }
    figure = Figure(figsize=(7, 1.2 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(steps)
    for offset, (step, label) in enumerate(steps.items()):
        places = [place + (offset - 1) * height for place in range(len(names))]
        widths = [_texts_dropped(sets[name], step) for name in names]
        bars = axes.barh(places, widths, height, label=label)
        axes.bar_label(bars, [f"{width:,}" if width else "" for width in widths], padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=10)
    axes.set(xlabel="texts left out (logarithmic from 10)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=1)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
