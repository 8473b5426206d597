"""The training scripts in one process, in two, sharded, resumed, and with one that fails."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from nvembed import NVEmbedModel
from nvembed.train.init_checkpoint import main as init
from tests import preloaded


pytestmark = pytest.mark.slow  # trainings in processes of their own


ROOT = Path(__file__).parents[2]
ACCELERATE = ["accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
# accelerate starts CPU processes by MPI only
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def arguments(checkpoint, pairs_file, output_dir, *options):
    arguments = ["--model_name_or_path", checkpoint, "--datasets", pairs_file, "--output_dir", output_dir]
    arguments += ["--max_steps=2", "--warmup_steps=0", "--num_negatives=2", "--logging_steps=1", "--use_cpu"]
    return [*arguments, "--learning_rate=1e-2", "--lora_dropout=0", *options]


def run_stage(launcher, script, *given, timeout=300):
    """By the launcher that a user would take."""
    command = map(str, [sys.executable, "-m", *launcher, ROOT / "train" / script, *arguments(*given)])
    return subprocess.run(list(command), capture_output=True, text=True, cwd=ROOT, timeout=timeout)


def test_stages_run_from_the_command_line(tmp_path, checkpoint, pairs_file, sentences):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_length: 64\nper_device_train_batch_size: 4\n")
    stage1 = run_stage(ACCELERATE, "stage1.py", checkpoint, pairs_file, tmp_path / "one", "--config", recipe)
    assert stage1.returncode == 0, stage1.stderr
    stage2 = run_stage(ACCELERATE, "stage2.py", tmp_path / "one", pairs_file, tmp_path / "two", "--config", recipe)
    assert stage2.returncode == 0, stage2.stderr
    assert NVEmbedModel.from_pretrained(tmp_path / "two").encode(sentences).isfinite().all()

    again = run_stage(ACCELERATE, "stage1.py", checkpoint, pairs_file, tmp_path / "one", "--config", recipe)
    assert again.returncode != 0
    assert "already holds a checkpoint" in again.stderr


def test_two_processes_train_as_one(tmp_path, checkpoint, pairs_file, tasks_file, sentences):
    """DDP on gloo with half the batch each: the same weights and scores after two steps as one with the whole."""
    scores = {}
    for name, launcher, options in (
        ("one", ACCELERATE, ["--per_device_train_batch_size=8"]),
        ("two", TORCHRUN, ["--per_device_train_batch_size=4", "--ddp_backend=gloo"]),
    ):
        options += ["--eval_tasks", tasks_file, "--eval_names", "halves", "--eval_steps=1", "--disable_tqdm=true"]
        result = run_stage(launcher, "stage1.py", checkpoint, pairs_file, tmp_path / name, *options)
        assert result.returncode == 0, result.stderr
        scores[name] = re.findall(r"'eval_halves': '?([0-9.]+)", result.stdout)
    assert len(scores["one"]) == 2
    assert scores["one"] == scores["two"], "measured after each step, logged once"
    one, two = (NVEmbedModel.from_pretrained(tmp_path / name).encode(sentences) for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=0)
    assert (one - NVEmbedModel.from_pretrained(checkpoint).encode(sentences)).abs().max() > 1e-2


@pytest.fixture
def many_pairs(tmp_path, sentences):
    rows = [
        {"query": f"{a[:15]} {b[:15]}", "positive": f"{b} {a[:9]}", "instruction": "Complete"}
        for a in sentences
        for b in sentences
    ]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("script", ["stage1.py", "stage2.py"])
def test_loss_curve_is_the_same_in_one_process_two_and_sharded(tmp_path, checkpoint, many_pairs, sentences, script):
    """20 steps of the same batches of 8: one process, DDP, FSDP2, and one that accumulates or caches."""
    in_parts = ["--gradient_accumulation_steps=2"] if script == "stage2.py" else ["--chunk_tokens=50"]
    curves = {}
    stage = ROOT / "train" / script
    for name, run, options in (
        ("one", partial(preloaded.run, stage), []),
        ("in parts", partial(preloaded.run, stage), in_parts),
        ("ddp", partial(preloaded.run, stage, processes=2), ["--ddp_backend=gloo", "--chunk_tokens=100"]),
        ("fsdp2", partial(preloaded.run_sharded, stage), ["--chunk_tokens=100"]),
    ):
        common = ["--batch_size=8", "--max_steps=20", "--learning_rate=3e-3", "--disable_tqdm=true"]
        common += ["--report_to=none", "--log_level=error"]
        result = run(*arguments(checkpoint, many_pairs, tmp_path / name, *options, *common))
        assert result.returncode == 0, (name, result.stderr)
        logs = [line for line in result.stdout.splitlines() if "'loss'" in line]
        curves[name] = [float(re.search(r"'loss': '?([0-9.]+)", line)[1]) for line in logs]
        assert len(curves[name]) == 20
    assert curves["one"][-1] < 0.9 * curves["one"][0], "it learns"
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["one"], abs=1.01e-4), name  # logged with four digits
    one = NVEmbedModel.from_pretrained(tmp_path / "one").encode(sentences)
    for name in curves:
        other = NVEmbedModel.from_pretrained(tmp_path / name).encode(sentences)
        torch.testing.assert_close(other, one, atol=1e-3, rtol=0)


def test_sharded_training_resumes(tmp_path, checkpoint, many_pairs, sentences):
    """Stopped after 3 of 6 steps, in two processes with the weights in shards, it ends where an unbroken one does."""
    options = ["--batch_size=8", "--disable_tqdm=true", "--report_to=none"]
    options += ["--lr_scheduler_type=constant", "--save_strategy=steps", "--save_steps=3", "--max_steps=6"]
    stage = ROOT / "train" / "stage1.py"
    whole = preloaded.run_sharded(stage, *arguments(checkpoint, many_pairs, tmp_path / "a", *options))
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "a" / "checkpoint-3").is_dir()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    options += ["--resume_from_checkpoint=true"]
    resumed = preloaded.run_sharded(stage, *arguments(checkpoint, many_pairs, tmp_path / "b", *options))
    assert resumed.returncode == 0, resumed.stderr
    a, b = (NVEmbedModel.from_pretrained(tmp_path / name).encode(sentences) for name in "ab")
    torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
    assert len(re.findall("'loss'", resumed.stdout)) == 3


def test_a_pooling_without_weights_is_sharded_by_the_decoders_layers(tmp_path, init_args, many_pairs):
    init(init_args(tmp_path / "mean", pooling_type="mean"))
    options = arguments(tmp_path / "mean", many_pairs, tmp_path / "out", "--batch_size=8", "--report_to=none")
    done = preloaded.run_sharded(ROOT / "train" / "stage1.py", *options)
    assert done.returncode == 0, done.stderr
    assert NVEmbedModel.from_pretrained(tmp_path / "out").config.pooling_type == "mean"


def test_a_failing_process_ends_all_with_its_error(tmp_path, checkpoint, many_pairs):
    """The second process finds its weights broken; the first waits for it in the gathering of the embeddings."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        """
import os, sys
from nvembed.train import run_stage
from nvembed.train.arguments import DataArguments, ModelArguments, Stage1Arguments
from nvembed.train.recipe import RecipeParser

if os.environ["RANK"] == "1":
    compute_loss = run_stage.EmbeddingTrainer.compute_loss
    def broken(self, model, inputs, **options):
        if self.state.global_step == 2:
            inputs["query_ids"] = None
        return compute_loss(self, model, inputs, **options)
    run_stage.EmbeddingTrainer.compute_loss = broken
run_stage.run_stage(*RecipeParser(ModelArguments, DataArguments, Stage1Arguments).parse_args_and_config())
"""
    )
    options = ["--ddp_backend=gloo", "--batch_size=8", "--max_steps=20", "--disable_tqdm=true", "--report_to=none"]
    result = run_stage(TORCHRUN, worker, checkpoint, many_pairs, tmp_path / "out", *options, timeout=120)
    assert result.returncode != 0
    assert "[rank1]" in result.stderr and "Error" in result.stderr
    assert not (tmp_path / "out" / "config.json").exists()
