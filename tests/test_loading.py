"""Checkpoints: saved and loaded, damaged, in other dtypes, quantized, spread over devices, compiled."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.texts_nvembed import format_instruction


INSTRUCTION = format_instruction("Given a question, retrieve")


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


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
        "config.json", "model.safetensors", "tokenizer.json", "modeling_nvembed.py", "texts_nvembed.py",
        "configuration_nvembed.py",
    }  # fmt: skip
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_nvembed.NVEmbedConfig",
        "AutoModel": "modeling_nvembed.NVEmbedModel",
    }
    assert AutoConfig.from_pretrained(checkpoint).pooling_type == "latent_attention"


def test_push_to_hub_takes_the_tokenizer_along(model, tmp_path, monkeypatch):
    """transformers uploads what changed during its own part of `save_pretrained`, and ours comes before it."""
    uploaded, api = [], "huggingface_hub.HfApi"
    monkeypatch.setattr(f"{api}.create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(f"{api}.create_commit", lambda self, **options: uploaded.extend(options["operations"]))
    (tmp_path / "private.txt").write_text("not to be uploaded")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="user/name")
    names = {operation.path_in_repo for operation in uploaded}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "modules.json", "config_sentence_transformers.json"}
    assert names >= {"model.safetensors", "config.json", "modeling_nvembed.py", "configuration_nvembed.py"}
    assert "private.txt" not in names


@pytest.mark.slow
def test_checkpoint_loads_where_nvembed_is_not_installed(model, sentences, encode_without_nvembed, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    expected = model.encode(sentences, INSTRUCTION)
    actual, again = encode_without_nvembed(tmp_path / "checkpoint", sentences, INSTRUCTION, 4096)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert (again / "modeling_nvembed.py").is_file()
    torch.testing.assert_close(
        NVEmbedModel.from_pretrained(again).encode(sentences, INSTRUCTION), expected, atol=1e-6, rtol=0
    )


def test_auto_model_takes_our_options(saved, model, sentences):
    folded = AutoModel.from_pretrained(saved, fold_latent_attention=True, dtype=torch.float32)
    assert folded.config.latent_attention_is_folded
    torch.testing.assert_close(folded.encode(sentences), model.encode(sentences), atol=1e-6, rtol=0)


def test_loading_through_the_meta_device_loses_no_buffer(model, sentences, tmp_path):
    """transformers 5 builds models on the meta device; a rotary buffer would come back as garbage."""
    model.save_pretrained(tmp_path)
    assert list(model.buffers()) == []
    assert NVEmbedModel.from_pretrained(tmp_path).encode(sentences).isfinite().all()


# --- Damaged checkpoints


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the tiny checkpoint, its tensors or its config changed."""

    def make(change=None, **config):
        folder = shutil.copytree(checkpoint, tmp_path / "damaged")
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(saved | config))
        return folder

    return make


LATENTS = "latent_attention_model.latents"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(LATENTS), f"lacks tensors: 1, the first is {LATENTS}"),
        (lambda tensors: tensors.update(stray=torch.ones(2)), "has unknown tensors: 1, the first is stray"),
        (lambda tensors: tensors.update({LATENTS: torch.ones(3, 32)}), rf"{LATENTS} is \[3, 32\].*and \[8, 32\] by"),
    ],
)
def test_wrong_tensors_are_named(damaged, change, words):
    with pytest.raises(ValueError, match=words):
        NVEmbedModel.from_pretrained(damaged(change))


@pytest.mark.parametrize("size", [-100, 100, 4, 0])
def test_a_truncated_file_is_named(damaged, size):
    folder = damaged()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"damaged/model.safetensors is cut off or damaged .*download it again"):
        NVEmbedModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"pooling_type": "max"}, "pooling_type is 'max'; it must be one of"),
        ({"mask_type": "x"}, "mask_type is 'x'; it must be one of"),
        ({"latent_attention_is_folded": True, "pooling_type": "mean"}, "pooling_type 'mean' has no latents"),
        ({"latent_attention_is_folded": True}, "lacks tensors: 9"),
        ({"model_type": "bert"}, "is a 'bert' model, not an NV-Embed checkpoint"),
    ],
)
def test_a_wrong_config_is_named(damaged, config, words):
    with pytest.raises(ValueError, match=words):
        NVEmbedModel.from_pretrained(damaged(**config))


def test_other_damage_is_named(damaged):
    folder = damaged()
    header = b'["a list"]'
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="model.safetensors is cut off or damaged"):
        NVEmbedModel.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer[:100])
    with pytest.raises(ValueError, match="tokenizer.json of .*damaged is missing or damaged"):
        NVEmbedModel.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json of .*damaged is missing or damaged"):
        NVEmbedModel.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises((OSError, ValueError), match="config.json"):
        NVEmbedModel.from_pretrained(folder)
    with pytest.raises(OSError, match="absent does not exist; name a folder, or a Hub model as owner/name"):
        NVEmbedModel.from_pretrained(folder / "absent")


def test_a_rope_that_depends_on_the_length_is_refused(damaged):
    folder = damaged()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rope_type is 'dynamic'; supported are default, linear, llama3"):
        NVEmbedModel.from_pretrained(folder)


def test_loading_info_and_mismatched_sizes_work_as_everywhere(damaged):
    folder = damaged(lambda tensors: tensors.update({LATENTS: torch.ones(3, 32)}))
    model, info = NVEmbedModel.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [key for key, *_ in info["mismatched_keys"]] == [LATENTS]
    assert model.encode(["a"]).shape == (1, 32)


# --- Precision, devices, compilation


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 0.999), (torch.float16, 0.99999)])
def test_half_precision(model, saved, sentences, dtype, bar):
    half = NVEmbedModel.from_pretrained(saved, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    embeddings = half.encode(sentences, INSTRUCTION)
    assert embeddings.dtype == torch.float32
    assert torch.cosine_similarity(embeddings, model.encode(sentences, INSTRUCTION)).min() > bar


EIGHT_BIT = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.fixture
def wide_model(model):
    """Rows of 64, a whole block of NF4's: with AVX-512 bf16, bitsandbytes computes in a layout that needs it."""
    config = copy.deepcopy(model.config)
    config.hidden_size = 64
    config.text_config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    config.latent_attention_config.update({"hidden_dim": 64, "latent_dim": 64})
    torch.manual_seed(0)
    wide = NVEmbedModel(config)
    wide.tokenizer = model.tokenizer
    for parameter in wide.latent_attention_model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return wide


@pytest.mark.parametrize(("options", "bar"), [(EIGHT_BIT, 0.99), (NF4, 0.9)])
def test_bitsandbytes_quantizes_the_decoder_alone(wide_model, sentences, tmp_path, options, bar):
    pytest.importorskip("bitsandbytes")
    model, saved = wide_model, tmp_path / "wide"
    model.save_pretrained(saved)
    quantization = BitsAndBytesConfig(**options)
    quantized = NVEmbedModel.from_pretrained(saved, quantization_config=quantization, dtype=torch.float32)
    assert quantization.llm_int8_skip_modules is None, "the caller's object is left as it was"
    linear = quantized.embedding_model.layers[0].mlp.up_proj
    assert linear.weight.dtype in (torch.int8, torch.uint8)
    kept = [*quantized.latent_attention_model.parameters(), quantized.embedding_model.norm.weight]
    assert {parameter.dtype for parameter in kept} == {torch.float32}

    quantized.save_pretrained(
        tmp_path / "quantized"
    )  # before the first use, at which bitsandbytes may pack its weights
    embeddings = quantized.encode(sentences, INSTRUCTION)
    assert torch.cosine_similarity(embeddings, model.encode(sentences, INSTRUCTION)).mean() > bar
    again = NVEmbedModel.from_pretrained(tmp_path / "quantized", fold_latent_attention=True)
    torch.testing.assert_close(again.encode(sentences, INSTRUCTION), embeddings, atol=1e-5, rtol=0)


def test_quantization_spares_the_pooling_whoever_asks(saved):
    pytest.importorskip("bitsandbytes")
    for quantization in (BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["lm_head"]), dict(EIGHT_BIT)):
        model = NVEmbedModel.from_pretrained(saved, quantization_config=quantization, dtype=torch.float32)
        assert {p.dtype for p in model.latent_attention_model.parameters()} == {torch.float32}
        assert model.embedding_model.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    to_q = model.latent_attention_model.cross_attend_blocks[0].fn.to_q
    to_q.weight = torch.nn.Parameter(to_q.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"fn.to_q.weight is quantized to torch.int8; fold before that"):
        model.fold_latent_attention()


PARTLY = {f"embedding_model.{name}": "cpu" for name in ("embed_tokens", "norm", "layers.0", "layers.2")}
PARTLY |= {"embedding_model.layers.1": "disk", "latent_attention_model": "disk"}


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("device_map", [PARTLY, {"": "disk"}], ids=["partly", "wholly"])
def test_layers_on_disk(model, sentences, tmp_path, device_map, is_folded):
    """What `device_map="auto"` does with a model that does not fit: whole layers are swapped in and out."""
    expected = model.encode(sentences)
    if is_folded:
        model.fold_latent_attention()
    model.save_pretrained(tmp_path / "saved")
    offload = tmp_path / "offload"
    spread = NVEmbedModel.from_pretrained(tmp_path / "saved", device_map=device_map, offload_folder=offload)
    assert spread.embedding_model.layers[1].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(spread.encode(sentences), expected, atol=1e-6, rtol=0)
    if not is_folded:
        with pytest.raises(ValueError, match="spread over devices or offloaded; fold it on one device, save it"):
            spread.fold_latent_attention()


def test_device_map_never_splits_a_layer(model):
    from accelerate import infer_auto_device_map

    size = sum(p.numel() * 4 for p in model.embedding_model.layers[0].parameters())
    embeddings = model.embedding_model.embed_tokens.weight.numel() * 4
    memory = {0: embeddings + int(2.5 * size), "cpu": 10**9}
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
    assert not any("self_attn" in name or "cross_attend_blocks" in name for name in device_map), device_map
    assert set(device_map.values()) == {0, "cpu"}


@pytest.mark.parametrize("is_folded", [False, True])
def test_forward_compiles_into_one_graph(model, is_folded):
    model.eval()
    if is_folded:
        model.fold_latent_attention()
    input_ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(input_ids, mask, mask).sentence_embeddings
        expected = model(input_ids, mask, mask).sentence_embeddings
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
