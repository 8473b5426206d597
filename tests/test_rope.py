"""Scaled ropes. Needs torch, transformers and pytest alone; `make test-versions` runs this file for each version."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.configuration_nvembed import BidirectionalMistralConfig
from nvembed.modeling_nvembed import inverse_frequencies


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn of DeepSeek": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 40.0, "original_max_position_embeddings": 96, "mscale": 0.7,
        "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2, "truncate": False,
    },
}  # fmt: skip
LONG_TEXTS = ["Open the settings, choose the account, and follow the link. " * 12, "A short one."]
SMALL = {
    "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has other formulas for yarn")
@pytest.mark.parametrize("name", [*ROPES, "default"])
def test_rope_frequencies_equal_transformers_bit_for_bit(name):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = ROPES.get(name, {"rope_type": "default", "rope_theta": 10000.0})
    reference = LlamaRotaryEmbedding(LlamaConfig(**SMALL, rope_parameters=dict(rope)))
    expected, expected_scale = reference.inv_freq, reference.attention_scaling
    actual, scale = inverse_frequencies(BidirectionalMistralConfig(**SMALL, rope_parameters=dict(rope)), "cpu")
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert scale == expected_scale
    default, _ = inverse_frequencies(BidirectionalMistralConfig(**SMALL), "cpu")
    assert (name == "default") == torch.equal(actual, default)


@pytest.mark.parametrize("name", ROPES)
def test_rope_of_a_model_built_on_meta(name):
    """As transformers, conversion and merging build it; the frequencies are of the device of the tokens."""
    config = NVEmbedConfig(text_config={**SMALL, "rope_parameters": ROPES[name]}, pooling_type="mean")
    with torch.device("meta"):
        model = NVEmbedModel(config)
        frequencies, _ = inverse_frequencies(config.text_config, torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert frequencies.device.type == "cpu"
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()


def test_rope_in_the_fields_of_transformers_4():
    old = {key: value for key, value in ROPES["llama3"].items() if key != "rope_theta"}
    for scaling in (old, {**{k: v for k, v in old.items() if k != "rope_type"}, "type": "llama3"}):
        config = BidirectionalMistralConfig(**SMALL, rope_theta=5e5, rope_scaling=scaling)
        expected, _ = inverse_frequencies(BidirectionalMistralConfig(**SMALL, rope_parameters=ROPES["llama3"]), "cpu")
        assert torch.equal(inverse_frequencies(config, "cpu")[0], expected)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 24, "long_factor": [1.0] * 24}, "rope_type is 'longrope'"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_type 'llama3' needs low_freq_factor"),
        ({"rope_type": "linear"}, "rope_type 'linear' needs factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_other_ropes_are_refused(rope, words):
    config = BidirectionalMistralConfig(**SMALL)
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    with pytest.raises(ValueError, match=words):
        NVEmbedModel(NVEmbedConfig(text_config=config, pooling_type="mean"))


@pytest.mark.skipif("NVEMBED_SAVED_ELSEWHERE" not in os.environ, reason="`make test-versions` names the folder")
@pytest.mark.parametrize("name", ROPES)
def test_rope_saved_by_another_version(encode_without_nvembed, name):
    folder = Path(os.environ["NVEMBED_SAVED_ELSEWHERE"], name)
    actual, again = encode_without_nvembed(folder, LONG_TEXTS, "", 512)
    torch.testing.assert_close(actual, torch.load(folder / "expected.pt"), atol=1e-5, rtol=0)
    actual, _ = encode_without_nvembed(again, LONG_TEXTS, "", 512)
    torch.testing.assert_close(actual, torch.load(folder / "expected.pt"), atol=1e-5, rtol=0)
