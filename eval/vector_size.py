"""Score by bytes a vector: fewer dimensions, int8 and binary embeddings, centred or not, on tasks as run_mteb.py's.

    python eval/vector_size.py --model DIR_OR_REPO --tasks my-tasks.yaml --calibration corpus.jsonl --output_dir OUT

Every text is embedded once. A variant keeps the first dimensions (trained so by `matryoshka_dims`), normalizes them
and rounds them by sentence-transformers' `quantize_embeddings`: int8 within each dimension's range over the
calibration texts, or binary, one bit a dimension. Centred variants first subtract the mean embedding of the
calibration texts, which should be texts of your own, not the tasks'. Rounded vectors are compared by the cosine of
their codes, bits as -1 and 1. Writes vector_size.json after every variant, so that a stopped run goes on, and
vector_size.png; prints a table.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path

import mteb
import numpy as np
import torch
from matplotlib.figure import Figure
from mteb.models.model_meta import ScoringFunction
from sentence_transformers.quantization import quantize_embeddings

from nvembed.eval import results
from nvembed.eval.arguments import EvaluationArguments, run_script
from nvembed.eval.data.corpus import digest_documents, read_corpus
from nvembed.eval.encoder import TaskEncoder
from nvembed.eval.files import write_json
from nvembed.eval.markdown_table import markdown_table
from nvembed.eval.measure import measure
from nvembed.eval.models import normalized, scaled_to_1
from nvembed.eval.processes import Embed
from nvembed.eval.spread import mean_cosine
from nvembed.eval.tasks.lookup import instructions_for, select_tasks


BITS = {"float32": 32, "int8": 8, "binary": 1}  # of a dimension
COLORS = {
    "float32": "#4477aa",
    "int8": "#ee6677",
    "binary": "#228833",
}  # Paul Tol's, told apart by colour-blind readers


@dataclass
class VectorSizeArguments(EvaluationArguments):
    tasks: list[str] = field(default_factory=list, metadata={"help": "Tasks of mteb, or YAML files of your own."})
    calibration: str | None = field(
        default=None, metadata={"help": "Corpus (see embed_corpus.py) for ranges and mean; not the tasks' own."}
    )
    calibration_split: str = field(default="corpus", metadata={"help": "Its split, if it is a folder."})
    calibration_texts: int = field(default=1500, metadata={"help": "At most this many of its texts."})
    dims: list[int] | None = field(
        default=None, metadata={"help": "Dimensions to keep; None: all, and the powers of 2 from 32 below."}
    )
    precisions: list[str] = field(default_factory=lambda: list(BITS), metadata={"help": "float32, int8, binary."})

    def __post_init__(self):
        super().__post_init__()
        if not self.tasks:
            raise ValueError("tasks is empty; name tasks of mteb, or a YAML file of your own")
        if unknown := [name for name in self.precisions if name not in BITS]:
            raise ValueError(f"precisions has {unknown[0]!r}; there are {', '.join(BITS)}")
        if self.calibration is None and "int8" in self.precisions:
            raise ValueError("int8 needs calibration texts for its ranges: name a corpus, or leave int8 out")
        if self.calibration_texts < 2:
            raise ValueError(f"calibration_texts is {self.calibration_texts}; it must be 2 or more")


@dataclass(frozen=True)
class Variant:
    """One way to store vectors."""

    dims: int
    precision: str
    is_centred: bool

    @property
    def bytes(self) -> float:
        return self.dims * BITS[self.precision] / 8

    def __str__(self) -> str:
        return f"{self.dims} {self.precision}{' centred' if self.is_centred else ''}"

    def apply(self, embeddings: np.ndarray, calibration: np.ndarray | None) -> np.ndarray:
        """Vectors as they would be compared, fp32 `[texts, dims]`.

        Args:
            embeddings: normalized, `[texts, width]`.
            calibration: normalized embeddings of the calibration texts, `[calibration texts, width]`.
        """
        if self.is_centred:
            mean = calibration.mean(0)
            embeddings, calibration = embeddings - mean, calibration - mean
        vectors = scaled_to_1(embeddings[:, : self.dims])
        if self.precision == "float32":
            return vectors
        if self.precision == "binary":
            bits = np.unpackbits(quantize_embeddings(vectors, "ubinary"), axis=1, count=self.dims)
            return 2.0 * bits.astype(np.float32) - 1
        known = scaled_to_1(calibration[:, : self.dims])
        ranges = np.stack([known.min(0), known.max(0)])
        ranges[1] = np.maximum(ranges[1], ranges[0] + 1e-9)
        # Values outside of the ranges would wrap around.
        return quantize_embeddings(vectors.clip(*ranges), "int8", ranges=ranges).astype(np.float32)


def remembered(embed: Embed) -> Embed:
    """Wraps an `Embed` to embed every text with its prefix once."""
    known: dict[tuple[str, str], np.ndarray] = {}

    def recall(texts: list[str], prefix: str) -> np.ndarray:
        if missing := [text for text in texts if (prefix, text) not in known]:
            known.update(zip(((prefix, text) for text in missing), embed(missing, prefix)))
        return np.stack([known[prefix, text] for text in texts])

    return recall


def variants(width: int, args: VectorSizeArguments) -> list[Variant]:
    """
    Raises:
        ValueError: there are not as many dimensions, or bits do not fill bytes.
    """
    dims = list(dict.fromkeys([width, *(args.dims or (2**n for n in range(20, 4, -1) if 2**n < width))]))
    for number in dims:
        if not 0 < number <= width or (number % 8 and "binary" in args.precisions):
            raise ValueError(f"dims has {number}; it must be 1 to {width}, and for binary a multiple of 8")
    centred = (False, True) if args.calibration is not None else (False,)
    return [Variant(*choice) for choice in product(dims, args.precisions, centred)]


def run(args: VectorSizeArguments) -> list[dict]:
    """One entry a variant: what it is, bytes of a vector, scores of this run's tasks in percent and their average.

    Raises:
        ValueError: as `select_tasks`, `load_model`, `read_corpus`, `claim_folder`, `variants` and `measure`.
    """
    tasks = select_tasks(args.tasks)
    texts = None
    if args.calibration is not None:
        corpus = read_corpus(args.calibration, args.calibration_split)
        texts = [text for _, text in islice(corpus, args.calibration_texts)]
        if len(texts) < 2:
            raise ValueError(f"calibration {args.calibration} holds {len(texts)} texts; two or more are needed")
    model = args.load()
    instructions = instructions_for(tasks) if model.prompts is None else {}
    embed = remembered(normalized(model.embed))
    chosen = variants(embed(["one text"], "").shape[1], args)
    options = {name: getattr(args, name) for name in ("calibration", "calibration_split", "calibration_texts")}
    folder = results.claim_folder(args.output_dir, args.settings(model) | {"mteb": mteb.__version__} | options, {})
    conditions = {
        t.metadata.name: results.conditions(t, instructions.get(t.metadata.name)) | {"revision": t.metadata.revision}
        for t in tasks
    }
    calibration = None if texts is None else embed(texts, model.document_prefix())
    file = folder / "vector_size.json"
    done = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"mean_cosine": None, "variants": {}}
    if texts is not None:
        digest = digest_documents(("", text) for text in texts)
        if done.setdefault("calibration", digest) != digest:
            raise ValueError(f"{file} is of other texts of {args.calibration}; name another --output_dir")
    if calibration is not None:
        done["mean_cosine"] = mean_cosine(torch.from_numpy(calibration))
    compared, entries = replace(model, similarity=ScoringFunction.COSINE), []  # codes have no length of their own
    for variant in chosen:
        before = done["variants"].get(str(variant), {})
        known = {
            name: value
            for name, value in before.get("scores", {}).items()
            # Else of other data, or another instruction. Tasks that this run has not stay as they are.
            if name not in conditions or before["conditions"][name] == conditions[name]
        }
        missing = [task for task in tasks if task.metadata.name not in known]
        if missing:
            encoder = TaskEncoder(
                compared, lambda texts, prefix, v=variant: v.apply(embed(texts, prefix), calibration), instructions
            )
            measured = measure(missing, encoder, None)
            for task in missing:
                known[task.metadata.name] = 100 * results.main_score(task, measured[task.metadata.name])
        entry = {"dims": variant.dims, "precision": variant.precision, "is_centred": variant.is_centred}
        entry |= {"bytes": variant.bytes, "conditions": before.get("conditions", {}) | conditions, "scores": known}
        done["variants"][str(variant)] = entry
        write_json(file, done)
        scores = {name: known[name] for name in conditions}
        entries.append(entry | {"scores": scores, "average": statistics.mean(scores.values())})
    draw(entries, folder / "vector_size.png")
    if done["mean_cosine"] is not None:
        print(f"Mean cosine of two calibration texts: {done['mean_cosine']:.2f}\n")
    print(table(entries))
    return entries


def table(entries: Sequence[dict]) -> str:
    rows = [["dimensions", "precision", "bytes", "average", "centred"]]
    plain = {(e["dims"], e["precision"]): e for e in entries if not e["is_centred"]}
    centred = {(e["dims"], e["precision"]): e for e in entries if e["is_centred"]}
    for key, entry in plain.items():
        other = f"{centred[key]['average']:.2f}" if key in centred else "-"
        rows.append([str(entry["dims"]), entry["precision"], f"{entry['bytes']:g}", f"{entry['average']:.2f}", other])
    return markdown_table(rows, 2)


def draw(entries: Sequence[dict], path: Path) -> None:
    """The curve: average by bytes of a vector, a line for each precision, dashed where centred."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for precision, is_centred in product(BITS, (False, True)):
        points = sorted(
            (entry["bytes"], entry["average"])
            for entry in entries
            if entry["precision"] == precision and entry["is_centred"] == is_centred
        )
        if points:
            style = {"linestyle": "--", "marker": "s"} if is_centred else {"marker": "o"}
            label = f"{precision}, centred" if is_centred else precision
            axes.plot(*zip(*points), color=COLORS[precision], markersize=4, label=label, **style)
    axes.set_xscale("log", base=2)
    ticks = sorted({entry["bytes"] for entry in entries})
    axes.set_xticks([tick for i, tick in enumerate(ticks) if i % 2 == 0 or len(ticks) < 10])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="bytes a vector", ylabel="average score, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script("vector_size", VectorSizeArguments, run)
