"""Checkpoints in 8 bits: what is stored, that they load everywhere, and that zeros survive."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from torch import nn
from torchao.quantization import Float8Tensor, Int8Tensor

from nvembed import NVEmbedModel
from nvembed.modeling_nvembed import embed_rows
from nvembed.train.adapter import add_adapter
from nvembed.train.arguments import ModelArguments
from nvembed.train.checkpoints import write_checkpoint
from nvembed.train.compress.checkpoint import load_uncompressed
from nvembed.train.compress.quantize import QuantizeArguments, quantize
from nvembed.train.compress.sparsity import Pattern, decoder_matrices
from nvembed.train.data.source import DatasetSource
from tests import preloaded
from tests.conftest import SENTENCES
from tests.triplets import write_jsonl


ROOT = Path(__file__).parents[3]
TEXTS = SENTENCES[:4]


@pytest.fixture
def data(tmp_path):
    rows = [
        {"query": text, "positive": text.lower(), "negatives": [SENTENCES[i - 1]]} for i, text in enumerate(SENTENCES)
    ]
    return write_jsonl(tmp_path / "triplets.jsonl", rows)


@pytest.fixture
def asked(data):
    def make(**overrides) -> QuantizeArguments:
        options = {"model_name_or_path": "in", "output_dir": "out", "calibration_samples": 8, "device": "cpu"}
        return QuantizeArguments(**(options | {"datasets": [DatasetSource(data, instruction="")]} | overrides))

    return make


def dense_weights(model: NVEmbedModel) -> dict[str, torch.Tensor]:
    return {name: module.weight.detach().clone() for name, module in decoder_matrices(model.embedding_model).items()}


@pytest.mark.parametrize("weight_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_rounding_to_nearest_equals_its_definition(asked, model, weight_dtype):
    before = dense_weights(model)
    quantize(asked(weight_dtype=weight_dtype), model)
    kind = Int8Tensor if weight_dtype == "int8" else Float8Tensor
    for name, module in decoder_matrices(model.embedding_model).items():
        assert isinstance(module.weight, kind)
        error = (module.weight.dequantize() - before[name]).abs()
        largest = before[name].abs().amax(1, keepdim=True)
        # Half a step: of int8's grid, or of the 3 or 2 bits behind a float's point.
        step = {"int8": largest / 254, "float8_e4m3fn": before[name].abs() / 16, "float8_e5m2": before[name].abs() / 8}
        assert (error <= 1.02 * step[weight_dtype] + 1e-3 * largest).all(), name
    assert isinstance(model.embedding_model.embed_tokens.weight, kind)
    assert type(model.latent_attention_model.latents) is nn.Parameter


def test_gptq_makes_smaller_errors_than_rounding(asked, model):
    before = dense_weights(model)
    report = quantize(asked(rounding="gptq"), model)
    assert len(report) == 21
    assert sum(entry["relative_error"] < entry["relative_error_of_nearest"] for entry in report) >= 15
    for name, module in decoder_matrices(model.embedding_model).items():
        assert module.weight.qdata.dtype is torch.int8
        scale = before[name].abs().amax(1) / 127
        assert torch.allclose(module.weight.scale.flatten(), scale)
        assert (module.weight.dequantize() - before[name]).abs().max() < 20 * scale.max()


@pytest.mark.parametrize("options", [{}, {"rounding": "gptq"}, {"weight_dtype": "float8_e4m3fn"}])
def test_a_checkpoint_loads_everywhere_with_the_same_embeddings(
    asked, model, options, tmp_path, encode_without_nvembed
):
    dense = model.encode(TEXTS, "Find it", 64)
    quantize(asked(**options), model)
    quantized = model.encode(TEXTS, "Find it", 64)
    folder = tmp_path / "quantized"
    write_checkpoint(model, str(folder))
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    again = NVEmbedModel.from_pretrained(folder)
    assert isinstance(again.embedding_model.layers[0].mlp.up_proj.weight, Int8Tensor | Float8Tensor)
    assert torch.allclose(again.encode(TEXTS, "Find it", 64), quantized, atol=1e-6)
    elsewhere, saved = encode_without_nvembed(folder, TEXTS, "Find it", 64)
    assert torch.allclose(elsewhere, quantized, atol=1e-5)
    resaved = NVEmbedModel.from_pretrained(saved)
    assert torch.allclose(resaved.encode(TEXTS, "Find it", 64), quantized, atol=1e-5)
    under_st = SentenceTransformer(str(folder), trust_remote_code=True).encode(TEXTS, prompt="Find it")
    assert torch.allclose(torch.from_numpy(under_st), quantized, atol=1e-5)
    assert (torch.cosine_similarity(dense, quantized) > (0.95 if "float8" in str(options) else 0.999)).all()
    folded = again.eval().fold_latent_attention()
    assert torch.allclose(folded.encode(TEXTS, "Find it", 64), quantized, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"rounding": "gptq"}, {"weight_dtype": "float8_e5m2"}])
def test_zeros_stay(asked, model, options):
    pattern = Pattern.parse("2:4")
    for module in decoder_matrices(model.embedding_model).values():
        module.weight.data.masked_fill_(pattern.lowest(module.weight.abs()), 0)
    model.config.pruning = {"method": "magnitude", "pattern": "2:4", "sparsity": 0.5}
    quantize(asked(**options), model)
    for module in decoder_matrices(model.embedding_model).values():
        assert pattern.holds(module.weight.dequantize())


def test_weights_that_lost_their_zeros_are_refused(asked, model):
    model.config.pruning = {"method": "magnitude", "pattern": "2:4", "sparsity": 0.5}
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is not 2:4"):
        quantize(asked(), model)


@pytest.mark.parametrize("weight_dtype", ["int8", "float8_e4m3fn"])
def test_only_the_rows_asked_for_are_dequantized(asked, model, weight_dtype):
    quantize(asked(weight_dtype=weight_dtype), model)
    ids = torch.tensor([[5, 0, 399], [7, 7, 2]])
    table = model.embedding_model.embed_tokens
    assert torch.allclose(embed_rows(table, ids), table.weight.dequantize()[ids], atol=1e-7)


def test_embeddings_may_stay(asked, model):
    quantize(asked(quantize_embeddings=False), model)
    assert type(model.embedding_model.embed_tokens.weight) is nn.Parameter


def test_a_quantized_checkpoint_is_neither_quantized_again_nor_trained(asked, model, checkpoint, tmp_path):
    quantize(asked(), model)
    write_checkpoint(model, str(tmp_path / "int8"))
    with pytest.raises(ValueError, match=r"is quantized already \(torchao\); quantize the checkpoint"):
        load_uncompressed(str(tmp_path / "int8"), None, "quantize")
    for use_peft in (True, False):
        with pytest.raises(ValueError, match="is quantized by torchao"):
            arguments = ModelArguments(model_name_or_path=str(tmp_path / "int8"), use_peft=use_peft)
            add_adapter(NVEmbedModel.from_pretrained(tmp_path / "int8"), arguments)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_activations_in_int8_too(asked, model, tmp_path, rounding):
    dense = model.encode(TEXTS)
    quantize(asked(quantize_activations=True, rounding=rounding), model)
    write_checkpoint(model, str(tmp_path / "int8"))
    again = NVEmbedModel.from_pretrained(tmp_path / "int8")
    assert again.embedding_model.layers[0].mlp.up_proj.weight.act_quant_kwargs is not None
    assert torch.allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-5)
    assert (torch.cosine_similarity(again.encode(TEXTS), dense) > 0.99).all()


def test_the_script_writes_half_the_bytes_of_bf16(checkpoint, tmp_path):
    NVEmbedModel.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    command = [ROOT / "train/compress/quantize.py", "--model_name_or_path", tmp_path / "bf16"]
    command += ["--output_dir", tmp_path / "out"]
    done = preloaded.run(*command)
    assert done.returncode == 0, done.stderr
    assert "in int8" in done.stdout and "in int8" in (tmp_path / "out" / "README.md").read_text()
    bytes_of = []
    for folder in ("bf16", "out"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            names = [name for name in list(file.keys()) if "_proj." in name or "embed_tokens" in name]
            tensors = {name: file.get_tensor(name) for name in names}
        bytes_of.append(sum(t.nbytes for name, t in tensors.items() if not name.endswith(("scale", "zero_point"))))
    assert bytes_of[1] == bytes_of[0] / 2
    again = preloaded.run(*command)
    assert again.returncode != 0 and again.stderr.splitlines()[-1].startswith("quantize: ")
    assert "already holds a checkpoint" in again.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rounding": "gptq", "weight_dtype": "float8_e4m3fn"}, "GPTQ is for int8"),
        ({"rounding": "gptq", "datasets": []}, "datasets is empty"),
        ({"quantize_activations": True, "weight_dtype": "float8_e5m2"}, "float8_e4m3fn"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
    ],
)
def test_bad_settings_are_refused(asked, overrides, message):
    with pytest.raises(ValueError, match=message):
        asked(**overrides)
