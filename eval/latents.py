"""Attention of texts' tokens over the latents, and how far it tells classes apart (paper, Appendix D)."""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.modeling_nvembed import FoldedLatentAttention, NVEmbedModel
from nvembed.texts_nvembed import PackedLayout, format_instruction, length_sorted_batches, pack, tokenize


SHUFFLES = 20  # of the labels, to see what chance separates


@dataclass
class Attention:
    """What texts attend to.

    Args:
        of_texts: mean over a text's tokens, `[texts, heads, latents]`; rows of latents add up to 1.
        tokens: token id -> (how often it occurs, the sum of its attention `[heads, latents]`).
    """

    of_texts: Tensor
    tokens: dict[int, tuple[int, Tensor]]


def check_has_latents(config: NVEmbedConfig, name: str) -> None:
    """Raises a `ValueError` if a model has no latents."""
    if config.pooling_type != "latent_attention":
        raise ValueError(f"{name} has pooling_type {config.pooling_type!r}; only latent_attention has latents")


@torch.no_grad()
def attention(model: NVEmbedModel, texts: list[str], instruction: str, max_length: int) -> Attention:
    """Attention of every token over the latents, from the folded form, whose softmax it is.

    Raises:
        ValueError: the model has no latents.
    """
    check_has_latents(model.config, "the model")
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


def ends(sorted_scores: Tensor, count: int) -> Tensor:
    """The highest and the lowest `count` / 2 of each row; all where there are no more than `count`."""
    if sorted_scores.shape[-1] <= count:
        return sorted_scores
    return torch.cat([sorted_scores[..., : count // 2], sorted_scores[..., -(count // 2) :]], dim=-1)
