"""Decoders of other families on random weights: their states are those of transformers' own classes."""

import pytest
import torch
import transformers
from transformers import AutoModel, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.texts_nvembed import PackedLayout, PaddedLayout


SHAPE = {
    "vocab_size": 90, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": None}, {}),
    "llama": (LlamaConfig, {"head_dim": 12}, {}),
    "llama3": (LlamaConfig, {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True}, {}),
    "qwen2": (Qwen2Config, {"rope_theta": 1_000_000.0}, {"qkv_bias": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "rope_theta": 1_000_000.0}, {"qk_norm": True}),
}
if hasattr(transformers, "MinistralConfig"):
    windows = {"sliding_window": 400, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    FAMILIES["ministral"] = (transformers.MinistralConfig, {"head_dim": 16} | windows, {})
LENGTHS = [37, 12, 12, 1]


@pytest.fixture(params=FAMILIES)
def family(request):
    """transformers' decoder, and ours with its weights, as a function of the mask."""
    kind, fields, switches = FAMILIES[request.param]
    torch.manual_seed(0)
    decoder = AutoModel.from_config(kind(**SHAPE, **fields)).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name or "bias" in name:  # new ones are 1 and 0, which would hide a missing one
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    told = decoder.config.to_dict()
    names = (*SHAPE, "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters")
    text_config = {name: told[name] for name in names if told.get(name) is not None} | switches

    def ours(mask_type):
        latents = {"hidden_dim": 48, "latent_dim": 48, "cross_dim_head": 24, "num_latents_value": 8}
        config = NVEmbedConfig(text_config=text_config, latent_attention_config=latents, mask_type=mask_type)
        model = NVEmbedModel(config).eval()
        model.embedding_model.load_state_dict(decoder.state_dict())
        return model

    return decoder, ours


@torch.no_grad()
def test_states_equal_those_of_transformers(family):
    decoder, ours = family
    ids = torch.randint(90, (2, 37), generator=torch.Generator().manual_seed(1))
    causal = ours("c").embedding_model(ids)
    torch.testing.assert_close(causal, decoder(ids).last_hidden_state, atol=1e-5, rtol=1e-5)

    nothing = torch.zeros(2, 1, 37, 37)  # added to the scores: every token sees every other
    layers = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    takes_kinds = len(layers) > 1
    mask = dict.fromkeys(layers, nothing) if takes_kinds else nothing
    full = decoder(ids, attention_mask=mask).last_hidden_state
    both = ours("b").embedding_model(ids)
    torch.testing.assert_close(both, full, atol=1e-5, rtol=1e-5)
    assert (both - causal).abs().max() > 0.1


@torch.no_grad()
def test_packed_equals_padded(family):
    _, ours = family
    model = ours("b").embedding_model
    texts = [torch.randint(90, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    packed = model(torch.cat(texts), PackedLayout(LENGTHS)).split(LENGTHS)
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.tensor([[1] * n + [0] * (37 - n) for n in LENGTHS])
    for row, states, n in zip(model(padded, PaddedLayout(37, mask)), packed, LENGTHS):
        torch.testing.assert_close(row[:n], states, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_saved_checkpoint_is_the_same(family, tmp_path):
    _, ours = family
    model = ours("b")
    model.embedding_model.config.save_pretrained(tmp_path / "text")  # as vLLM and others read a part
    transformers.PreTrainedModel.save_pretrained(model, tmp_path)
    config = NVEmbedConfig.from_pretrained(tmp_path)
    assert (config.text_config.qkv_bias, config.text_config.qk_norm) == (
        model.config.text_config.qkv_bias, model.config.text_config.qk_norm,
    )  # fmt: skip
    again = transformers.PreTrainedModel.from_pretrained.__func__(NVEmbedModel, tmp_path)
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(again.embedding_model(ids), model.embedding_model(ids))
    assert model.state_dict().keys() == again.state_dict().keys()


def test_gradient_checkpointing_changes_no_gradient(family):
    _, ours = family
    gradients = []
    for checkpointing in (False, True):
        model = ours("b").train()
        model.embedding_model.gradient_checkpointing = checkpointing
        model(torch.arange(20).unsqueeze(0)).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.embedding_model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
