"""Which latents a model's tokens attend to, class by class (paper, Appendix D): heat maps, and what separates classes.

    python eval/show_latents.py --model runs/stage2 --beside runs/base --data data/reviews --output_dir runs/latents

Attention over the latents, the mean over a text's tokens (its instruction left out, as in the pooling), for each head:
heat maps of up to four classes, and of the separation of the two that the model tells apart best. Of all latents of all
heads, those that separate two classes best, by the difference of means in standard deviations, with the tokens that
attend to them most. Separation is compared with what shuffled labels give, and with a model `--beside` it, such as the
untrained one: latents always differ a little.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from transformers import HfArgumentParser

from nvembed.eval.commands import errors_in_one_line
from nvembed.eval.data.labelled import LabelledArguments
from nvembed.eval.files import write_json
from nvembed.eval.markdown_table import markdown_table
from nvembed.modeling_nvembed import FoldedLatentAttention, NVEmbedModel
from nvembed.texts_nvembed import PackedLayout, format_instruction, length_sorted_batches, pack, tokenize


SHUFFLES = 20  # of the labels, to see what chance separates


@dataclass
class LatentsArguments(LabelledArguments):
    model: str = field(kw_only=True, metadata={"help": "Checkpoint with latent attention: folder or Hub name."})
    output_dir: str = field(kw_only=True, metadata={"help": "Folder for pictures, table and figures."})
    beside: str | None = field(default=None, metadata={"help": "A second checkpoint, such as the untrained one."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text with its instruction."})
    top: int = field(default=8, metadata={"help": "Latents to name, and tokens of each."})


@dataclass
class Attention:
    """What texts attend to.

    Args:
        of_texts: mean over a text's tokens, `[texts, heads, latents]`; rows of latents add up to 1.
        tokens: token id -> (how often it occurs, the sum of its attention `[heads, latents]`).
    """

    of_texts: Tensor
    tokens: dict[int, tuple[int, Tensor]]


@torch.no_grad()
def attention(model: NVEmbedModel, texts: list[str], instruction: str, max_length: int) -> Attention:
    """Attention of every token over the latents, from the folded form, whose softmax it is.

    Raises:
        ValueError: the model has no latents.
    """
    if model.config.pooling_type != "latent_attention":
        raise ValueError(
            f"the model's pooling_type is {model.config.pooling_type!r}; only latent_attention has latents"
        )
    block = model.latent_attention_model
    if not isinstance(block, FoldedLatentAttention):
        block = FoldedLatentAttention.fold(block, model.config.latent_attention_config)
    prefixes = [format_instruction(instruction)] * len(texts)
    tokenized = tokenize(model.tokenizer, model.config, texts, prefixes, max_length)
    of_texts = torch.zeros(len(texts), block.heads, block.to_scores.out_features // block.heads)
    counts, sums = Counter(), {}
    for batch in length_sorted_batches([len(text.input_ids) for text in tokenized], 4096):
        chunk = pack([tokenized[i] for i in batch])
        states = model.embedding_model(chunk["input_ids"], PackedLayout(chunk["lengths"]))
        scores = block.to_scores(block.norm(states.float())).unflatten(-1, (block.heads, -1))
        weights = scores.softmax(-1).float()  # [tokens, heads, latents]
        is_pooled = chunk["pool_mask"].bool()
        for i, own, ids, kept in zip(
            batch, weights.split(chunk["lengths"]), chunk["input_ids"].split(chunk["lengths"]),
            is_pooled.split(chunk["lengths"]), strict=True,
        ):  # fmt: skip
            of_texts[i] = own[kept].mean(0)
            for token, weight in zip(ids[kept].tolist(), own[kept]):
                counts[token] += 1
                sums[token] = sums[token] + weight if token in sums else weight.clone()
    return Attention(of_texts, {token: (counts[token], total) for token, total in sums.items()})


def of_class(of_texts: Tensor, labels: list[str], label: str) -> Tensor:
    return of_texts[[own == label for own in labels]]


def separation(of_texts: Tensor, labels: list[str], pair: tuple[str, str]) -> Tensor:
    """How far apart two classes are in each latent: difference of means in pooled standard deviations.

    Args:
        of_texts: `[texts, heads, latents]`.

    Returns:
        `[heads, latents]`, signed: above 0 where the first class attends more.
    """
    first, second = (of_class(of_texts, labels, name) for name in pair)
    variance = ((len(first) - 1) * first.var(0) + (len(second) - 1) * second.var(0)) / (len(first) + len(second) - 2)
    return (first.mean(0) - second.mean(0)) / variance.sqrt().clamp(min=1e-12)


def by_chance(of_texts: Tensor, labels: list[str], seed: int) -> float:
    """The largest separation of any two classes that shuffled labels give, mean over `SHUFFLES`."""
    generator = torch.Generator().manual_seed(seed)
    largest = []
    for _ in range(SHUFFLES):
        shuffled = [labels[i] for i in torch.randperm(len(labels), generator=generator).tolist()]
        pairs = combinations(sorted({*labels}), 2)
        largest.append(max(separation(of_texts, shuffled, pair).abs().max().item() for pair in pairs))
    return sum(largest) / len(largest)


def used_latents(of_texts: Tensor) -> Tensor:
    """Over how many latents each head spreads: the exponential of the entropy of its mean attention, `[heads]`."""
    return torch.special.entr(of_texts.mean(0)).sum(-1).exp()


def top_tokens(model: NVEmbedModel, tokens: dict, head: int, latent: int, count: int) -> list[str]:
    """The tokens that occur twice or more and attend to a latent most, mean over their occurrences."""
    means = {token: total[head, latent].item() / n for token, (n, total) in tokens.items() if n > 1}
    best = sorted(means, key=means.get, reverse=True)[:count]
    words = [model.tokenizer.decode([token]) for token in best]
    return [f"{word.strip() or repr(word)} {means[token]:.3f}" for token, word in zip(best, words)]


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


def short_names(names: list[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    for parts in range(1, max(len(Path(name).parts) for name in names) + 1):
        short = ["/".join(Path(name).parts[-parts:]) for name in names]
        if len({*short}) == len(names):
            return short
    return names


def maps(of_texts: Tensor, labels: list[str], shown: list[str], pair: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """What is drawn of a model, with the latents of each head sorted.

    512 columns in the order of the weights would look like noise, and the one that matters would be a hair among them.

    Args:
        of_texts: `[texts, heads, latents]`.

    Returns:
        The mean attention of each class in `shown`, `[classes, heads, latents]`, sorted by that of all texts, and the
        separation of the pair, `[heads, latents]`, sorted by itself; both from the highest on.
    """
    order = of_texts.mean(0).argsort(-1, descending=True)
    means = [of_class(of_texts, labels, label).mean(0).gather(-1, order) for label in shown]
    return torch.stack(means), separation(of_texts, labels, pair).sort(-1, descending=True).values


def draw(seen: dict[str, Attention], labels: list[str], pair: tuple[str, str], path: Path) -> None:
    """A row a model: attention of up to four classes, and how far the pair is apart; one scale for all models."""
    others = [label for label in sorted({*labels}) if label not in pair]
    shown = sorted([*pair, *others[:2]])
    drawn = {name: maps(one.of_texts, labels, shown, pair) for name, one in seen.items()}
    shares = torch.stack([attention for attention, _ in drawn.values()])
    scale = LogNorm(shares.min().item(), shares.max().item())  # one latent may get ten times the others' share
    bound = max(apart.abs().max().item() for _, apart in drawn.values()) or 1e-9
    look = {"aspect": "auto", "interpolation": "nearest"}
    figure = Figure(figsize=(3.1 * (len(shown) + 1), 2.2 * len(seen) + 0.4), layout="constrained")
    grid = figure.subplots(len(seen), len(shown) + 1, squeeze=False)
    for row, (name, (attention, apart)) in zip(grid, drawn.items()):
        for axes, label, share in zip(row, shown, attention):
            of_class = axes.imshow(share, cmap="cividis", norm=scale, **look)
            axes.set_title(f"{name}: {label}", fontsize=9)
        of_pair = row[-1].imshow(apart, cmap="PuOr", vmin=-bound, vmax=bound, **look)
        row[-1].set_title(f"{name}: separation", fontsize=9)
        for axes in row:
            axes.set_xlabel("latent, by attention", fontsize=8)
            axes.tick_params(labelsize=7)
        row[-1].set_xlabel("latent, by separation", fontsize=8)
        row[0].set_ylabel("head", fontsize=8)
    bars = [
        figure.colorbar(of_class, ax=grid[:, -2], label="attention"),
        figure.colorbar(of_pair, ax=grid[:, -1], label=f"{pair[0]} - {pair[1]}, standard deviations"),
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
        f"Texts of {args.data}, up to {args.samples} a class. Separation is the difference of two classes' mean "
        "attention in standard deviations: the largest of all heads and latents, beside the largest of any two "
        "classes under shuffled labels (mean of several shuffles).",
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
    for name in filter(None, (args.model, args.beside)):
        model = NVEmbedModel.from_pretrained(name).eval()
        seen[name] = attention(model, list(texts), args.instruction, args.max_length)
        found.append(describe(model, name, seen[name], list(labels), args))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "latents.json", {"data": args.data, "texts": len(texts), "models": found})
    best = found[0]["pairs"][0]["classes"]
    draw(dict(zip(short_names(list(seen)), seen.values())), list(labels), best, folder / "latents.png")
    text = page(found, args)
    (folder / "LATENTS.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with errors_in_one_line():
        main(*HfArgumentParser(LatentsArguments).parse_args_into_dataclasses())
