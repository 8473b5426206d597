"""A training that is killed and started again ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nvembed.train.trainer import PARTIAL_CHECKPOINT


ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path, checkpoint, sentences):
    """Two sets, dropout, AdamW with warm-up and decay, a checkpoint after every step: all that has a state."""
    for name in ("a", "b"):
        rows = [
            {"query": f"{name} {first[:25]}", "positive": f"{second} {name}", "instruction": "Complete"}
            for first in sentences
            for second in sentences
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
model_name_or_path: {checkpoint}
datasets: [{{path: {tmp_path}/a.jsonl, weight: 2}}, {{path: {tmp_path}/b.jsonl, weight: 1}}]
num_negatives: 2
max_length: 64
chunk_tokens: 200
batch_size: 8
max_steps: 12
warmup_steps: 4
learning_rate: 1.0e-2
lora_dropout: 0.2
logging_steps: 1
save_strategy: steps
save_steps: 1
save_total_limit: 3
use_cpu: true
disable_tqdm: true
"""
    )
    return path


def command(recipe, output_dir, *options):
    script = [sys.executable, ROOT / "train" / "stage1.py", "--config", recipe, "--output_dir", output_dir, *options]
    return [str(part) for part in script]


def weights(folder):
    return load_file(folder / "model.safetensors")


def run(recipe, output_dir, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(recipe, output_dir, *options), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


def kill_at(recipe, output_dir, moment, *options):
    """SIGKILL once `moment(output_dir)` is true; returns whether the run was still going."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(recipe, output_dir, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment,
    )
    while process.poll() is None and not moment(output_dir):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_killed_at_random_moments_ends_with_the_same_weights(tmp_path, recipe):
    result = run(recipe, tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    resume: list[str] = []
    for first, last in ((1, 3), (4, 7), (8, 11)):
        step, delay = rng.randint(first, last), rng.uniform(0, 0.15)
        reached: list[float] = []

        def moment(folder, step=step, delay=delay, reached=reached):
            if not reached and (folder / f"checkpoint-{step}").exists():
                reached.append(time.monotonic())
            return reached and time.monotonic() - reached[0] > delay

        assert kill_at(recipe, tmp_path / "killed", moment, *resume), f"seed {seed}"
        resume = ["--resume_from_checkpoint", "true"]
    result = run(recipe, tmp_path / "killed", *resume)
    assert result.returncode == 0, result.stderr
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(whole[name].equal(killed[name]) for name in whole), f"seed {seed}"


def test_half_written_checkpoint_is_ignored(tmp_path, recipe):
    """Killed while it writes: what is half-written lies elsewhere, and the next run sweeps it away."""
    out = tmp_path / "out"
    result = run(recipe, out, "--max_steps", "3")
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in out.glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert not (out / PARTIAL_CHECKPOINT).exists()
    fresh = tmp_path / "fresh"

    def writing(folder):
        return (folder / PARTIAL_CHECKPOINT / "checkpoint-2").exists()

    assert kill_at(recipe, fresh, writing)
    assert (fresh / PARTIAL_CHECKPOINT).exists()
    assert [path.name for path in fresh.glob("checkpoint-*")] == ["checkpoint-1"]
    result = run(recipe, fresh, "--max_steps", "3", "--resume_from_checkpoint", "true")
    assert result.returncode == 0, result.stderr
    assert not (fresh / PARTIAL_CHECKPOINT).exists()


def test_resuming_from_nothing_or_from_another_shape_is_an_error(tmp_path, recipe, init_args):
    from nvembed.train.init_checkpoint import main as init

    result = run(recipe, tmp_path / "out", "--resume_from_checkpoint", "true")
    assert result.returncode != 0
    assert "holds no checkpoint to resume from" in result.stderr
    assert run(recipe, tmp_path / "out", "--max_steps", "2").returncode == 0
    (tmp_path / "out" / "config.json").unlink()
    for path in tmp_path.glob("out/*.safetensors"):
        path.unlink()
    init(init_args(tmp_path / "other", num_layers=2))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    options = ["--model_name_or_path", tmp_path / "other", "--resume_from_checkpoint", checkpoint]
    result = run(recipe, tmp_path / "elsewhere", *options)
    assert result.returncode != 0
    assert "checkpoint-2 does not belong to" in result.stderr
    assert "layers.2" in result.stderr
