"""Each solver against its definition, a float64 loop and llm-compressor."""

import logging

import pytest
import torch
from torch import Tensor, nn

from nvembed.train.compress.solvers import (
    DAMPING,
    METHODS,
    inverse_factor,
    prune_sparsegpt,
    prune_wanda,
    relative_error,
    round_gptq,
)
from nvembed.train.compress.sparsity import Pattern


PATTERNS = ["unstructured", "4:8", "2:4"]


@pytest.fixture
def inputs() -> Tensor:
    """2,000 correlated inputs, whose columns differ in size."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 64, generator=generator) @ torch.randn(64, 256, generator=generator)
    inputs = inputs + torch.randn(2000, 256, generator=generator)
    return inputs * torch.rand(256, generator=generator)


@pytest.fixture
def matrix(inputs) -> tuple[Tensor, Tensor]:
    """A matrix of 48 x 256 and the moments of its inputs."""
    return torch.randn(48, 256, generator=torch.Generator().manual_seed(1)), inputs.T @ inputs


def reference(weight: Tensor, moments: Tensor, pattern: Pattern | None, scales: Tensor | None = None) -> Tensor:
    """SparseGPT, or GPTQ of 4 bits, in float64: each column is eliminated from the inverse, which is not factorized."""
    work, damped = weight.double().clone(), moments.double().clone()
    damped.diagonal().add_(DAMPING * moments.double().diagonal().mean())
    inverse, zeros = damped.inverse(), torch.zeros_like(weight, dtype=torch.bool)
    step = 1 if pattern is None else pattern.group or 128
    for j in range(weight.shape[1]):
        if pattern is not None and j % step == 0:
            # What is left of the inverse's diagonal when the columns up to each one are eliminated.
            rest, diagonal = inverse.clone(), []
            for k in range(j, j + step):
                diagonal.append(rest[k, k].clone())
                rest -= torch.outer(rest[:, k], rest[k]) / rest[k, k]
            scores = work[:, j : j + step].square() / torch.stack(diagonal)
            zeros[:, j : j + step] = pattern.lowest(scores)
        column = work[:, j].masked_fill(zeros[:, j], 0)
        if scales is not None:
            column = ((column / scales[:, 0]).round().clamp(-7, 7) * scales[:, 0]).masked_fill(weight[:, j] == 0, 0)
        work[:, j + 1 :] -= torch.outer((work[:, j] - column) / inverse[j, j], inverse[j, j + 1 :])
        work[:, j] = column
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return work


@pytest.mark.parametrize("name", PATTERNS)
def test_wanda_is_its_definition(name, matrix, inputs):
    weight, moments = matrix
    pattern = Pattern.parse(name)
    pruned = prune_wanda(weight, moments, pattern)
    scores = weight.abs() * inputs.double().norm(dim=0).float()
    for row, row_scores, row_pruned in zip(weight, scores, pruned):
        group = pattern.group or len(row)
        for start in range(0, len(row), group):
            part = row_scores[start : start + group].tolist()
            lowest = sorted(range(group), key=part.__getitem__)[: group // 2]
            expected = [0.0 if i in lowest else row[start + i].item() for i in range(group)]
            assert row_pruned[start : start + group].tolist() == expected


@pytest.mark.parametrize("name", PATTERNS)
def test_sparsegpt_is_within_a_percent_of_float64(name, matrix):
    weight, moments = matrix
    pattern = Pattern.parse(name)
    pruned = prune_sparsegpt(weight, moments, pattern)
    expected = relative_error(weight.double(), reference(weight, moments, pattern), moments)
    assert relative_error(weight, pruned, moments) == pytest.approx(expected, rel=0.01)
    assert pattern.holds(pruned) and (pruned == 0).float().mean() == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("name", PATTERNS)
def test_errors_fall_from_magnitude_to_wanda_to_sparsegpt(name, matrix):
    weight, moments = matrix
    errors = [
        relative_error(weight, METHODS[method](weight, moments, Pattern.parse(name)), moments)
        for method in ("magnitude", "wanda", "sparsegpt")
    ]
    assert errors[0] > errors[1] > errors[2] > 0


def test_gptq_is_within_a_percent_of_float64_and_keeps_zeros(matrix):
    weight, moments = matrix
    weight = prune_sparsegpt(weight, moments, Pattern.parse("2:4"))
    scales = weight.abs().amax(1, keepdim=True) / 7  # 4 bits, so that errors are large
    rounded = round_gptq(weight, moments, scales, 7)
    assert Pattern.parse("2:4").holds(rounded) and rounded.abs().max() <= 7 and (rounded == rounded.round()).all()
    nearest = relative_error(weight, (weight / scales).round() * scales, moments)
    found = relative_error(weight, rounded * scales, moments)
    expected = relative_error(weight.double(), reference(weight, moments, None, scales), moments)
    assert found == pytest.approx(expected, rel=0.01) and found < 0.9 * nearest


@pytest.mark.parametrize("name", PATTERNS)
def test_pruning_equals_llm_compressors(name, matrix):
    pytest.importorskip("llmcompressor")
    logging.getLogger("llmcompressor").setLevel(logging.ERROR)
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight as sparsegpt
    from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight as wanda

    weight, moments = matrix
    pattern = Pattern.parse(name)
    n, m = (0, 0) if pattern.group is None else (pattern.group - pattern.kept, pattern.group)
    module = nn.Linear(256, 48, bias=False).requires_grad_(False)
    module.weight.data = weight.clone()
    theirs = wanda(module, {module: moments.diagonal().clone()}, 0.5, n, m)
    assert torch.equal(theirs, prune_wanda(weight, moments, pattern))
    theirs = sparsegpt(module, {module: moments.clone()}, 0.5, n, m, 128, DAMPING, False)
    theirs = theirs[-1] if isinstance(theirs, tuple) else theirs
    ours = prune_sparsegpt(weight, moments, pattern)
    # Scores that are nearly equal may be ordered otherwise, and what follows differs then.
    assert ((ours == 0) == (theirs == 0)).float().mean() > 0.99
    errors = relative_error(weight, ours, moments), relative_error(weight, theirs, moments)
    assert errors[0] == pytest.approx(errors[1], rel=0.005)


def test_columns_without_inputs_become_zero(matrix):
    weight, moments = matrix
    moments[:, 3] = moments[3] = 0
    pruned = prune_sparsegpt(weight, moments, Pattern.parse("2:4"))
    assert (pruned[:, 3] == 0).all() and pruned.isfinite().all()


def test_broken_inputs_are_refused(matrix):
    _, moments = matrix
    with pytest.raises(ValueError, match="NaN or infinity"):
        inverse_factor(moments * float("nan"))


@pytest.mark.parametrize(
    ("name", "sparsity", "message"),
    [
        ("2:4", 0.6, "leaves 0.5 of the weights zero, not 0.6"),
        ("4:2", None, "0 < N < M"),
        ("half", None, "unstructured, or N:M"),
        ("unstructured", 0.0, "above 0 and below 1"),
        ("unstructured", 1.5, "above 0 and below 1"),
    ],
)
def test_impossible_patterns_are_refused(name, sparsity, message):
    with pytest.raises(ValueError, match=message):
        Pattern.parse(name, sparsity)


def test_widths_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="rows of 30 weights"):
        Pattern.parse("4:8").check_fits("embedding_model.layers.0.mlp.up_proj", 30)


def test_other_ratios_and_shares():
    scores = torch.rand(6, 40)
    assert (Pattern.parse("1:5").lowest(scores).unflatten(1, (-1, 5)).sum(-1) == 4).all()
    assert Pattern.parse("unstructured", 0.3).lowest(scores).sum() == 72
    assert (Pattern.parse("unstructured", 0.3).lowest_of_rows(scores).sum(1) == 12).all()
