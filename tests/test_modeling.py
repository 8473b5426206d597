"""The network against independent computations: the released code, transformers' decoder, loops in float64."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.modeling_nvembed import PaddedTexts, format_instruction, length_sorted_batches, pad, tokenize


INSTRUCTION = format_instruction("Given a question, retrieve")


# --- The released code


@pytest.fixture(scope="module")
def golden(golden_dir):
    cases = {case["name"]: case for case in json.loads((golden_dir / "cases.json").read_text())}
    return (
        NVEmbedModel.from_pretrained(golden_dir / "checkpoint"),
        cases,
        load_file(golden_dir / "expected.safetensors"),
    )


CASES = ["queries", "passages", "symmetric", "truncated", "truncated_passages", "no_trailing_space"]


@pytest.mark.parametrize("name", CASES)
def test_encode_equals_released_code(golden, name):
    model, cases, expected = golden
    case = cases[name]
    options = {"instruction": case["instruction"], "max_length": case["max_length"]}
    torch.testing.assert_close(model.encode(case["texts"], **options), expected[name], atol=1e-5, rtol=0)
    single = torch.cat([model.encode([text], **options) for text in case["texts"]])
    torch.testing.assert_close(single, expected[f"{name}.single"], atol=1e-5, rtol=0)


def test_every_golden_case_is_tested(golden):
    assert sorted(golden[1]) == sorted(CASES)


@pytest.mark.parametrize("name", ["queries", "symmetric"])
def test_tokens_equal_released_code(golden, name):
    model, cases, expected = golden
    case = cases[name]
    rows = tokenize(
        model.tokenizer, model.config, case["texts"], [case["instruction"]] * len(case["texts"]), case["max_length"]
    )
    features = pad(rows, model.tokenizer.pad_token_id)
    assert features["input_ids"].equal(expected[f"{name}.input_ids"])
    assert features["attention_mask"].equal(expected[f"{name}.attention_mask"])
    with torch.no_grad():
        states = model(features["input_ids"], features["attention_mask"]).last_hidden_state
    valid = features["attention_mask"].bool()
    # States are not normalized: their size is about 10, so 1e-5 is taken relative to it.
    torch.testing.assert_close(states[valid], expected[f"{name}.tokens"][valid], atol=1e-5, rtol=1e-5)


def test_full_size_model_has_the_released_tensors(golden_dir):
    index = json.loads((golden_dir / "official" / "model.safetensors.index.json").read_text())
    config = NVEmbedConfig.from_pretrained(golden_dir / "official")
    with torch.device("meta"):
        model = NVEmbedModel(config)
    weights = model.state_dict()
    assert sorted(weights) == sorted(index["weight_map"])
    assert sum(2 * tensor.numel() for tensor in weights.values()) == index["metadata"]["total_size"]


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
    with torch.no_grad():
        actual = pooling.pool(pooling(states, PaddedTexts(6, attention_mask)), pool_mask)
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


# --- encode


def test_instruction_is_attended_to_but_not_pooled(model, sentences):
    rows = tokenize(model.tokenizer, model.config, sentences[:1], [INSTRUCTION], 512)
    features = pad(rows, model.tokenizer.pad_token_id)
    with torch.no_grad():
        states = model(features["input_ids"]).last_hidden_state[0]
    offsets = model.tokenizer(INSTRUCTION + sentences[0], return_offsets_mapping=True)["offset_mapping"]
    # The text's first token: the space behind "Query:" counts to its first word, as in the released code.
    first = next(i for i, (_, end) in enumerate(offsets) if end >= len(INSTRUCTION))
    mean = states[first:].mean(0)
    torch.testing.assert_close(
        model.encode(sentences[:1], instruction=INSTRUCTION)[0], mean / mean.norm(), atol=1e-6, rtol=0
    )
    assert (model.encode(sentences[:1]) - model.encode(sentences[:1], instruction=INSTRUCTION)).abs().max() > 1e-3


def test_encode_keeps_the_order_whatever_the_batches(model, sentences):
    texts = [*sentences, "", "x", sentences[0] * 9]
    alone = torch.cat([model.encode([text]) for text in texts])
    for batch_tokens in (1, 60, 8192):
        torch.testing.assert_close(model.encode(texts, batch_tokens=batch_tokens), alone, atol=1e-6, rtol=0)


def test_batches_hold_their_budget_and_every_text():
    lengths = [3, 90, 5, 5, 40, 1, 200]
    batches = list(length_sorted_batches(lengths, 100))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)


def test_empty_and_long_texts(model):
    embeddings = model.encode(["", "word " * 3000], instruction=INSTRUCTION, max_length=64)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    row = tokenize(model.tokenizer, model.config, ["word " * 3000], [""], 64)[0].input_ids
    assert len(row) == 64
    assert row[-1] == model.tokenizer.eos_token_id, "truncation keeps the end token"


def test_no_length_pools_the_end_token_alone(model):
    """Every max_length either pools something of the text, or is an error: never `</s>` by itself."""
    outcomes = set()
    for max_length in range(1, 40):
        try:
            one, two = model.encode(["Return it.", "Sort all."], INSTRUCTION, max_length)
        except ValueError as error:
            assert "no token of the text is left to pool" in str(error)
            outcomes.add("error")
        else:
            assert (one - two).abs().max() > 1e-3, max_length
            outcomes.add("embedding")
    assert outcomes == {"error", "embedding"}


def test_latents_are_projected_once_whatever_the_batch(model, sentences):
    shapes = []
    to_kv = model.latent_attention_model.cross_attend_blocks[0].fn.to_kv
    to_kv.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    model.encode(sentences, batch_tokens=100_000)
    assert shapes == [(1, 8, 32)]


def test_encode_leaves_the_mode_as_it_was(model, sentences):
    model.train()
    assert not model.encode(sentences).requires_grad
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        ([], {}, ValueError, "empty list"),
        ("one text", {}, TypeError, r"the string 'one text'.*encode\(\[text\]\)"),
        (["a", None], {}, TypeError, r"prompts\[1\] is None of type NoneType"),
        (["a", 3.5], {}, TypeError, r"prompts\[1\] is 3.5"),
        (5, {}, TypeError, "prompts is of type int; encode takes a list"),
        (["a"], {"instruction": None}, TypeError, "instruction is None, not a string"),
        (["a"], {"max_length": 0}, ValueError, "max_length is 0; it must be a number of tokens"),
        (["a"], {"instruction": INSTRUCTION, "max_length": 5}, ValueError, "max_length is 5: no token of the text"),
    ],
)
def test_encode_names_bad_input(model, prompts, options, error, words):
    with pytest.raises(error, match=words):
        model.encode(prompts, **options)


# --- Checkpoints


@pytest.mark.parametrize(
    ("field", "value"), [("pooling_type", "max"), ("mask_type", "bidirectional"), ("padding_side", "left")]
)
def test_config_names_bad_values(field, value):
    with pytest.raises(ValueError, match=f"{field} is '{value}'; it must be one of"):
        NVEmbedConfig(**{field: value})


@pytest.mark.parametrize("pooling_type", ["latent_attention", "mean", "eos", "self_attention"])
def test_saved_checkpoint_gives_the_same_embeddings(model, sentences, tmp_path, pooling_type):
    config = NVEmbedConfig.from_dict({**model.config.to_dict(), "pooling_type": pooling_type})
    original = NVEmbedModel(config)
    original.tokenizer = model.tokenizer
    original.save_pretrained(tmp_path)
    assert torch.equal(NVEmbedModel.from_pretrained(tmp_path).encode(sentences), original.encode(sentences))


def test_saved_checkpoint_is_complete(checkpoint):
    assert {path.name for path in checkpoint.iterdir()} >= {
        "config.json", "model.safetensors", "modeling_nvembed.py", "configuration_nvembed.py", "tokenizer.json"
    }  # fmt: skip
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_nvembed.NVEmbedConfig",
        "AutoModel": "modeling_nvembed.NVEmbedModel",
    }
    assert AutoConfig.from_pretrained(checkpoint).pooling_type == "latent_attention"


def test_checkpoint_loads_where_nvembed_is_not_installed(model, sentences, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    script = f"""
import sys, torch
sys.modules["nvembed"] = None  # any import of it fails
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path / "checkpoint")!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
torch.save(model.encode({sentences!r}, instruction={INSTRUCTION!r}), {str(tmp_path / "out.pt")!r})
model.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    expected = model.encode(sentences, instruction=INSTRUCTION)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, atol=1e-6, rtol=0)
    again = NVEmbedModel.from_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_nvembed.py").is_file()
    torch.testing.assert_close(again.encode(sentences, instruction=INSTRUCTION), expected, atol=1e-6, rtol=0)
