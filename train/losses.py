"""The loss of both stages: contrastive (paper section 3.3; Appendix, unverified, for its settings), and spread-out."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nvembed.eval.sharding import gather, is_distributed


NO_TEXT = -1  # id of an empty slot; those of `nvembed.eval.files.text_id` are non-negative
NO_CLASS = -1  # of a row whose class is not known


class Contrast(NamedTuple):
    """Loss and cosine similarities per row, each `[batch]`."""

    losses: Tensor
    positive: Tensor
    hardest_negative: Tensor  # -inf for a row without negatives
    false_negatives: Tensor  # how many candidates of other rows were left out as likely positives
    divergence: Tensor | None = None  # of the teacher's ranking of the row's candidates, if there is a teacher


class TeacherScores(NamedTuple):
    """A teacher's embeddings of a batch, of any width, whose cosines rank the candidates that the student ranks."""

    queries: Tensor  # [batch, width], L2-normalized
    passages: Tensor  # [batch, 1 + negatives, width], L2-normalized
    temperature: float  # divisor of its cosines


def matryoshka_contrast(queries: Tensor, passages: Tensor, prefixes: Mapping[int, float], *args, **options) -> Contrast:
    """`contrast` of the embeddings' first dimensions, weighted, beside that of whole embeddings, whose weight is 1.

    Kusupati et al., arXiv 2205.13147. Losses and divergences are weighted means; the similarities and counts are those
    of whole embeddings.

    Args:
        prefixes: number of dimensions -> weight; each prefix is normalized by itself, as `encode(truncate_dim=)` does.
        args, options: of `contrast`.
    """
    whole = contrast(queries, passages, *args, **options)
    total, losses, divergence = 1 + sum(prefixes.values()), whole.losses, whole.divergence
    for width, weight in prefixes.items():
        prefix = (F.normalize(embeddings[..., :width], dim=-1) for embeddings in (queries, passages))
        part = contrast(*prefix, *args, **options)
        losses = losses + weight * part.losses
        divergence = None if divergence is None else divergence + weight * part.divergence
    return whole._replace(losses=losses / total, divergence=None if divergence is None else divergence / total)


def contrast(
    queries: Tensor,
    passages: Tensor,
    query_ids: Tensor,
    passage_ids: Tensor,
    temperature: float = 0.02,
    in_batch_negatives: bool = True,
    false_negative_margin: float | None = None,
    teacher: TeacherScores | None = None,
    classes: Tensor | None = None,
) -> Contrast:
    """InfoNCE: cross-entropy of the positive among the candidates, on cosine similarity / temperature.

    A row's candidates are its own positive and hard negatives. With `in_batch_negatives` (stage 1) they are the
    positives and hard negatives of every row of the batch, on every process; gradients flow back to all of them.
    A candidate is excluded where it is not a negative: its text is the row's query, its positive, or, in another row, a
    positive of the same query or of the row's positive (of similar texts, a ~ b and b ~ c).

    Each process returns its own rows, whose mean is its loss under DDP. Gathering the passages sends gradients back to
    the process that embedded them, so the average that DDP takes is the gradient of the mean over the whole batch; no
    factor is needed.

    Args:
        queries: `[batch, hidden]`, L2-normalized.
        passages: `[batch, 1 + negatives, hidden]`, L2-normalized, the positive first.
        query_ids: ids of the texts (`nvembed.eval.files.text_id`), `[batch]`.
        passage_ids: likewise, `[batch, 1 + negatives]`; `NO_TEXT` in empty slots.
        temperature: divisor of the similarities; the paper gives none, 0.02 is NVIDIA's later setting.
        in_batch_negatives: whether candidates come from the whole batch (stage 1) or from the row alone (stage 2).
        false_negative_margin: leave out candidates of other rows whose similarity to the query is at least the
            positive's plus this: they are likely to answer it, too. Not in the paper; Qwen3-Embedding (arXiv
            2506.05176) uses 0.1. None: off.
        teacher: compare the softmax over each row's candidates with this teacher's: the Kullback-Leibler divergence
            of the student's from the teacher's is the row's `divergence`.
        classes: ids of each row's data set and of its class there, or `NO_CLASS`, `[batch, 2]`. With
            `in_batch_negatives`, takes from other rows only the positives of the same data set and another class. Their
            hard negatives may be of the row's class. None: from all.

    Raises:
        ValueError: `temperature` is not positive, or the shapes do not match.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be > 0 (the paper's successors use 0.02)")
    if passages.ndim != 3 or len(queries) != len(passages) or passages.shape[:2] != passage_ids.shape:
        raise ValueError(
            f"queries {tuple(queries.shape)}, passages {tuple(passages.shape)} and passage_ids "
            f"{tuple(passage_ids.shape)} must be [batch, hidden], [batch, 1 + negatives, hidden] and "
            "[batch, 1 + negatives]"
        )
    rows, per_row, _ = passages.shape
    all_query_ids, all_passage_ids = gather(query_ids), gather(passage_ids)  # of the whole batch, on every process
    similarity = score(queries, passages, in_batch_negatives)
    if in_batch_negatives:
        candidate_ids = all_passage_ids.flatten()[None]
        rank = dist.get_rank() if is_distributed() else 0
        target = (rank * rows + torch.arange(rows, device=queries.device)) * per_row
    else:
        candidate_ids = passage_ids
        target = torch.zeros(rows, dtype=torch.long, device=queries.device)
    excluded = ~is_negative(query_ids, candidate_ids, all_query_ids, all_passage_ids[:, 0])
    if torch.isin(passage_ids[:, 0], all_query_ids).any():  # in retrieval no positive is a query, and this is dear
        excluded |= ~is_negative(passage_ids[:, 0], candidate_ids, all_query_ids, all_passage_ids[:, 0])
    # These tensors, rows x candidates, are the largest of a step, so most of this is done in place.
    target = target[:, None]
    if in_batch_negatives and classes is not None:
        own = target + torch.arange(per_row, device=queries.device)
        proven = torch.zeros_like(excluded).view(rows, -1, per_row)
        proven[:, :, 0] = is_other_class(classes, gather(classes))
        excluded |= ~proven.flatten(1).scatter_(1, own, True)
    positive = similarity.detach().gather(1, target)
    false_negatives = torch.zeros(rows, dtype=torch.long, device=queries.device)
    if false_negative_margin is not None and in_batch_negatives:
        likely = similarity.detach() >= positive + false_negative_margin
        likely.scatter_(1, target + torch.arange(per_row, device=queries.device), False)  # the row's own are no guess
        likely &= ~excluded
        false_negatives = likely.sum(1)
        excluded |= likely
    hardest_negative = similarity.detach().masked_fill(excluded.scatter_(1, target, True), float("-inf")).amax(1)
    similarity = similarity.masked_fill_(excluded.scatter_(1, target, False), float("-inf"))
    logits = similarity.div_(temperature)
    losses = F.cross_entropy(logits, target.squeeze(1), reduction="none")
    divergence = None
    if teacher is not None:
        theirs = score(teacher.queries, teacher.passages, in_batch_negatives).float() / teacher.temperature
        theirs = theirs.masked_fill(excluded, float("-inf")).log_softmax(-1)
        # At excluded candidates both are -inf, whose difference is not 0.
        gap = (theirs - logits.log_softmax(-1)).masked_fill(excluded, 0.0)
        divergence = (theirs.exp() * gap).sum(-1)
    return Contrast(losses, positive.squeeze(1), hardest_negative, false_negatives, divergence)


def score(queries: Tensor, passages: Tensor, in_batch_negatives: bool) -> Tensor:
    """Dot products of each query, `[batch, width]`, with its candidates among `[batch, 1 + negatives, width]`.

    Returns:
        `[batch, candidates]`, the candidates those of the row or, `in_batch_negatives`, of all rows on all processes.
    """
    if in_batch_negatives:
        return queries @ gather(passages).flatten(0, 1).T
    return torch.einsum("bd,bnd->bn", queries, passages)


def is_negative(query_ids: Tensor, candidate_ids: Tensor, all_query_ids: Tensor, all_positive_ids: Tensor) -> Tensor:
    """Whether a candidate is a negative: a text that is neither the row's query nor a positive of it in any row.

    Args:
        query_ids: `[batch]`.
        candidate_ids: `[batch, candidates]`, or `[1, candidates]` if all rows share them.
        all_query_ids, all_positive_ids: of all rows on all processes, `[world * batch]`.

    Returns:
        `[batch, candidates]`; peak memory grows with this size, not with rows x candidates x rows.
    """
    # Queries and texts are numbered from 0, so that "is a positive of that query" becomes a table or a set of pairs.
    queries, query_numbers = query_ids.unique(return_inverse=True)
    texts, numbers = torch.cat([all_positive_ids, candidate_ids.flatten()]).unique(return_inverse=True)
    positive_numbers, candidate_numbers = numbers[: len(all_positive_ids)], numbers[len(all_positive_ids) :]
    here = torch.searchsorted(queries, all_query_ids).clamp(max=len(queries) - 1)
    known = queries[here] == all_query_ids  # other processes may have queries that no row here has
    if len(candidate_ids) == 1:
        is_positive = torch.zeros(len(queries), len(texts), dtype=torch.bool, device=query_ids.device)
        is_positive[here[known], positive_numbers[known]] = True
        result = is_positive[:, candidate_numbers][query_numbers]
        del is_positive
    else:
        pairs = query_numbers[:, None] * len(texts) + candidate_numbers.view_as(candidate_ids)
        result = torch.isin(pairs, here[known] * len(texts) + positive_numbers[known])
    result |= candidate_ids == NO_TEXT
    result |= candidate_ids == query_ids[:, None]
    return result.logical_not_()


def is_other_class(classes: Tensor, others: Tensor) -> Tensor:
    """Whether two rows are of one data set and of classes that are known and differ.

    Args:
        classes: `[batch, 2]`, see `contrast`.
        others: `[others, 2]`.

    Returns:
        `[batch, others]`.
    """
    (sets, names), (other_sets, other_names) = classes.T, others.T
    is_known = (names != NO_CLASS)[:, None] & (other_names != NO_CLASS)
    return is_known & (sets[:, None] == other_sets) & (names[:, None] != other_names)


class Spread(NamedTuple):
    """How unrelated texts of a batch lie to each other."""

    penalty: Tensor  # mean squared cosine of different queries + that of their positives, a scalar
    mean_cosine: Tensor  # of different queries, a scalar, without gradients; NaN if none are unrelated


def spread_out(
    queries: Tensor, positives: Tensor, query_ids: Tensor, positive_ids: Tensor, classes: Tensor | None = None
) -> Spread:
    """What keeps embeddings from crowding into a cone: the mean squared cosine of texts that are not related.

    Not in the paper; Zhang et al., arXiv 1708.06320, as EmbeddingGemma (arXiv 2509.20354) has it: among the batch's
    queries, and among their positives. Pairs of all processes' rows count, but those of one row, with a text in common,
    of one class, or of a set with classes where one's is not known. As with `contrast`, the mean over processes has the
    gradient of the whole batch's.

    Args:
        queries, positives: `[batch, hidden]`, L2-normalized.
        query_ids, positive_ids: `[batch]`.
        classes: as for `contrast`; None: no row's is known.
    """
    ids, all_ids = torch.stack([query_ids, positive_ids]), [gather(query_ids), gather(positive_ids)]
    is_related = torch.zeros(len(queries), len(all_ids[0]), dtype=torch.bool, device=queries.device)
    for own in ids:  # a row is itself related to itself
        for other in all_ids:
            is_related |= own[:, None] == other
    if classes is not None:
        (sets, names), (all_sets, all_names) = classes.T, gather(classes).T
        is_related |= (names[:, None] == all_names) & (names != NO_CLASS)[:, None]
        has_classes = torch.isin(sets, all_sets[all_names != NO_CLASS])
        may_agree = (names == NO_CLASS)[:, None] | (all_names == NO_CLASS)
        is_related |= has_classes[:, None] & (sets[:, None] == all_sets) & may_agree
    pairs, processes = (~is_related).sum().to(queries.dtype), 1
    if is_distributed():
        dist.all_reduce(pairs)
        processes = dist.get_world_size()
    scale = processes / pairs.clamp(min=1)  # so that the mean over processes is the mean over pairs
    penalty, mean = 0.0, 0.0
    for embeddings in (queries, positives):
        cosines = (embeddings @ gather(embeddings).T).masked_fill(is_related, 0.0)
        penalty = penalty + cosines.square().sum() * scale
        mean = cosines.detach().sum() * scale if embeddings is queries else mean
    return Spread(penalty, torch.where(pairs > 0, mean, torch.nan))


def matryoshka_spread_out(queries: Tensor, positives: Tensor, prefixes: Mapping[int, float], *args) -> Spread:
    """`spread_out` of the embeddings' first dimensions beside that of whole ones, weighted as `matryoshka_contrast`."""
    whole = spread_out(queries, positives, *args)
    penalty = whole.penalty
    for width, weight in prefixes.items():
        prefix = (F.normalize(embeddings[..., :width], dim=-1) for embeddings in (queries, positives))
        penalty = penalty + weight * spread_out(*prefix, *args).penalty
    return whole._replace(penalty=penalty / (1 + sum(prefixes.values())))
