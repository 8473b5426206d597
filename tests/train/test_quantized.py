"""LoRA on a base of 8 or 4 bit (QLoRA, arXiv 2305.14314): it trains, and merges into what the numbers stand for."""

import json

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config
from trl import get_quantization_config

from nvembed import NVEmbedModel
from nvembed.train.adapter import add_adapter
from nvembed.train.arguments import ModelArguments, Stage1Arguments
from nvembed.train.checkpoints import write_checkpoint
from nvembed.train.collator import TripletCollator
from nvembed.train.data.source import DatasetSource
from nvembed.train.init_checkpoint import init_model
from nvembed.train.trainer import EmbeddingTrainer
from tests.train.test_init_checkpoint import family
from tests.triplets import prepare


bitsandbytes = pytest.importorskip("bitsandbytes")


def make_trainer(wide_checkpoint, tmp_path, sentences, **options):
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in sentences]
    rows = [json.dumps({"query": q, "positive": p, "instruction": "Complete"}) + "\n" for q, p in halves]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    model_args = ModelArguments(lora_dropout=0.0, **options)
    model = NVEmbedModel.from_pretrained(
        wide_checkpoint, dtype=model_args.dtype, quantization_config=get_quantization_config(model_args)
    )
    arguments = Stage1Arguments(
        output_dir=str(tmp_path / "out"), max_steps=3, learning_rate=1e-2, warmup_steps=0, logging_steps=1,
        per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, bf16=model_args.dtype == "bfloat16",
        gradient_checkpointing=True,
    )  # fmt: skip
    return EmbeddingTrainer(
        model=add_adapter(model, model_args),
        args=arguments,
        train_dataset=prepare([DatasetSource(str(tmp_path / "pairs.jsonl"))], num_negatives=2),
        data_collator=TripletCollator(model.tokenizer, model.config, max_length=64, num_negatives=2),
    )


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_trains_and_merges(wide_checkpoint, tmp_path, sentences, bits):
    trainer = make_trainer(wide_checkpoint, tmp_path, sentences, dtype="bfloat16", **{bits: True})
    model = trainer.model
    kinds = {type(p).__name__ for name, p in model.named_parameters() if "base_layer" in name}
    assert kinds == {"Params4bit" if bits == "load_in_4bit" else "Int8Params"}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(before[name].dtype == torch.float32 for name in trained), "LoRA and latent attention in full precision"
    assert any("latents" in name for name in trained)
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained
    trainer.save_merged()
    merged = NVEmbedModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_centred_checkpoint_keeps_its_mean(wide_checkpoint, tmp_path, sentences):
    model = NVEmbedModel.from_pretrained(wide_checkpoint)
    model.config.latent_attention_config.subtract_mean = True
    mean = torch.linspace(-1, 1, model.config.hidden_size)
    model.latent_attention_model.mean_embedding = mean
    model.save_pretrained(tmp_path / "centred")
    make_trainer(tmp_path / "centred", tmp_path, sentences, dtype="float32", load_in_4bit=True).save_merged()
    merged = NVEmbedModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged.latent_attention_model.mean_embedding, mean)


def compute_in_fp32(model) -> None:
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # a kernel that computes in bf16


@pytest.mark.parametrize(("bits", "bar"), [("load_in_4bit", 1e-4), ("load_in_8bit", 2e-2)])
def test_merged_embeddings_are_those_of_the_adapter(wide_checkpoint, tmp_path, sentences, bits, bar):
    """8 bit rounds the activations, too."""
    trainer = make_trainer(wide_checkpoint, tmp_path, sentences, dtype="float32", **{bits: True})
    trainer.train()
    compute_in_fp32(trainer.model)
    adapted = trainer.model.encode(sentences)
    trainer.save_merged()
    merged = NVEmbedModel.from_pretrained(tmp_path / "out").encode(sentences)
    assert (NVEmbedModel.from_pretrained(wide_checkpoint).encode(sentences) - merged).abs().max() > 0.2, (
        "it learnt something"
    )
    torch.testing.assert_close(merged, adapted, atol=bar, rtol=0)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_merged_matrix_is_dequantized_plus_lora(wide_checkpoint, tmp_path, sentences, bits):
    trainer = make_trainer(wide_checkpoint, tmp_path, sentences, dtype="float32", **{bits: True})
    trainer.train()
    layer = trainer.model.get_base_model().embedding_model.layers[1].mlp.down_proj
    with torch.no_grad():
        product = (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()) * 2  # 32 / 16
        if bits == "load_in_4bit":  # the codes, looked up in NF4's table, times the largest of each 64
            weight = layer.base_layer.weight
            quantized = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
        else:
            codes = layer.base_layer.weight.data.double()
            scales = (
                layer.base_layer.state.SCB if layer.base_layer.state.SCB is not None else layer.base_layer.weight.SCB
            )
            quantized = codes * scales.double()[:, None] / 127
    original = NVEmbedModel.from_pretrained(wide_checkpoint).embedding_model.layers[1].mlp.down_proj.weight.double()
    trainer.save_merged()
    merged = NVEmbedModel.from_pretrained(tmp_path / "out").embedding_model.layers[1].mlp.down_proj.weight.double()
    torch.testing.assert_close(merged, quantized + product, atol=1e-6, rtol=0)
    assert (merged - original - product).abs().max() > 1e-4, "the base's rounding is kept, LoRA made up for it"


def test_quantized_weights_are_not_trained_themselves(wide_checkpoint, tmp_path, sentences):
    with pytest.raises(ValueError, match="quantized weights cannot be trained: drop load_in_4bit"):
        make_trainer(wide_checkpoint, tmp_path, sentences, dtype="bfloat16", load_in_4bit=True, use_peft=False)


@pytest.mark.parametrize(("kind", "fields"), [(Qwen2Config, {}), (Qwen3Config, {"head_dim": 16})])
def test_other_families_train_in_4_bits_and_merge(kind, fields, tmp_path, decoder_dir, init_args, sentences):
    """Qwen2's biases and Qwen3's norms of queries and keys stay as they are, beside a quantized matrix."""
    family(kind, tmp_path / "base", decoder_dir, hidden_size=64, intermediate_size=128, **fields)
    write_checkpoint(init_model(init_args(base=str(tmp_path / "base"))), str(tmp_path / "checkpoint"))
    trainer = make_trainer(tmp_path / "checkpoint", tmp_path, sentences, dtype="float32", load_in_4bit=True)
    trainer.train()
    compute_in_fp32(trainer.model)
    adapted = trainer.model.encode(sentences)
    trainer.save_merged()
    merged = NVEmbedModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged.encode(sentences), adapted, atol=1e-4, rtol=0)
    before = NVEmbedModel.from_pretrained(tmp_path / "checkpoint").state_dict()
    kept = [name for name in before if "_norm" in name or name.endswith("_proj.bias")]
    assert kept and all(torch.equal(merged.state_dict()[name], before[name]) for name in kept)
