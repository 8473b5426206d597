"""Mean cosine and effective rank against loops and closed forms."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nvembed.eval.spread import effective_rank, mean_cosine


def test_mean_cosine_equals_the_loop():
    embeddings = F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + 0.5, dim=-1)
    pairs = [embeddings[i] @ embeddings[k] for i, k in itertools.permutations(range(7), 2)]
    assert mean_cosine(embeddings) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="1 embeddings have no pairs"):
        mean_cosine(embeddings[:1])


def test_effective_rank_of_known_spectra():
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert effective_rank(basis) == pytest.approx(8, abs=1e-4)  # equal singular values
    assert effective_rank(basis[:1].repeat(20, 1)) == pytest.approx(1, abs=1e-2)  # one direction
    two = torch.cat([basis[:1].repeat(9, 1), basis[1:2].repeat(4, 1)])  # singular values 3 and 2: shares 0.6, 0.4
    expected = torch.tensor([0.6, 0.4]).pow(torch.tensor([-0.6, -0.4])).prod().item()
    assert effective_rank(two) == pytest.approx(expected, abs=1e-4)
