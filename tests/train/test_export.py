"""Exported checkpoints open without our code and embed as `encode` does with the instruction pooled."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Qwen2Config, Qwen3Config

from nvembed import NVEmbedModel
from nvembed.eval.training_data import read_training_data
from nvembed.train.checkpoints import write_checkpoint
from nvembed.train.export import ExportArguments, main
from nvembed.train.init_checkpoint import init_model
from tests import preloaded
from tests.conftest import ROOT
from tests.train.test_init_checkpoint import family


PROMPT = "Instruct: Given a question, retrieve\nQuery: "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "options"),
    [
        (None, {}, {"pooling_type": "mean", "is_mask_instruction": False}),
        (Qwen2Config, {}, {"pooling_type": "eos"}),
        (Qwen3Config, {"head_dim": 16}, {"pooling_type": "mean", "is_mask_instruction": False}),
        (Qwen3Config, {"head_dim": 16}, {"pooling_type": "mean", "is_mask_instruction": False, "mask_type": "c"}),
    ],
)
def test_a_plain_sentence_transformer_embeds_as_encode(
    kind, fields, options, tmp_path, init_args, decoder_dir, sentences
):
    base = decoder_dir
    if kind is not None:
        base = tmp_path / "base"
        family(kind, base, decoder_dir, **fields)
    write_checkpoint(init_model(init_args(base=str(base), **options)), str(tmp_path / "checkpoint"))
    main(ExportArguments(str(tmp_path / "checkpoint"), str(tmp_path / "stock")))
    script = f"""
import sys, torch
sys.modules["nvembed"] = None
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path / "stock")!r}, device="cpu")
assert type(model[0].auto_model).__name__ == {kind.__name__.replace("Config", "Model") if kind else "LlamaModel"!r}
texts = {sentences!r}
torch.save([model.encode(texts), model.encode(texts, prompt={PROMPT!r})], {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    plain, with_prompt = torch.load(tmp_path / "out.pt", weights_only=False)
    model = NVEmbedModel.from_pretrained(tmp_path / "checkpoint")
    torch.testing.assert_close(torch.tensor(plain), model.encode(sentences), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(with_prompt), model.encode(sentences, PROMPT), atol=1e-5, rtol=0)
    assert abs(plain - with_prompt).max() > 0.05


def test_what_engines_read(tmp_path, init_args):
    arguments = init_args(pooling_type="mean", is_mask_instruction=False)
    write_checkpoint(init_model(arguments), str(tmp_path / "checkpoint"))
    sets = [{"name": "x", "mteb": ["STS12"]}]
    known = {"complete": True, "base": "b", "stages": [{"stage": "stage1", "sets": sets}]}
    (tmp_path / "checkpoint" / "training_data.json").write_text(json.dumps(known))
    card = "---\nlicense: mit\n---\n# checkpoint\n\n## Training\n\n### stage1\n\nOf old.\n"
    (tmp_path / "checkpoint" / "README.md").write_text(card)
    main(ExportArguments(str(tmp_path / "checkpoint"), str(tmp_path / "stock")))
    assert read_training_data(str(tmp_path / "stock")) == known, "run_mteb.py marks its tasks as seen"
    card = ModelCard.load(tmp_path / "stock" / "README.md")
    assert card.data.license == "mit" and 'training_datasets = {\n    "STS12",\n}' in card.text
    assert f'SentenceTransformer("{tmp_path}/stock")' in card.text and card.text.endswith("### stage1\n\nOf old.\n")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert (config["is_causal"], config["use_bidirectional_attention"]) == (False, True)
    assert config.get("sliding_window") is None and config["max_position_embeddings"] == 2048
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None), "where transformers 4 looks"
    assert json.loads((tmp_path / "stock" / "sentence_bert_config.json").read_text())["max_seq_length"] == 2048
    pooling = json.loads((tmp_path / "stock" / "1_Pooling" / "config.json").read_text())
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens", "include_prompt"]
    prompts = json.loads((tmp_path / "stock" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["NQ"].startswith("Instruct: ")
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        main(ExportArguments(str(tmp_path / "checkpoint"), str(tmp_path / "stock")))


def test_what_stock_engines_cannot_do_is_refused(tmp_path, init_args, checkpoint, caplog):
    with pytest.raises(ValueError, match="pooling_type 'latent_attention', which stock engines do not have; .*plugin"):
        main(ExportArguments(str(checkpoint), str(tmp_path / "stock")))
    write_checkpoint(init_model(init_args(pooling_type="mean")), str(tmp_path / "masked"))
    with pytest.raises(ValueError, match="leaves its instructions out of the mean .*--pool_instructions and measure"):
        main(ExportArguments(str(tmp_path / "masked"), str(tmp_path / "stock")))
    assert not (tmp_path / "stock").exists()
    with caplog.at_level(logging.WARNING):
        main(ExportArguments(str(tmp_path / "masked"), str(tmp_path / "stock"), pool_instructions=True))
    assert "trained without its instructions in the mean" in caplog.text
    assert "transformers reads from 5.2 on" in caplog.text
    assert (tmp_path / "stock" / "config.json").is_file()


@pytest.mark.slow
def test_trained_from_the_command_line_with_pooled_instructions(tmp_path, init_args, sentences):
    """`is_mask_instruction: false` in training is what the checkpoint says, and export asks for nothing more."""
    write_checkpoint(init_model(init_args(pooling_type="mean")), str(tmp_path / "base"))
    rows = [{"query": s[:20], "positive": s, "instruction": "Complete"} for s in sentences]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = []
    for flag in ("true", "false"):
        out = tmp_path / flag
        command = [
            ROOT / "train" / "stage1.py", "--model_name_or_path", tmp_path / "base", "--datasets",
            tmp_path / "pairs.jsonl", "--output_dir", out, "--max_steps=1", "--warmup_steps=0", "--use_cpu",
            "--num_negatives=1", "--per_device_train_batch_size=4", "--logging_steps=1", "--lora_dropout=0",
            f"--is_mask_instruction={flag}",
        ]  # fmt: skip
        done = preloaded.run(*command)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads((out / "log.jsonl").read_text().splitlines()[0])["loss"])
        assert json.loads((out / "config.json").read_text())["is_mask_instruction"] is (flag == "true")
    assert abs(losses[0] - losses[1]) > 1e-3, "other tokens were pooled"
    main(ExportArguments(str(tmp_path / "false"), str(tmp_path / "stock")))
