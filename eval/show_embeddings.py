"""Maps of embeddings in two dimensions, before and after training, linked: pictures, and one page that works offline.

    python eval/show_embeddings.py --models runs/base runs/stage2 --data data/banking77 --output_dir runs/maps

Each model's map is a projection of its own (PCA, or t-SNE by scikit-learn on cosine distance), turned to lie on the
first's as well as it can and scaled to the same size. In the page, the text under the pointer is marked in every map,
a class can be singled out, and colours follow the reader's light or dark scheme; shapes tell classes apart without
colour. Distances in a map are hints: beside it stand figures of the embeddings themselves, the silhouette of the
classes and the mean cosine.
"""

import html
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from transformers import HfArgumentParser

from nvembed.eval.commands import errors_in_one_line
from nvembed.eval.data.labelled import LabelledArguments
from nvembed.eval.files import write_json
from nvembed.eval.models import load_model, scaled_to_1
from nvembed.eval.plots import COLORS, names_of
from nvembed.eval.spread import effective_rank, mean_cosine


logger = logging.getLogger(__name__)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # of matplotlib; the page draws the same shapes
PAGE = Path(__file__).with_name("show_embeddings.html")


@dataclass
class EmbeddingsArguments(LabelledArguments):
    models: list[str] = field(kw_only=True, metadata={"help": "Checkpoints or other models, in the order of the maps."})
    output_dir: str = field(kw_only=True, metadata={"help": "Folder for pictures, page and figures."})
    names: list[str] | None = field(default=None, metadata={"help": "Of the maps; None: the models'."})
    method: Literal["tsne", "pca"] = field(
        default="tsne", metadata={"help": "tsne keeps neighbours together, pca keeps distances and directions."}
    )
    perplexity: float = field(default=30.0, metadata={"help": "Neighbours that t-SNE looks at."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text with its instruction."})

    def __post_init__(self):
        self.names = names_of(self.models, self.names)


@dataclass
class Map:
    """One model's.

    Args:
        points: `[texts, 2]`, within -1 to 1.
        figures: of the embeddings themselves, by name.
    """

    name: str
    points: np.ndarray
    figures: dict[str, float]


def project(embeddings: np.ndarray, args: EmbeddingsArguments) -> np.ndarray:
    """`[texts, width]` of unit length to `[texts, 2]`, centred.

    Raises:
        ValueError: the perplexity is not below the number of texts.
    """
    if args.method == "pca":
        return PCA(2, random_state=args.seed).fit_transform(embeddings)
    if args.perplexity >= len(embeddings):
        raise ValueError(f"perplexity is {args.perplexity:g} for {len(embeddings)} texts; lower it, or raise samples")
    tsne = TSNE(perplexity=args.perplexity, metric="cosine", init="pca", random_state=args.seed)
    points = tsne.fit_transform(embeddings)
    return points - points.mean(0)


def make_maps(embeddings: list[np.ndarray], labels: list[str], args: EmbeddingsArguments) -> list[Map]:
    """A map of each model's embeddings, all but the first turned onto the first."""
    maps = []
    for name, vectors in zip(args.names, embeddings, strict=True):
        points = project(vectors, args)
        points /= np.abs(points).max()
        if maps:
            turn, _ = orthogonal_procrustes(points, maps[0].points)
            points = points @ turn
            points /= np.abs(points).max()
        unit = torch.from_numpy(vectors)
        figures = {
            "silhouette": float(silhouette_score(vectors, labels, metric="cosine")),
            "mean cosine": mean_cosine(unit),
            "effective rank": effective_rank(unit),
        }
        maps.append(Map(name, points, figures))
    return maps


def caption(one: Map) -> str:
    return f"{one.name}: {', '.join(spelled(one))}"


def spelled(one: Map) -> list[str]:
    return [
        f"{name} {value:.1f}" if name == "effective rank" else f"{name} {value:.2f}"
        for name, value in one.figures.items()
    ]


def draw(maps: list[Map], labels: list[str], path: Path) -> None:
    """All maps beside each other, a colour and a shape a class."""
    classes = sorted({*labels})
    figure = Figure(figsize=(4.6 * len(maps), 4.6 + 0.22 * (len(classes) // 3 + 1)), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps):
        for place, label in enumerate(classes):
            points = one.points[[own == label for own in labels]]
            # A ninth class has the first's colour and another shape.
            color, marker = COLORS[place % len(COLORS)], MARKERS[(place + place // len(COLORS)) % len(MARKERS)]
            axes.scatter(
                *points.T, s=16, c=color, marker=marker, alpha=0.8, edgecolors="#333333", linewidths=0.25, label=label
            )
        axes.set_title(one.name, fontsize=11)
        axes.text(0.01, 0.99, "\n".join(spelled(one)), transform=axes.transAxes, fontsize=8, va="top", color="#444444")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set(aspect="equal", xlim=(-1.06, 1.06), ylim=(-1.06, 1.06))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def write_page(maps: list[Map], texts: list[str], labels: list[str], args: EmbeddingsArguments, path: Path) -> None:
    """One HTML file with all data, drawing code and styles in it."""
    classes = sorted({*labels})
    data = {
        "maps": [{"caption": caption(one), "points": one.points.round(4).tolist()} for one in maps],
        "texts": [" ".join(text.split())[:300] for text in texts],
        "labels": [classes.index(label) for label in labels],
        "classes": classes,
        "colors": COLORS,
    }
    told = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text ends the script
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(f"Embeddings of {Path(args.data).name}: {', '.join(args.names)}"))
    path.write_text(page.replace("{{data}}", told), encoding="utf-8")


def main(args: EmbeddingsArguments) -> None:
    texts, labels = map(list, zip(*args.read()))
    embeddings = []
    for name in args.models:
        model = load_model(name, None, args.max_length, show_progress_bar=True)
        prefix = model.query_prefix(args.instruction)
        if args.instruction and model.prompts is not None:
            logger.warning("%s has prompts of its own: it reads %r before each text, not the instruction", name, prefix)
        embeddings.append(scaled_to_1(model.embed(texts, prefix).astype(np.float32)))
    maps = make_maps(embeddings, labels, args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    draw(maps, labels, folder / "embeddings.png")
    write_page(maps, texts, labels, args, folder / "embeddings.html")
    write_json(folder / "embeddings.json", {one.name: one.figures for one in maps})
    print("\n".join(map(caption, maps)))
    print(f"{folder / 'embeddings.html'} opens in any browser; {folder / 'embeddings.png'}")


if __name__ == "__main__":
    with errors_in_one_line():
        main(*HfArgumentParser(EmbeddingsArguments).parse_args_into_dataclasses())
