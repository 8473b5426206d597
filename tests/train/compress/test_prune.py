"""Pruning of checkpoints: what is looked at, what becomes of them, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.train.compress.calibration import calibration_chunks, walk_layers
from nvembed.train.compress.checkpoint import load_uncompressed
from nvembed.train.compress.prune import PruneArguments, describe, drop_latent_attention, prune
from nvembed.train.compress.sparsity import Pattern, decoder_matrices
from nvembed.train.data.source import DatasetSource
from tests import preloaded
from tests.triplets import write_jsonl


ROOT = Path(__file__).parents[3]


@pytest.fixture
def data(tmp_path, sentences):
    rows = [
        {"query": text, "positive": text.lower(), "negatives": [sentences[i - 1]]} for i, text in enumerate(sentences)
    ]
    return write_jsonl(tmp_path / "triplets.jsonl", rows)


@pytest.fixture
def asked(checkpoint, data, tmp_path):
    def make(**overrides) -> PruneArguments:
        options = {
            "model_name_or_path": str(checkpoint), "output_dir": str(tmp_path / "pruned"), "method": "sparsegpt",
            "datasets": [DatasetSource(data, instruction="Find it")], "calibration_samples": 8, "device": "cpu",
        }  # fmt: skip
        return PruneArguments(**(options | overrides))

    return make


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "4:8", "2:4"])
def test_every_matrix_of_the_decoder_gets_the_pattern(asked, model, method, pattern):
    latents = {name: tensor.clone() for name, tensor in model.latent_attention_model.state_dict().items()}
    report = prune(asked(method=method, pattern=pattern), model)
    matrices = decoder_matrices(model.embedding_model)
    assert [entry["matrix"] for entry in report] == list(matrices) and len(matrices) == 3 * 7
    for entry, module in zip(report, matrices.values()):
        assert Pattern.parse(pattern).holds(module.weight)
        assert entry["sparsity"] == pytest.approx(0.5, abs=0.01) and entry["relative_error"] > 0
    assert all(torch.equal(latents[name], tensor) for name, tensor in model.latent_attention_model.state_dict().items())
    assert model.config.pruning == {"method": method, "pattern": pattern, "sparsity": 0.5}
    assert model.encode(["a text"]).isfinite().all()


def test_moments_are_those_of_the_packed_texts_with_instructions(asked, model):
    """Against one text at a time through the whole, unpruned model."""
    chunks = calibration_chunks(asked(), model)
    texts = [ids for chunk in chunks for ids in chunk["input_ids"].split(chunk["lengths"])]
    instruction = model.tokenizer("Instruct: Find it\nQuery: ", add_special_tokens=False).input_ids
    assert sum(instruction == ids.tolist()[1 : 1 + len(instruction)] for ids in texts) == 8  # the queries
    seen = {}
    walk_layers(model, chunks, "cpu", lambda index, layer, inputs: seen.update({index: inputs}))
    expected, cosines = torch.zeros(64, 64, dtype=torch.float64), []

    def add(module, inputs):
        x = inputs[0].double().flatten(0, -2)
        expected.add_(x.T @ x)

    handle = model.embedding_model.layers[2].mlp.down_proj.register_forward_pre_hook(add)
    with torch.no_grad():
        for ids in texts:
            states = model(ids[None], output_hidden_states=True).hidden_states
            cosines.append(torch.cosine_similarity(states[1], states[2], dim=-1).flatten())
    handle.remove()
    assert torch.allclose(seen[2].moments["mlp.down_proj"].double(), expected, rtol=1e-4, atol=1e-4)
    assert seen[1].influence == pytest.approx(1 - torch.cat(cosines).mean().item(), abs=1e-5)
    assert seen[0].tokens == sum(map(len, texts))


def test_later_layers_see_what_the_pruned_ones_give(asked, model):
    """With a first layer that the change makes add nothing, the second gets what the first one got."""
    chunks, seen = calibration_chunks(asked(), model), []

    def break_first(index, layer, inputs):
        seen.append(inputs.moments["self_attn.q_proj"])
        if index == 0:
            layer.mlp.down_proj.weight.data.zero_()
            layer.self_attn.o_proj.weight.data.zero_()

    walk_layers(model, chunks, "cpu", break_first)
    assert torch.allclose(seen[0], seen[1], rtol=1e-4)  # a layer that adds nothing, and norms of ones


def test_layers_neurons_and_heads_are_dropped(asked, model, tmp_path, encode_without_nvembed):
    dense = model.encode(["a text"])
    prune(asked(method=None, num_layers=2, intermediate_size=40, num_key_value_heads=1), model)
    assert (
        model.config.pruning["layers"] == sorted(model.config.pruning["layers"])
        and len(model.embedding_model.layers) == 2
    )
    layer = model.embedding_model.layers[0]
    assert layer.mlp.down_proj.weight.shape == (32, 40) and layer.self_attn.q_proj.weight.shape == (16, 32)
    model.save_pretrained(tmp_path / "small")
    again = NVEmbedModel.from_pretrained(tmp_path / "small")
    assert torch.allclose(again.encode(["a text"]), model.encode(["a text"]), atol=1e-6)
    assert not torch.allclose(dense, model.encode(["a text"]), atol=1e-3)
    elsewhere, _ = encode_without_nvembed(tmp_path / "small", ["a text"], "", 64)
    assert torch.allclose(elsewhere, model.encode(["a text"]), atol=1e-6)


def test_neurons_that_do_nothing_go_first(asked, model):
    """Neurons and key heads whose outputs are zero are dropped without a change of the embeddings."""
    for layer in model.embedding_model.layers:
        layer.mlp.up_proj.weight.data[::2] = 0
        layer.self_attn.v_proj.weight.data[:8] = 0  # the first of two key heads
    before = model.encode(["Sort the numbers.", "Draw a circle."])
    prune(asked(method=None, intermediate_size=32, num_key_value_heads=1), model)
    assert torch.allclose(model.encode(["Sort the numbers.", "Draw a circle."]), before, atol=1e-6)


def test_a_layer_that_does_nothing_goes_first(asked, model):
    layer = model.embedding_model.layers[1]
    layer.mlp.down_proj.weight.data.zero_()
    layer.self_attn.o_proj.weight.data.zero_()
    before = model.encode(["Sort the numbers."])
    prune(asked(method=None, num_layers=2), model)
    assert model.config.pruning["layers"] == [0, 2]
    assert torch.allclose(model.encode(["Sort the numbers."]), before, atol=1e-6)


def test_dropping_the_latents_pools_by_the_mean(asked, model):
    prune(asked(method=None, drop_latent_attention=True), model)
    assert model.config.pooling_type == "mean" and not model.latent_attention_model.state_dict()
    with pytest.raises(ValueError, match="not a latent attention"):
        model.eval().fold_latent_attention()
    assert "triplets looked at" not in describe(asked(method=None, drop_latent_attention=True), model, [])
    for pooling in ("mean", "eos"):
        model.config.pooling_type = pooling
        with pytest.raises(ValueError, match=f"pooling_type is '{pooling}'; leave it out"):
            drop_latent_attention(model)


def test_the_script_writes_a_checkpoint_that_says_what_it_is(asked, checkpoint, data, tmp_path):
    command = [
        ROOT / "train/compress/prune.py", "--model_name_or_path", checkpoint, "--datasets", data,
        "--instruction", "Find it", "--method", "wanda", "--pattern", "4:8", "--calibration_samples", "8",
        "--output_dir", tmp_path / "out", "--num_negatives", "1",
    ]  # fmt: skip
    done = preloaded.run(*command)
    assert done.returncode == 0, done.stderr
    assert NVEmbedConfig.from_pretrained(tmp_path / "out").pruning["pattern"] == "4:8"
    assert len(json.loads((tmp_path / "out" / "pruning.json").read_text())) == 21
    assert "4:8, by wanda" in (tmp_path / "out" / "README.md").read_text() and "`mlp.up_proj`" in done.stdout
    again = preloaded.run(*command)
    assert again.returncode != 0 and "already holds a checkpoint" in again.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": None}, "nothing is to be pruned"),
        ({"method": None, "sparsity": 0.5, "num_layers": 1}, "sparsity is 0.5 and no method is given"),
        ({"method": None, "pattern": "4:8", "num_layers": 1}, "pattern is 4:8 and no method is given"),
        ({"pattern": 124}, 'put it in quotes, as pattern: "2:4"'),
        ({"sparsity": 2.0, "pattern": "unstructured"}, "above 0 and below 1"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"datasets": []}, "datasets is empty"),
        ({"calibration_samples": 0}, "calibration_samples is 0"),
    ],
)
def test_bad_settings_are_refused_before_loading(asked, overrides, message):
    with pytest.raises(ValueError, match=message):
        asked(**overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"calibration_samples": 9}, "the data has 8 triplets and calibration_samples is 9"),
        ({"num_layers": 3}, "num_layers is 3 and the model has 3"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5"),
        ({"pattern": "3:5"}, "do not divide into groups of 5"),
        ({"intermediate_size": 42, "pattern": "4:8"}, "rows of 42 weights"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(asked, model, overrides, message):
    with pytest.raises(ValueError, match=message):
        prune(asked(**overrides), model)


def test_a_sparse_checkpoint_is_not_narrowed_alone(asked, model):
    prune(asked(pattern="2:4"), model)
    with pytest.raises(ValueError, match="is 2:4 already, and its groups would not outlive"):
        prune(asked(method=None, intermediate_size=42), model)
    prune(asked(method="wanda", pattern="4:8", intermediate_size=40), model)
    assert all(Pattern.parse("4:8").holds(m.weight) for m in decoder_matrices(model.embedding_model).values())


def test_folded_checkpoints_are_refused(model, tmp_path):
    model.eval().fold_latent_attention().save_pretrained(tmp_path / "folded")
    with pytest.raises(ValueError, match="folded latent attention, which cannot be trained again"):
        load_uncompressed(str(tmp_path / "folded"), None, "prune")
