"""Pruning and rounding one matrix, given what its inputs are like: magnitude, Wanda, SparseGPT, GPTQ.

Inputs x are seen as `moments`, the sum of x x^T over all calibration tokens, `[columns, columns]`: the error of the
outputs, summed over tokens, that a change D of the weights makes is the trace of D moments D^T.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nvembed.train.compress.sparsity import Pattern


BLOCK = 128  # columns whose errors are passed on to the rest at once
DAMPING = 0.01  # of the moments' mean diagonal, added to it (SparseGPT's and GPTQ's)


def prune_magnitude(weight: Tensor, moments: Tensor | None, pattern: Pattern) -> Tensor:
    """`weight` with its smallest values set to zero: of the whole matrix, or of each group."""
    return weight.masked_fill(pattern.lowest(weight.abs()), 0)


def prune_wanda(weight: Tensor, moments: Tensor, pattern: Pattern) -> Tensor:
    """`weight` without the values whose |w| * ||x||_2 is lowest within their row (Sun et al., arXiv 2306.11695)."""
    return weight.masked_fill(pattern.lowest_of_rows(weight.abs() * moments.diagonal().sqrt()), 0)


def prune_sparsegpt(weight: Tensor, moments: Tensor, pattern: Pattern) -> Tensor:
    """Prunes column by column, the others making up for what is lost (Frantar and Alistarh, arXiv 2301.00774).

    Unstructured sparsity is chosen among the columns of a block of 128, N:M when its group is reached, both by
    w^2 / [H^-1]_jj, the error that is left when the later columns have adapted.
    """
    # A group must not be cut by the end of a block.
    block = BLOCK if pattern.group is None else max(1, BLOCK // pattern.group) * pattern.group
    width = block if pattern.group is None else pattern.group

    def choose(columns: Tensor, inverse_diagonal: Tensor) -> Tensor:
        return pattern.lowest(columns.square() / inverse_diagonal.square())

    return compensate(weight, moments, choose, width, block=block)


def round_gptq(weight: Tensor, moments: Tensor, scales: Tensor, largest: int = 127) -> Tensor:
    """Rounds to integers times `scales`, column by column, the others making up for it (Frantar et al., 2210.17323).

    Zeros stay zero, so a pruned matrix keeps its pattern.

    Args:
        scales: `[rows, 1]`.

    Returns:
        The integers, from -largest to largest, in the dtype of `weight`.
    """

    def to_grid(columns: Tensor) -> Tensor:
        return (columns / scales).round().clamp(-largest, largest) * scales

    zeros = weight == 0
    return (compensate(weight, moments, None, 1, zeros, to_grid) / scales).round()


def compensate(
    weight: Tensor,
    moments: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor] | None,
    width: int,
    zeros: Tensor | None = None,
    to_grid: Callable[[Tensor], Tensor] = lambda column: column,
    block: int = BLOCK,
) -> Tensor:
    """Sets columns to new values from left to right; after each, those to its right move to keep the outputs.

    Args:
        weight: `[rows, columns]`.
        choose: from the next `width` columns, `[rows, width]`, and the diagonal of the inverse moments' Cholesky
            factor there, tells which become zero; None: those in `zeros`.
        to_grid: rounds a column, `[rows, 1]`.
    """
    dtype, work = weight.dtype, weight.float().clone()
    factor, unused = inverse_factor(moments)
    work[:, unused] = 0  # nothing ever comes in there
    columns = work.shape[1]
    zeros = torch.zeros_like(work, dtype=torch.bool) if zeros is None else zeros
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(work[:, start:end])
        for j in range(start, end):
            if choose is not None and (j - start) % width == 0:
                part = slice(j, min(j + width, end))
                zeros[:, part] = choose(work[:, part], factor.diagonal()[part])
            column = to_grid(work[:, j : j + 1]).masked_fill(zeros[:, j : j + 1], 0)
            error = (work[:, j : j + 1] - column) / factor[j, j]
            work[:, j:end] -= error @ factor[j : j + 1, j:end]
            work[:, j : j + 1] = column
            errors[:, j - start] = error.squeeze(1)
        work[:, end:] -= errors @ factor[start:end, end:]
    return work.to(dtype)


def inverse_factor(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of the damped moments, and the columns that no input ever uses.

    Raises:
        ValueError: the moments are not finite, or not a sum of squares.
    """
    if not moments.isfinite().all():
        raise ValueError("a matrix's inputs hold NaN or infinity; set dtype: float32 or bfloat16")
    damped = moments.clone()
    unused = damped.diagonal() == 0
    damped.diagonal()[unused] = 1
    damped.diagonal().add_(DAMPING * moments.diagonal().mean())
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True), unused
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"the calibration data's moments have no inverse ({error}); give more of it") from error


def relative_error(before: Tensor, after: Tensor, moments: Tensor) -> float:
    """Of the outputs, summed over tokens: ||(W' - W) X||^2 / ||W X||^2."""
    before, change = before.float(), after.float() - before.float()
    total = ((before @ moments) * before).sum()
    return float(((change @ moments) * change).sum() / total) if total > 0 else 0.0


METHODS = {"magnitude": prune_magnitude, "wanda": prune_wanda, "sparsegpt": prune_sparsegpt}
