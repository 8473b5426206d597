"""The network against independent computations: transformers' decoder, loops in float64."""

import math

import pytest
import torch
from transformers import AutoModel

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.texts_nvembed import PackedLayout, PaddedLayout, format_instruction


INSTRUCTION = format_instruction("Given a question, retrieve")


# --- The decoder


def test_causal_decoder_equals_transformers(model, decoder_dir):
    reference = AutoModel.from_pretrained(decoder_dir)
    input_ids = torch.randint(2, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    model.embedding_model.mask_type = "c"
    with torch.no_grad():
        expected = reference(input_ids).last_hidden_state
        torch.testing.assert_close(model.embedding_model(input_ids), expected, atol=1e-5, rtol=1e-5)


def test_bidirectional_decoder_equals_transformers_without_mask(model, decoder_dir):
    reference = AutoModel.from_pretrained(decoder_dir, attn_implementation="eager")
    input_ids = torch.randint(2, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(input_ids, attention_mask=torch.zeros(3, 1, 17, 17)).last_hidden_state
        torch.testing.assert_close(model.embedding_model(input_ids), expected, atol=1e-5, rtol=1e-5)
        causal = reference(input_ids).last_hidden_state
    assert (expected - causal).abs().max() > 0.1, "the mask makes no difference in this test"


@pytest.mark.parametrize("mask_type", ["b", "c"])
def test_padding_changes_nothing(model, mask_type):
    model.embedding_model.mask_type = mask_type
    input_ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        padded = model(input_ids, mask, mask).sentence_embeddings
        alone = torch.cat([model(input_ids[:1], None, mask[:1])[0], model(input_ids[1:, :7], None, mask[1:, :7])[0]])
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=0)


def test_sliding_window_has_no_effect(model, sentences):
    """As released: the config says 4,096, the code attends over the whole text."""
    expected = model.encode([" ".join(sentences)])
    config = type(model.config).from_dict(model.config.to_dict())
    config.text_config.sliding_window = 4
    narrow = type(model)(config)
    narrow.load_state_dict(model.state_dict())
    narrow.tokenizer = model.tokenizer
    assert torch.equal(narrow.encode([" ".join(sentences)]), expected)


def test_llama3_rope_equals_transformers(model, decoder_dir):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    reference = AutoModel.from_pretrained(decoder_dir, rope_parameters=rope)
    model.embedding_model.config.rope_parameters = rope
    model.embedding_model.mask_type = "c"
    input_ids = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(input_ids).last_hidden_state
        torch.testing.assert_close(model.embedding_model(input_ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_bf16_training_attends_in_fp32(is_causal, is_packed):
    """Outputs and gradients under autocast are those of a float64 loop over texts and heads, rounded to bf16 once."""
    torch.manual_seed(0)
    lengths = [5, 5, 3, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    layout = PackedLayout(lengths) if is_packed else PaddedLayout(5, mask)
    rows = [sum(lengths)] if is_packed else [4, 5]
    inputs = [torch.randn(*rows, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        out = layout.attend(*inputs, is_causal)
    assert out.dtype == torch.bfloat16
    out = out if is_packed else out[mask]
    weights = torch.randn(sum(lengths), 4, 8).bfloat16()
    (out.float() * weights).sum().backward()

    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = exact if is_packed else [x[mask] for x in exact]
    expected = torch.zeros(sum(lengths), 4, 8, dtype=torch.float64)
    for text, length in enumerate(lengths):
        part = slice(sum(lengths[:text]), sum(lengths[:text]) + length)
        for head in range(4):
            scores = q[part, head] @ k[part, head // 2].T / math.sqrt(8)
            if is_causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            expected[part, head] = scores.softmax(-1) @ v[part, head // 2]
    (expected * weights).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
    # The gradients of keys and values that two query heads share are rounded twice and added.
    for low, high, atol in zip(inputs, exact, (1e-4, 2e-2, 2e-2)):
        torch.testing.assert_close(low.grad.double(), high.grad, rtol=2**-8, atol=atol)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    input_ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        model(input_ids, None, torch.ones_like(input_ids)).sentence_embeddings[:, 0].sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.embedding_model.gradient_checkpointing
    for expected, actual in zip(plain, gradients()):
        torch.testing.assert_close(actual, expected)


# --- Poolings, each against loops in float64


def attention_loop(block, x, context, heads):
    """One row: x [tokens, hidden], context [keys, width], in float64, query by query and head by head."""
    q, kv = x @ block.to_q.weight.T, context @ block.to_kv.weight.T
    k, v = kv[:, : kv.shape[1] // 2], kv[:, kv.shape[1] // 2 :]
    width = q.shape[1] // heads
    out = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for t in range(len(q)):
            scores = torch.stack([q[t, part] @ key for key in k[:, part]]) / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum()
            out[t, part] = sum(w * value for w, value in zip(weights, v[:, part]))
    return out @ block.to_out.weight.T


def layer_norm(norm, x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def feed_forward(block, x):
    value, gate = (x @ block.net[0].weight.T + block.net[0].bias).chunk(2, -1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return (value * gelu) @ block.net[2].weight.T + block.net[2].bias


@pytest.mark.parametrize("pooling_type", ["latent_attention", "self_attention", "mean", "eos"])
def test_pooling_equals_loop(model, pooling_type):
    config = NVEmbedConfig.from_dict({**model.config.to_dict(), "pooling_type": pooling_type})
    torch.manual_seed(0)
    pooling = NVEmbedModel(config).latent_attention_model.double()
    for parameter in pooling.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states = torch.randn(3, 6, 32, dtype=torch.float64)
    lengths, skipped = [6, 4, 3], [2, 0, 1]
    attention_mask = torch.tensor([[int(t < n) for t in range(6)] for n in lengths])
    pool_mask = torch.tensor([[int(s <= t < n) for t in range(6)] for n, s in zip(lengths, skipped)])
    expected = []
    for row, n, s in zip(states, lengths, skipped):
        x = row[:n]
        if pooling_type == "latent_attention":
            attend, feed = pooling.cross_attend_blocks
            context = layer_norm(attend.norm_context, pooling.latents)
            x = x + attention_loop(attend.fn, layer_norm(attend.norm, x), context, heads=2)
            x = x + feed_forward(feed.fn, layer_norm(feed.norm, x))
        elif pooling_type == "self_attention":
            attend, feed = pooling.self_attend_blocks
            normed = layer_norm(attend.norm, x)
            x = x + attention_loop(attend.fn, normed, normed, heads=2)
            x = x + feed_forward(feed.fn, layer_norm(feed.norm, x))
        vector = x[-1] if pooling_type == "eos" else x[s:].mean(0)
        expected.append(vector / vector.norm())
    texts = PaddedLayout(6, attention_mask)
    with torch.no_grad():
        actual = pooling.pool(pooling(states, texts), pool_mask, texts)
    torch.testing.assert_close(actual.double(), torch.stack(expected).detach(), atol=1e-6, rtol=0)


def test_untrained_latent_attention_is_mean_pooling(checkpoint, decoder_dir, sentences):
    """New weights add nothing: the embedding is the plain mean of the base's own states (cosine 1, at least 0.99)."""
    model = NVEmbedModel.from_pretrained(checkpoint)
    reference = AutoModel.from_pretrained(decoder_dir, attn_implementation="eager")
    for text, embedding in zip(sentences, model.encode(sentences)):
        input_ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        mask = torch.zeros(1, 1, input_ids.shape[1], input_ids.shape[1])
        with torch.no_grad():
            mean = reference(input_ids, attention_mask=mask).last_hidden_state[0].mean(0)
        assert torch.cosine_similarity(embedding, mean, dim=0) > 0.9999


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("pooling_type", ["latent_attention", "mean", "eos", "self_attention"])
def test_the_modules_that_are_not_split_are_in_the_model(model, pooling_type, is_folded):
    """accelerate ends a sharded run that names another."""
    if is_folded and pooling_type != "latent_attention":
        return
    config = model.config
    config.pooling_type, config.latent_attention_is_folded = pooling_type, is_folded
    with torch.device("meta"):
        model = NVEmbedModel(config)
    assert {*model._no_split_modules} <= {type(module).__name__ for module in model.modules()}
    assert "MistralDecoderLayer" in model._no_split_modules
