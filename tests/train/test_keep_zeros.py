"""Pruned weights through training: what is trained is what is merged, and zeros stay."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from nvembed import NVEmbedModel
from nvembed.train.adapter import add_adapter, merge_adapter
from nvembed.train.arguments import ModelArguments, Stage2Arguments
from nvembed.train.collator import TripletCollator
from nvembed.train.compress.sparsity import Pattern, decoder_matrices
from nvembed.train.trainer import EmbeddingTrainer
from tests.conftest import SENTENCES, randomize


PATTERN = Pattern.parse("2:4")


@pytest.fixture
def pruned(model) -> NVEmbedModel:
    for module in decoder_matrices(model.embedding_model).values():
        module.weight.data.masked_fill_(PATTERN.lowest(module.weight.abs()), 0)
    model.config.pruning = {"method": "magnitude", "pattern": "2:4", "sparsity": 0.5}
    return model


def zeros_of(model) -> list[torch.Tensor]:
    return [module.weight == 0 for module in decoder_matrices(model.embedding_model).values()]


def train(model, tmp_path, **options):
    rows = [
        {
            "query": text, "positive": text.lower(), "negatives": [SENTENCES[i - 1]], "instruction": "",
            "symmetric": False, "dataset": "d",
        }
        for i, text in enumerate(SENTENCES)
    ]  # fmt: skip
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    args = Stage2Arguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=3, learning_rate=0.05, warmup_steps=0,
        use_cpu=True, report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    collator = TripletCollator(base.tokenizer, base.config, 32, 1)
    EmbeddingTrainer(model=model, args=args, train_dataset=rows, data_collator=collator).train()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_of_a_pruned_matrix_equals_the_masked_sum(pruned, dropout):
    adapted = add_adapter(pruned, ModelArguments(model_name_or_path="x", lora_dropout=dropout))
    randomize(adapted)
    layer = adapted.get_base_model().embedding_model.layers[0].mlp.up_proj
    x = torch.randn(7, 32)
    weight = layer.get_base_layer().weight
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    expected = F.linear(x, weight + delta * (weight != 0))
    layer.eval()
    assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.train()
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    dropped = layer.lora_dropout["default"](x)
    assert torch.allclose(found, F.linear(x, weight) + F.linear(dropped, delta * (weight != 0)), atol=1e-5)


def test_merging_keeps_zeros_and_the_embeddings_trained(pruned, tmp_path):
    before = zeros_of(pruned)
    weights = [module.weight.clone() for module in decoder_matrices(pruned.embedding_model).values()]
    adapted = add_adapter(pruned, ModelArguments(model_name_or_path="x", lora_dropout=0.0))
    train(adapted, tmp_path)
    trained = adapted.get_base_model().eval().encode(SENTENCES)
    merged = merge_adapter(adapted)
    assert torch.allclose(merged.encode(SENTENCES), trained, atol=1e-5)
    for module, zeros, weight in zip(decoder_matrices(merged.embedding_model).values(), before, weights):
        assert PATTERN.holds(module.weight) and torch.equal(module.weight == 0, zeros)
        assert not torch.equal(module.weight, weight)


def test_training_every_weight_keeps_zeros(pruned, tmp_path):
    before, first = zeros_of(pruned), pruned.embedding_model.layers[0].mlp.up_proj.weight.clone()
    train(add_adapter(pruned, ModelArguments(model_name_or_path="x", use_peft=False)), tmp_path)
    assert all(torch.equal(now, zeros) for now, zeros in zip(zeros_of(pruned), before))
    assert not torch.equal(pruned.embedding_model.layers[0].mlp.up_proj.weight, first)


def test_a_dense_model_gets_ordinary_lora(model):
    adapted = add_adapter(model, ModelArguments(model_name_or_path="x"))
    assert type(adapted.get_base_model().embedding_model.layers[0].mlp.up_proj).__module__.startswith("peft.")


def test_what_would_fill_the_zeros_is_refused(pruned, tmp_path):
    with pytest.raises(ValueError, match="use_dora is set, and the checkpoint is pruned"):
        add_adapter(pruned, ModelArguments(model_name_or_path="x", use_dora=True))
    with pytest.raises(ValueError, match="lora_modules_to_save has embedding_model.layers.0.mlp.up_proj"):
        in_full = ["latent_attention_model", "layers.0.mlp.up_proj"]
        add_adapter(pruned, ModelArguments(model_name_or_path="x", lora_modules_to_save=in_full))
    model = add_adapter(pruned, ModelArguments(model_name_or_path="x", use_peft=False))
    with pytest.raises(ValueError, match="zeros are kept with LoRA, or by AdamW"):
        train(model, tmp_path, optim="sgd")


def test_an_adapter_of_a_pruned_base_is_not_loaded_as_a_dense_one(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "pruned")
    adapted = add_adapter(NVEmbedModel.from_pretrained(tmp_path / "pruned"), ModelArguments(model_name_or_path="x"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "pruned")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter of a pruned base"):
        NVEmbedModel.from_pretrained(tmp_path / "adapter")
