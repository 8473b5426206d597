"""Which weights of a matrix may be other than zero: patterns of sparsity, and their choice by score."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pattern:
    """A share of the weights that are zero, anywhere in a matrix or so many in every group.

    Args:
        sparsity: the share of zeros.
        kept, group: N:M sparsity, at most `kept` of `group` neighbours in a row other than zero; None: unstructured.
    """

    sparsity: float
    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, name: str, sparsity: float | None = None) -> "Pattern":
        """The pattern called `unstructured`, or "N:M" as "2:4", N of M neighbours in a row being kept.

        Args:
            sparsity: of an unstructured one; None: a half. N:M already says it.

        Raises:
            ValueError: it is neither, or the sparsity is out of range or another than N:M's.
        """
        if sparsity is not None and not 0 < sparsity < 1:
            raise ValueError(
                f"sparsity is {sparsity}; it must be above 0 and below 1, such as 0.5 for half the weights"
            )
        if not isinstance(name, str):
            raise ValueError(f'pattern is {name!r}, a number to YAML: put it in quotes, as pattern: "2:4"')
        if name == "unstructured":
            return cls(0.5 if sparsity is None else sparsity)
        found = re.fullmatch(r"(\d+):(\d+)", name)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(f"pattern is {name!r}; it must be unstructured, or N:M with 0 < N < M, such as 2:4 or 4:8")
        kept, group = int(found[1]), int(found[2])
        if sparsity is not None and sparsity != 1 - kept / group:
            raise ValueError(
                f"pattern {name} leaves {1 - kept / group:g} of the weights zero, not {sparsity}; drop one"
            )
        return cls(1 - kept / group, kept, group)

    def __str__(self) -> str:
        return "unstructured" if self.group is None else f"{self.kept}:{self.group}"

    def check_fits(self, name: str, columns: int) -> None:
        """Raises a `ValueError` if rows of this width do not divide into groups."""
        if self.group is not None and columns % self.group:
            raise ValueError(
                f"{name} has rows of {columns} weights, which do not divide into groups of {self.group} ({self}); "
                "choose another pattern"
            )

    def lowest(self, scores: Tensor) -> Tensor:
        """Where a matrix becomes zero, by score: bool of the shape of `scores`, `[rows, columns]`.

        Unstructured sparsity compares all of `scores`; for a comparison within rows, see `lowest_of_rows`. Of equal
        scores, the first become zero.
        """
        if self.group is None:
            return _lowest(scores.flatten()[None], int(scores.numel() * self.sparsity)).view_as(scores)
        groups = scores.unflatten(-1, (-1, self.group)).flatten(0, 1)
        return _lowest(groups, self.group - self.kept).view_as(scores)

    def lowest_of_rows(self, scores: Tensor) -> Tensor:
        """As `lowest`, an unstructured sparsity being that of every row."""
        if self.group is None:
            return _lowest(scores, int(scores.shape[-1] * self.sparsity))
        return self.lowest(scores)

    def holds(self, weight: Tensor) -> bool:
        """Whether a matrix has this pattern; an unstructured one, at least this share of zeros, to one weight a row."""
        zeros = weight == 0
        if self.group is not None:
            return bool((zeros.unflatten(-1, (-1, self.group)).sum(-1) >= self.group - self.kept).all())
        return int(zeros.sum()) >= weight.numel() * self.sparsity - len(weight)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Marks the `count` lowest scores of each row."""
    order = scores.argsort(dim=-1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def decoder_matrices(decoder: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of the decoder's layers, which are what pruning and quantization change, by name."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}


def check_pattern(decoder: nn.Module, pruning: dict | None) -> None:
    """Raises a `ValueError` if a checkpoint's matrices do not have the pattern that its config says (`pruning`)."""
    if (pruning or {}).get("pattern") is None:
        return
    pattern = Pattern.parse(pruning["pattern"], pruning["sparsity"])
    for name, module in decoder_matrices(decoder).items():
        weight = module.weight.dequantize() if hasattr(module.weight, "qdata") else module.weight
        if not pattern.holds(weight):
            raise ValueError(
                f"embedding_model.{name} is not {pattern}, and config.json says so (pruning): the weights were changed "
                "since; prune the original again"
            )
