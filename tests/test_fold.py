"""The folded latent attention against the unfolded one."""

import copy

import pytest
import torch

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.configuration_nvembed import LatentAttentionConfig
from nvembed.modeling_nvembed import FoldedLatentAttention, LatentAttention
from nvembed.texts_nvembed import PaddedLayout, format_instruction


INSTRUCTION = format_instruction("Given a question, retrieve")


@pytest.fixture
def config():
    """No two of the sizes are equal, so that no transposition goes unseen."""
    return LatentAttentionConfig(
        num_latents_value=12, num_cross_heads=3, hidden_dim=32, latent_dim=20, cross_dim_head=24
    )


@pytest.fixture
def block(config):
    torch.manual_seed(0)
    block = LatentAttention(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def test_fold_is_exact_algebra(block, config):
    states = torch.randn(4, 7, 32, dtype=torch.float64)
    folded = FoldedLatentAttention.fold(block.double(), config)
    with torch.no_grad():
        expected, actual = block(states, PaddedLayout(7)), folded(states, PaddedLayout(7))
    assert (expected - states).abs().max() > 1, "the block does nothing in this test"
    # The folded form computes its scores in fp32 at most; everything else is in fp64 here.
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-6)


def test_fold_counts_as_the_paper_s_shape():
    """At the released size 537 M parameters of the attention become 33.6 M."""
    config = LatentAttentionConfig()
    with torch.device("meta"):
        unfolded, folded = LatentAttention(config), FoldedLatentAttention(config)
    attention = sum(p.numel() for p in unfolded.cross_attend_blocks[0].fn.parameters())
    maps = folded.to_scores.weight.numel() + folded.to_out.weight.numel()
    assert (attention, maps) == (536_870_912, 33_554_432)


def test_folded_model_saves_and_loads(model, sentences, tmp_path):
    expected = model.encode(sentences, INSTRUCTION)
    assert model.fold_latent_attention() is model
    torch.testing.assert_close(model.encode(sentences, INSTRUCTION), expected, atol=1e-6, rtol=0)
    assert model.fold_latent_attention() is model, "folding twice changes nothing"
    model.save_pretrained(tmp_path)
    for options in ({}, {"fold_latent_attention": True}):
        again = NVEmbedModel.from_pretrained(tmp_path, **options)
        assert isinstance(again.latent_attention_model, FoldedLatentAttention)
        assert torch.equal(again.encode(sentences, INSTRUCTION), model.encode(sentences, INSTRUCTION))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("std", [0.05, 0.15])
def test_folded_bf16_is_no_farther_from_the_truth(seed, std):
    """On the same bf16 states and weights, the folded block rounds less: against fp64, for flat and sharp attention."""
    torch.manual_seed(seed)
    config = LatentAttentionConfig(
        num_latents_value=64, num_cross_heads=8, hidden_dim=128, latent_dim=128, cross_dim_head=128
    )
    block = LatentAttention(config).eval()
    for name, parameter in block.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=std)
    block = block.bfloat16()
    states, texts = torch.randn(1, 500, 128).bfloat16(), PaddedLayout(500)
    folded = FoldedLatentAttention.fold(block, config)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        truth = copy.deepcopy(block).double()(states.double(), texts)
        unfolded_error = (block(states, texts) - truth).norm()
        folded_error = (folded(states, texts) - truth).norm()
    assert folded_error <= unfolded_error


def test_a_model_in_training_is_not_folded(model, sentences):
    model.train()
    with pytest.raises(ValueError, match=r"in training mode, .*call model.eval\(\)"):
        model.fold_latent_attention()
    assert isinstance(model.latent_attention_model, LatentAttention)


def test_a_folded_model_is_not_trained(model, sentences):
    model.eval().fold_latent_attention()
    model.train()
    with pytest.raises(RuntimeError, match="latent attention is folded, .*train the unfolded checkpoint"):
        model(torch.tensor([[3, 4]]), pool_mask=torch.tensor([[1, 1]]))
    assert model.encode(sentences).shape == (8, 32), "encode evaluates whatever the mode"


def test_only_latents_fold(model):
    config = NVEmbedConfig.from_dict({**model.config.to_dict(), "pooling_type": "mean"})
    with pytest.raises(ValueError, match=r"pooling is a MeanPooling \(pooling_type 'mean'\), not a latent attention"):
        NVEmbedModel(config).eval().fold_latent_attention()
