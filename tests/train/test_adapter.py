"""Lists of modules are checked against the model, and adapter folders open as checkpoints do."""

import json
import shutil

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModel

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.eval.models import load_model
from nvembed.train.adapter import add_adapter, merge_adapter, write_adapter
from nvembed.train.arguments import ModelArguments
from nvembed.train.checkpoints import write_checkpoint
from nvembed.train.init_checkpoint import main as init
from nvembed.train.run_stage import check_adapter_fits


def adapted(folder, **options):
    return add_adapter(NVEmbedModel.from_pretrained(folder), ModelArguments(**options))


def in_full(model) -> list[str]:
    names = (name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))
    return [name.removeprefix("base_model.model.") for name in names]


@pytest.fixture
def mean(tmp_path, init_args):
    init(init_args(tmp_path / "mean", pooling_type="mean"))
    return tmp_path / "mean"


@torch.no_grad()
def train_a_little(model) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


# --- Lists of modules


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_modules_to_save": ["latent_attention_model", "norm"]}, "'norm' is .* which lies within latent_att"),
        ({"lora_modules_to_save": ["latent_atention_model"]}, "no module is called 'latent_atention_model'; did you"),
        ({"lora_modules_to_save": ["act"]}, "act has no weights to train"),
        ({"lora_target_modules": ["q_proj", "v_porj"]}, "lora_target_modules: no module is called 'v_porj'; did you"),
        ({"lora_target_modules": ["q_porj"]}, "lora_target_modules: no module is called 'q_porj'"),
        ({"lora_target_modules": [r".*\.q_porj"]}, "the pattern .* matches no module"),
        (
            {"lora_target_parameters": ["q_porj.weight"]},
            "no parameter is called 'q_porj.weight'",
        ),
        ({"lora_target_modules": []}, "lora_target_modules is empty"),
        ({"lora_target_modules": ["q_proj", "to_q"]}, "'to_q' is .*to_q, which lora_modules_to_save trains in full"),
    ],
)
def test_lists_that_do_not_fit_the_model_are_refused(checkpoint, options, words):
    with pytest.raises(ValueError, match=words):
        adapted(checkpoint, **options)


def test_names_mean_whole_parts_of_a_path(checkpoint, mean, sentences, tmp_path):
    """peft itself would take the input_layernorm of every layer for "norm"."""
    assert in_full(adapted(checkpoint, lora_modules_to_save=["latent_attention_model", "embedding_model.norm"])) == [
        "embedding_model.norm", "latent_attention_model",
    ]  # fmt: skip
    assert in_full(adapted(mean)) == [], "mean pooling has nothing to train"
    model = adapted(mean, lora_modules_to_save=["latent_attention_model", "norm"])
    assert in_full(model) == ["embedding_model.norm"]
    train_a_little(model)
    expected = model.eval().encode(sentences)
    assert (expected - NVEmbedModel.from_pretrained(mean).encode(sentences)).abs().max() > 1e-2
    write_checkpoint(merge_adapter(model), str(tmp_path / "merged"))
    torch.testing.assert_close(NVEmbedModel.from_pretrained(tmp_path / "merged").encode(sentences), expected)


def test_a_single_target_is_a_name_not_a_pattern(checkpoint):
    model = adapted(checkpoint, lora_target_modules=["q_proj"])
    assert len([name for name, _ in model.named_parameters() if "lora_A" in name]) == 3


def test_modules_in_full_are_trained_in_fp32_and_merged_in_the_decoders_dtype(checkpoint):
    model = NVEmbedModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    options = {"lora_modules_to_save": ["latent_attention_model", "embedding_model.norm"]}
    model = add_adapter(model, ModelArguments(**options))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in merge_adapter(model).parameters()} == {torch.bfloat16}


def test_all_weights_are_trained_in_fp32_and_saved_in_the_dtype_asked_for(checkpoint):
    for dtype in (torch.bfloat16, torch.float32):
        model = add_adapter(NVEmbedModel.from_pretrained(checkpoint, dtype=dtype), ModelArguments(use_peft=False))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in merge_adapter(model, dtype).parameters()} == {dtype}


def test_an_adapter_that_would_not_fit_its_base_is_not_pushed(model):
    config = NVEmbedConfig.from_dict(model.config.to_dict())
    check_adapter_fits(ModelArguments("org/base"), config, config.hidden_size)
    with pytest.raises(ValueError, match="a projection makes embeddings of the teacher's 32 dimensions, and org/base"):
        check_adapter_fits(ModelArguments("org/base"), config, 16)
    with pytest.raises(ValueError, match="on org/base as it is now, and it is trained on revision v2"):
        check_adapter_fits(ModelArguments("org/base", model_revision="v2"), config, config.hidden_size)
    config.pruning = {"pattern": "2:4"}
    with pytest.raises(ValueError, match="org/base is pruned"):
        check_adapter_fits(ModelArguments("org/base"), config, config.hidden_size)


def test_a_checkpoint_that_would_not_load_is_not_written(checkpoint, tmp_path):
    model = NVEmbedModel.from_pretrained(checkpoint)
    model.embedding_model.layers[0].stray = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"unknown tensors: 2, the first is embedding_model.layers.0.stray.bias"):
        write_checkpoint(model, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- Adapter folders


@pytest.fixture
def trained(checkpoint, tmp_path, sentences):
    """An adapter as training writes it, and what the trained model embeds."""
    model = adapted(checkpoint)
    train_a_little(model)
    write_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", model.eval().encode(sentences)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_target_modules": ["all-linear"]}])
def test_adapters_of_other_kinds_open(checkpoint, sentences, tmp_path, options):
    model = adapted(checkpoint, **options)
    train_a_little(model)
    write_adapter(model, tmp_path / "adapter")
    opened = NVEmbedModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(opened.encode(sentences), model.eval().encode(sentences), atol=1e-5, rtol=0)


def test_training_does_not_begin_from_an_adapter(trained):
    folder, _ = trained
    for use_peft in (True, False):
        with pytest.raises(ValueError, match="adapter is an adapter, and training would begin without it"):
            adapted(folder, use_peft=use_peft, model_name_or_path=str(folder))


def test_an_adapter_opens_in_transformers_and_sentence_transformers(trained, checkpoint, sentences, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder, expected = trained
    assert (expected - NVEmbedModel.from_pretrained(checkpoint).encode(sentences)).abs().max() > 1e-2
    for model in (
        NVEmbedModel.from_pretrained(folder),
        AutoModel.from_pretrained(folder, trust_remote_code=True),
        SentenceTransformer(str(folder), trust_remote_code=True, device="cpu"),
    ):
        torch.testing.assert_close(torch.as_tensor(model.encode(sentences)), expected, atol=1e-5, rtol=0)
    model.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / "adapter_config.json").is_file()
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(torch.as_tensor(again.encode(sentences)), expected, atol=1e-5, rtol=0)


def test_an_adapter_made_by_sentence_transformers_opens(checkpoint, sentences, tmp_path):
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(checkpoint), trust_remote_code=True, device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["latent_attention_model"]))
    train_a_little(model)
    expected = torch.as_tensor(model.eval().encode(sentences))
    model.save_pretrained(str(tmp_path / "theirs"))
    for opened in (
        NVEmbedModel.from_pretrained(tmp_path / "theirs"),
        SentenceTransformer(str(tmp_path / "theirs"), trust_remote_code=True, device="cpu"),
    ):
        torch.testing.assert_close(torch.as_tensor(opened.encode(sentences)), expected, atol=1e-5, rtol=0)


def test_an_adapter_on_a_decoder_in_bf16(checkpoint, sentences, tmp_path):
    base = NVEmbedModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = add_adapter(NVEmbedModel.from_pretrained(tmp_path / "base", dtype="auto"), ModelArguments())
    train_a_little(model)
    write_adapter(model, tmp_path / "adapter")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.eval().encode(sentences)
    opened = NVEmbedModel.from_pretrained(tmp_path / "adapter", dtype="auto")
    assert torch.cosine_similarity(opened.encode(sentences), expected).min() > 0.99


def test_an_adapter_beside_a_whole_model_is_refused(trained, checkpoint, tmp_path):
    """transformers puts the one on the other, without the modules trained in full, though it may be merged already."""
    from sentence_transformers import SentenceTransformer

    folder, _ = trained
    both = shutil.copytree(checkpoint, tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, both)
    for load in (NVEmbedModel.from_pretrained, AutoModel.from_pretrained, SentenceTransformer, load_model):
        options = {"trust_remote_code": True} if load in (AutoModel.from_pretrained, SentenceTransformer) else {}
        with pytest.raises(ValueError, match=r"both holds a whole model \(config.json\) beside an adapter"):
            load(str(both), **options)


def test_an_adapter_is_measured_with_its_base(trained, checkpoint, sentences):
    folder, expected = trained
    loaded = load_model(str(folder))
    torch.testing.assert_close(torch.as_tensor(loaded.embed(sentences, "")), expected, atol=1e-5, rtol=0)
    assert loaded.revision not in (load_model(str(checkpoint)).revision,)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "runs/gone"}))
    for load in (load_model, NVEmbedModel.from_pretrained):
        with pytest.raises(ValueError, match="runs/gone"):
            load(str(folder))


def test_errors_name_the_adapter(trained, checkpoint, monkeypatch):
    folder, _ = trained
    monkeypatch.setattr("nvembed.modeling_nvembed.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"adapter is an adapter of .*; loading it needs peft: pip install peft"):
        NVEmbedModel.from_pretrained(folder)
    monkeypatch.undo()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json is damaged or names no base_model_name_or_path"):
        NVEmbedModel.from_pretrained(folder)
