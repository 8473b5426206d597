import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, Gemma2Config, Gemma2Model, LlamaConfig, LlamaModel

from nvembed import NVEmbedModel
from nvembed.train.checkpoints import write_checkpoint
from nvembed.train.init_checkpoint import init_model, main


@pytest.mark.parametrize("num_layers", [None, 2])
def test_weights_are_the_base_s(init_args, decoder_dir, num_layers):
    model = init_model(init_args(num_layers=num_layers))
    base = AutoModel.from_pretrained(decoder_dir).state_dict()
    weights = model.embedding_model.state_dict()
    assert {int(name.split(".")[1]) for name in weights if name.startswith("layers.")} == set(range(num_layers or 3))
    assert all(torch.equal(weight, base[name]) for name, weight in weights.items())


@pytest.mark.parametrize("pooling_type", ["latent_attention", "self_attention"])
def test_untrained_embedding_is_the_mean_of_the_states(init_args, sentences, pooling_type):
    model = init_model(init_args(pooling_type=pooling_type))
    mean = init_model(init_args(pooling_type="mean"))
    cosine = torch.cosine_similarity(model.encode(sentences), mean.encode(sentences))
    assert cosine.min() >= 0.99
    assert cosine.min() > 0.999999, "exactly the mean, not near it"


def test_tokenizer_writes_both_ends_for_every_user(checkpoint):
    for tokenizer in (NVEmbedModel.from_pretrained(checkpoint).tokenizer, AutoTokenizer.from_pretrained(checkpoint)):
        row = tokenizer("Return a list")["input_ids"]
        assert (row[0], row[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        cut = tokenizer("Return a list" * 50, truncation=True, max_length=8)["input_ids"]
        assert len(cut) == 8
        assert cut[-1] == tokenizer.eos_token_id
        assert tokenizer.pad_token is not None
        assert tokenizer.padding_side == "right"
    assert json.loads((checkpoint / "config.json").read_text())["add_eos"] is False


def test_config_carries_no_path_of_this_machine(checkpoint, decoder_dir):
    assert str(decoder_dir) not in (checkpoint / "config.json").read_text()


def test_other_layouts_are_refused(tmp_path, init_args, decoder_dir):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "vocab_size": 50}
    Gemma2Model(Gemma2Config(**small)).save_pretrained(tmp_path / "gemma2")
    with pytest.raises(ValueError, match="gemma2 is a 'gemma2' model; the base must be .* Mistral or Llama layout"):
        init_model(init_args(base=str(tmp_path / "gemma2")))

    LlamaModel(LlamaConfig(**small, attention_bias=True)).save_pretrained(tmp_path / "biased")
    AutoTokenizer.from_pretrained(decoder_dir).save_pretrained(tmp_path / "biased")
    with pytest.raises(ValueError, match=r"unknown tensors \['layers.0.self_attn.k_proj.bias'"):
        init_model(init_args(base=str(tmp_path / "biased")))

    with pytest.raises(ValueError, match="num_layers is 9; .* has layers 1 to 3"):
        init_model(init_args(num_layers=9))


def test_an_existing_checkpoint_is_left_alone(tmp_path, init_args):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds a checkpoint .config.json.; name another --output_dir"):
        main(init_args(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_failed_save_leaves_nothing(tmp_path, model, monkeypatch):
    def fail(*args, **kwargs):
        (tmp_path / "out.partial" / "model.safetensors").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(model, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
