"""Which latents a model's tokens attend to, class by class (paper, Appendix D): heat maps, and what separates classes.

    python eval/show_latents.py --model runs/stage2 --beside runs/base --data data/reviews --output_dir runs/latents

Attention over the latents, the mean over a text's tokens (its instruction left out, as in the pooling), for each head:
heat maps of up to four classes, and of the separation of the two that the model tells apart best. Of all latents of all
heads, those that separate two classes best, by the difference of means in standard deviations, with the tokens that
attend to them most. Separation is compared with what shuffled labels give, and with a model `--beside` it, such as the
untrained one: latents always differ a little.
"""

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.eval.commands import errors_in_one_line
from nvembed.eval.data.labelled import LabelledArguments
from nvembed.eval.files import write_json, write_text
from nvembed.eval.latents import (
    SHUFFLES,
    Attention,
    attention,
    by_chance,
    check_has_latents,
    ends,
    maps,
    of_class,
    separation,
    top_tokens,
    used_latents,
)
from nvembed.eval.markdown_table import markdown_table
from nvembed.eval.models import find_config
from nvembed.eval.plots import names_of
from nvembed.modeling_nvembed import NVEmbedModel


DRAWN = 24  # latents of a head in a heat map: among hundreds, one that matters would be a hair


@dataclass
class LatentsArguments(LabelledArguments):
    model: str = field(kw_only=True, metadata={"help": "Checkpoint with latent attention: folder or Hub name."})
    output_dir: str = field(kw_only=True, metadata={"help": "Folder for pictures, table and figures."})
    beside: str | None = field(default=None, metadata={"help": "A second checkpoint, such as the untrained one."})
    names: list[str] | None = field(default=None, metadata={"help": "Of the models, two with --beside; None: theirs."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text with its instruction."})
    top: int = field(default=8, metadata={"help": "Latents to name, and tokens of each."})

    def __post_init__(self):
        self.names = names_of(self.models, self.names)
        if self.top < 1:
            raise ValueError(f"top is {self.top}; it must be 1 or more")

    @property
    def models(self) -> list[str]:
        return [self.model] if self.beside is None else [self.model, self.beside]


def describe(model: NVEmbedModel, name: str, seen: Attention, labels: list[str], args: LatentsArguments) -> dict:
    """What is seen of one model, as JSON has it."""
    classes = sorted({*labels})
    pairs = []
    for pair in combinations(classes, 2):
        scores = separation(seen.of_texts, labels, pair)
        best = scores.abs().flatten().argsort(descending=True)[: args.top].tolist()
        width = scores.shape[1]
        pairs.append(
            {
                "classes": pair,
                "largest": scores.abs().max().item(),
                "latents": [
                    {
                        "head": place // width, "latent": place % width, "separation": scores.flatten()[place].item(),
                        "attention": [
                            of_class(seen.of_texts, labels, label).mean(0).flatten()[place].item()
                            for label in pair
                        ],
                        "tokens": top_tokens(model, seen.tokens, place // width, place % width, args.top),
                    }
                    for place in best
                ],
            }
        )  # fmt: skip
    pairs.sort(key=lambda one: -one["largest"])
    known = {"model": name, "latents_used": used_latents(seen.of_texts).tolist(), "pairs": pairs}
    return known | {"by_chance": by_chance(seen.of_texts, labels, args.seed)}


def draw(seen: dict[str, Attention], labels: list[str], pair: tuple[str, str], path: Path) -> None:
    """A row a model: attention of up to four classes, and how far the pair is apart; one scale for all models.

    Of each head the `DRAWN` latents with the most attention, and those at both ends of the separation.
    """
    others = [label for label in sorted({*labels}) if label not in pair]
    shown = sorted([*pair, *others[:2]])
    drawn = {name: maps(one.of_texts, labels, shown, pair) for name, one in seen.items()}
    shares = [of_classes[..., :DRAWN] for of_classes, _ in drawn.values()]
    lowest = max(1e-6, min(share.min().item() for share in shares))  # a share can be 0, which has no logarithm
    highest = max(share.max().item() for share in shares)  # one latent may get ten times the others' share
    scale = LogNorm(lowest, max(highest, 2 * lowest))
    bound = max(apart.abs().max().item() for _, apart in drawn.values()) or 1e-9
    look = {"aspect": "auto", "interpolation": "nearest"}
    figure = Figure(figsize=(3.1 * (len(shown) + 1), 2.2 * len(seen) + 0.4), layout="constrained")
    grid = figure.subplots(len(seen), len(shown) + 1, squeeze=False)
    for row, (name, (_, apart)), of_classes in zip(grid, drawn.items(), shares):
        count = apart.shape[-1]
        for axes, label, share in zip(row, shown, of_classes):
            attended = axes.imshow(share.clamp(min=lowest), cmap="cividis", norm=scale, **look)
            axes.set_title(f"{name}: {label}", fontsize=9)
            axes.set_xlabel(f"{min(DRAWN, count)} of {count} latents, most attended first", fontsize=8)
        separated = row[-1].imshow(ends(apart, DRAWN), cmap="PuOr", vmin=-bound, vmax=bound, **look)
        row[-1].set_title(f"{name}: separation", fontsize=9)
        row[-1].set_xlabel("latents by separation" + ("" if count <= DRAWN else ": highest, lowest"), fontsize=8)
        if count > DRAWN:
            row[-1].axvline(DRAWN // 2 - 0.5, color="black", linewidth=0.8, linestyle=":")
        for axes in row:
            axes.set_xticks([])
            axes.tick_params(labelsize=7)
        row[0].set_ylabel("head", fontsize=8)
    bars = [
        figure.colorbar(attended, ax=grid[:, -2], label="attention"),
        figure.colorbar(separated, ax=grid[:, -1], label=f"{pair[0]} - {pair[1]}, standard deviations"),
    ]
    for bar in bars:
        bar.ax.tick_params(labelsize=7, which="both")
        bar.ax.yaxis.label.set_size(8)
    figure.savefig(path, dpi=120)


def page(found: list[dict], args: LatentsArguments) -> str:
    """Markdown: how far the classes are apart beside chance, and the latents that separate the first model's best."""
    rows = [["model", "classes", "largest separation", "of shuffled labels", "latents a head spreads over"]]
    for one in found:
        used = one["latents_used"]
        for pair in one["pairs"]:
            spread = f"{min(used):.0f} to {max(used):.0f}"
            figures = [f"{pair['largest']:.2f}", f"{one['by_chance']:.2f}", spread]
            rows.append([one["model"], " / ".join(pair["classes"]), *figures])
    lines = [
        "# Attention over the latents",
        "",
        f"{'; '.join(f'{name}: {path}' for name, path in zip(args.names, args.models))}. "
        f"Texts of {args.data}, up to {args.samples} a class. Separation is the difference of two classes' mean "
        "attention in standard deviations: the largest of all heads and latents, beside the largest of any two "
        f"classes under shuffled labels (mean of {SHUFFLES} shuffles).",
        "",
    ]
    lines += [markdown_table(rows, 2), "", "![Attention by class](latents.png)", ""]
    for one in found:
        best = one["pairs"][0]
        rows = [["head", "latent", *best["classes"], "separation", "tokens that attend to it most, and how much"]]
        for latent in best["latents"]:
            shares = [f"{share:.4f}" for share in latent["attention"]]
            tokens = ", ".join(f"`{token}`" for token in latent["tokens"])
            rows.append([str(latent["head"]), str(latent["latent"]), *shares, f"{latent['separation']:+.2f}", tokens])
        lines += [f"## {one['model']}: {' / '.join(best['classes'])}", "", markdown_table(rows, 2), ""]
    return "\n".join(lines)


def main(args: LatentsArguments) -> None:
    texts, labels = zip(*args.read())
    folder, seen, found = Path(args.output_dir), {}, []
    for path in args.models:  # before any work
        saved, _ = find_config(path, None)
        check_has_latents(NVEmbedConfig(**saved), path)
    for name, path in zip(args.names, args.models):
        model = NVEmbedModel.from_pretrained(path).eval()
        seen[name] = attention(model, list(texts), args.instruction, args.max_length)
        found.append({"checkpoint": path} | describe(model, name, seen[name], list(labels), args))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "latents.json", {"data": args.data, "texts": len(texts), "models": found})
    best = found[0]["pairs"][0]["classes"]
    draw(seen, list(labels), best, folder / "latents.png")
    text = page(found, args)
    write_text(folder / "LATENTS.md", text)
    print(text)


if __name__ == "__main__":
    with errors_in_one_line():
        main(*HfArgumentParser(LatentsArguments).parse_args_into_dataclasses())
