"""Conversion of released checkpoints; the tiny checkpoint, stripped of what we add, stands for one."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from nvembed import NVEmbedModel
from nvembed.eval.tasks.instructions import task_prompts
from nvembed.train.adapter import add_adapter
from nvembed.train.arguments import ModelArguments
from nvembed.train.checkpoints import alone_in
from nvembed.train.init_checkpoint import InitArguments, main
from nvembed.train.released import convert_released
from nvembed.train.resume import check_resume


@pytest.fixture
def released(model, tmp_path):
    """In shards, with our additions taken out of the config, and with a `_name_or_path` that leads nowhere."""
    folder = tmp_path / "released"
    model.save_pretrained(folder, max_shard_size="50KB")
    for name in ("modules.json", "config_sentence_transformers.json", "modeling_nvembed.py"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    for field in ("pooling_type", "latent_attention_is_folded", "prompts", "max_seq_length"):
        del config[field]
    config["_name_or_path"] = config["text_config"]["_name_or_path"] = "nvidia/NV-Embed-v2"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_conversion_links_the_weights(released, model, sentences, tmp_path):
    convert_released(str(released), str(tmp_path / "new" / "converted"))
    converted = tmp_path / "new" / "converted"
    shards = sorted(released.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(os.path.samefile(shard, converted / shard.name) for shard in shards)
    assert {path.name for path in converted.iterdir()} == {path.name for path in shards} | {
        "model.safetensors.index.json", "config.json", "modeling_nvembed.py", "texts_nvembed.py",
        "configuration_nvembed.py",
        "tokenizer.json", "tokenizer_config.json", "modules.json", "config_sentence_transformers.json",
    }  # fmt: skip
    assert torch.equal(NVEmbedModel.from_pretrained(converted).encode(sentences), model.encode(sentences))
    settings = json.loads((converted / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == task_prompts()
    assert settings["prompts"]["NQ"].endswith("retrieve passages that answer the question\nQuery: ")
    assert settings["prompts"]["NQ-document"] == ""
    assert "QuoraRetrieval-document" not in settings["prompts"], "both sides carry it there"
    assert "nvidia/NV-Embed-v2" not in (converted / "config.json").read_text()


def test_saving_into_the_converted_folder_leaves_the_released_weights(released, tmp_path, monkeypatch):
    """safetensors before 0.8 wrote into the file that is there; a writer that does so stands for it."""
    before = {path.name: path.read_bytes() for path in released.glob("*.safetensors")}
    convert_released(str(released), str(tmp_path / "converted"))
    folded = NVEmbedModel.from_pretrained(tmp_path / "converted", fold_latent_attention=True)

    def write_in_place(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(save(tensors, metadata))

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", write_in_place)
    folded.save_pretrained(tmp_path / "converted", max_shard_size="50KB")
    assert {path.name: path.read_bytes() for path in released.glob("*.safetensors")} == before
    assert NVEmbedModel.from_pretrained(tmp_path / "converted").config.latent_attention_is_folded


def test_conversion_copies_where_it_cannot_link(released, model, sentences, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    convert_released(str(released), str(tmp_path / "converted"))
    assert torch.equal(NVEmbedModel.from_pretrained(tmp_path / "converted").encode(sentences), model.encode(sentences))


def spoil(released, name, change):
    tensors = load_file(released / name)
    change(tensors)
    save_file(tensors, released / name)


NORM = "embedding_model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(NORM), f"lacks tensors: 1, the first is {NORM}"),
        (lambda tensors: tensors.update(stray=torch.ones(1)), "has unknown tensors: 1, the first is stray"),
        (lambda tensors: tensors.update({NORM: torch.ones(5)}), rf"{NORM} is \[5\] in the file and \[32\] by config"),
    ],
)
def test_wrong_tensors_are_named_and_nothing_is_left(released, tmp_path, change, words):
    shard = json.loads((released / "model.safetensors.index.json").read_text())["weight_map"][NORM]
    spoil(released, shard, change)
    with pytest.raises(ValueError, match=words):
        convert_released(str(released), str(tmp_path / "deep" / "converted"))
    assert not (tmp_path / "deep").exists()


def test_damaged_files_are_named_and_nothing_is_left(released, tmp_path):
    shard = sorted(released.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{shard.name} is cut off or damaged"):
        convert_released(str(released), str(tmp_path / "converted"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is absent; download it"):
        convert_released(str(released), str(tmp_path / "converted"))
    assert not (tmp_path / "converted").exists()


def test_a_damaged_index_is_named(released, tmp_path):
    index = released / "model.safetensors.index.json"
    for content in (index.read_text()[:40], "{}"):
        index.write_text(content)
        with pytest.raises(ValueError, match="model.safetensors.index.json is cut off or damaged"):
            convert_released(str(released), str(tmp_path / "converted"))
    assert not (tmp_path / "converted").exists()


def test_a_full_disk_leaves_nothing(released, tmp_path, monkeypatch):
    def fail(source, target):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("nvembed.train.released.link_or_copy", fail)
    with pytest.raises(OSError, match="No space left"):
        convert_released(str(released), str(tmp_path / "converted"))
    assert not (tmp_path / "converted").exists()


def test_a_readme_that_is_there_stays(released, tmp_path):
    (released / "README.md").write_text("theirs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="README.md would be replaced; move it away"):
        convert_released(str(released), str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


def test_one_training_at_a_time_writes_into_a_folder(tmp_path):
    """The lock is gone at the end: it is no part of a checkpoint."""
    out = tmp_path / "runs" / "mine"
    with alone_in(str(out), "training"):
        with pytest.raises(ValueError, match="another training runs in .*mine: wait for it, or name another"):
            alone_in(str(out), "training").__enter__()
        with pytest.raises(RuntimeError), alone_in(str(tmp_path / "other"), "training"):
            raise RuntimeError
    assert not any(tmp_path.iterdir()), "nothing was written"
    with alone_in(str(out), "training"):
        (out / "config.json").touch()
    assert [path.name for path in out.iterdir()] == ["config.json"]
    with pytest.raises(FileExistsError, match="already holds a checkpoint"), alone_in(str(out), "training"):
        pass


def test_other_sources_are_refused(decoder_dir, released, tmp_path):
    with pytest.raises(ValueError, match="is a 'llama' model, not a released NV-Embed; --base makes one"):
        convert_released(str(decoder_dir), str(tmp_path / "converted"))
    with pytest.raises(ValueError, match="no/such is neither a local folder nor a Hub model that can be reached"):
        convert_released("no/such", str(tmp_path / "converted"))
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        convert_released(str(released), str(released))
    for names in ({}, {"base": "a", "from_released": "b"}):
        with pytest.raises(ValueError, match="name one of --base, a decoder, and --from_released"):
            main(InitArguments(output_dir=str(tmp_path / "converted"), **names))


@pytest.mark.parametrize("trained", [True, False], ids=["adapter", "all weights"])
def test_a_training_is_resumed_as_it_was_begun(tmp_path, checkpoint, init_args, trained):
    """From its own checkpoint; not from one of the other kind, of fewer layers, or of another rank."""

    def weights(source, use_peft, **options):
        return add_adapter(NVEmbedModel.from_pretrained(source), ModelArguments(use_peft=use_peft, **options))

    model = weights(checkpoint, trained)
    model.save_pretrained(tmp_path / "same")
    check_resume(str(tmp_path / "same"), model)
    weights(checkpoint, not trained).save_pretrained(tmp_path / "kind")
    with pytest.raises(ValueError, match=f"kind holds .* this run trains .*: set use_peft: {str(not trained).lower()}"):
        check_resume(str(tmp_path / "kind"), model)
    main(init_args(tmp_path / "small", num_layers=2))
    weights(tmp_path / "small", trained).save_pretrained(tmp_path / "layers")
    with pytest.raises(ValueError, match=r"layers does not belong .*layers\.2\..* is absent there"):
        check_resume(str(tmp_path / "layers"), model)
    if trained:
        weights(checkpoint, True, lora_r=4).save_pretrained(tmp_path / "rank")
        with pytest.raises(ValueError, match=r"is \[4, \d+\] there and \[16, \d+\] here"):
            check_resume(str(tmp_path / "rank"), model)


def test_script_folds(released, model, sentences, tmp_path):
    folder = tmp_path / "folded"
    (released / "LICENSE").write_text("theirs")
    main(InitArguments(output_dir=str(folder), from_released=str(released), fold_latent_attention=True))
    folded = NVEmbedModel.from_pretrained(folder)
    assert folded.config.latent_attention_is_folded
    assert (folder / "LICENSE").read_text() == "theirs"
    assert folded.config.prompts == task_prompts()
    torch.testing.assert_close(folded.encode(sentences), model.encode(sentences), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="--fold_latent_attention is for --from_released"):
        main(InitArguments(output_dir=str(tmp_path / "no"), base="some", fold_latent_attention=True))


def test_script_converts(released, model, sentences, tmp_path):
    (released / "LICENSE").write_text("theirs")
    main(InitArguments(output_dir=str(tmp_path / "converted"), from_released=str(released)))
    assert torch.equal(NVEmbedModel.from_pretrained(tmp_path / "converted").encode(sentences), model.encode(sentences))
    assert (tmp_path / "converted" / "LICENSE").read_text() == "theirs"
