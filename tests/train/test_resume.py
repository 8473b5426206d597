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
import torch
from safetensors.torch import load_file

from nvembed.train.card import describe_settings
from nvembed.train.resume import APPLIED, REFUSED, RunRecord, digest_weights, resume_record
from nvembed.train.trainer import PARTIAL_CHECKPOINT
from tests import preloaded


pytestmark = pytest.mark.slow  # trainings in processes of their own


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


def arguments(recipe, output_dir, *options):
    return [ROOT / "train" / "stage1.py", "--config", recipe, "--output_dir", output_dir, *options]


def weights(folder):
    return load_file(folder / "model.safetensors")


def run(recipe, output_dir, *options):
    return preloaded.run(*arguments(recipe, output_dir, *options))


def kill_at(recipe, output_dir, moment, *options):
    """SIGKILL once `moment(output_dir)` is true; returns whether the run was still going."""
    process = preloaded.start(*arguments(recipe, output_dir, *options))
    while process.is_alive() and not moment(output_dir):
        time.sleep(0.002)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_at_random_moments_ends_with_the_same_weights(tmp_path, recipe):
    # By another interpreter, whose sets have another order.
    command = map(str, [sys.executable, *arguments(recipe, tmp_path / "whole")])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(command), capture_output=True, text=True, env=environment, timeout=300)
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


def test_resuming_from_another_shape_is_an_error(tmp_path, recipe, init_args):
    from nvembed.train.init_checkpoint import main as init

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


# --- Settings that changed since the checkpoint


@pytest.fixture
def stopped(tmp_path, recipe):
    """A run of 8 steps, of which the checkpoint of step 4 is resumed elsewhere."""
    options = ["--max_steps", "8", "--save_steps", "4", "--learning_rate", "1e-3", "--weight_decay", "0.1"]
    result = run(recipe, tmp_path / "whole", *options)
    assert result.returncode == 0, result.stderr

    def resume(*changes):
        folder = tmp_path / f"resumed-{len(list(tmp_path.glob('resumed-*')))}"
        again = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-4"]
        return folder, run(recipe, folder, *options, *again, *changes)

    return tmp_path / "whole", resume


def rates(folder):
    history = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}


def test_changed_settings_are_applied_and_said_or_refused(stopped):
    whole, resume = stopped
    folder, result = resume()
    assert result.returncode == 0, result.stderr
    assert all(weights(whole)[name].equal(tensor) for name, tensor in weights(folder).items()), "nothing changed"
    assert "| `learning_rate` | 0.001 |" in (folder / "README.md").read_text()

    folder, result = resume("--learning_rate", "1e-5", "--weight_decay", "0.5", "--temperature", "0.1")
    assert result.returncode == 0, result.stderr
    assert "From step 4 on, learning_rate is 1e-05; it was 0.001." in result.stderr
    assert not all(weights(whole)[name].equal(tensor) for name, tensor in weights(folder).items())
    before, after = rates(whole), rates(folder)
    for step in range(1, 9):
        assert after[step] == pytest.approx(before[step] * (1 if step <= 4 else 0.01), rel=1e-6, abs=1e-12)
    card = (folder / "README.md").read_text()
    assert "| `learning_rate` | 0.001; from step 4: 1e-05 |" in card
    assert "| `temperature` | 0.02; from step 4: 0.1 |" in card
    groups = torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}

    folder, result = resume("--save_steps", "1", "--logging_steps", "2")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7", "checkpoint-8"]
    assert [step for step in rates(folder) if step > 4] == [6, 8]

    (whole.parent / "b.jsonl").write_text((whole.parent / "b.jsonl").read_text().replace("b ", "c "))
    folder, result = resume()
    assert result.returncode != 0
    assert "was trained on other data: b: b.jsonl has changed" in result.stderr
    (whole.parent / "b.jsonl").write_text((whole.parent / "b.jsonl").read_text().replace("c ", "b "))

    for changes, words in (
        (("--optim", "adafactor"), "optim was 'adamw_torch_fused' until checkpoint-4 and is 'adafactor'"),
        (("--lora_alpha", "8"), "lora_alpha was 32 until checkpoint-4 and is 8: the adapter in the checkpoint"),
    ):
        folder, result = resume(*changes)
        assert result.returncode != 0
        assert words in result.stderr.replace("'adamw_torch'", "'adamw_torch_fused'")
        assert not (folder / "model.safetensors").exists()


DATA = {"seed": 42, "instruction": None, "datasets": [{"name": "a", "files": {"t.jsonl": "1"}}]}


@pytest.fixture
def written(tmp_path):
    """A checkpoint with its record, and what resumes it with settings, base or data changed."""
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')

    def settings(**changes):
        known = dict.fromkeys((*APPLIED, *REFUSED)) | {"max_steps": 8, "lr_scheduler_type": "linear"}
        return known | changes

    RunRecord(settings(), "same", DATA).save(tmp_path / "checkpoint-4")

    def resume(base="same", data=DATA, steps=8, is_deepspeed=False, **changes):
        now = RunRecord(settings(**changes), base, data)
        return resume_record(str(tmp_path / "checkpoint-4"), now, steps, is_deepspeed)

    return tmp_path / "checkpoint-4", resume


@pytest.mark.parametrize("name", REFUSED)
def test_every_setting_that_made_the_checkpoint_is_refused(written, name):
    _, resume = written
    with pytest.raises(ValueError, match=f"{name} was None until checkpoint-4 and is 'other': "):
        resume(base="other", **{name: "other"})  # the base differs with its dtype; that is not the reason


@pytest.mark.parametrize("name", sorted(set(APPLIED) - {"lr_scheduler_type"}))
def test_every_other_setting_is_applied_from_its_step_on_and_in_the_card(written, name):
    checkpoint, resume = written
    record = resume(**{name: 2})
    assert [step for step, _ in record.history(name)] == [0, 4]
    assert record.history(name)[-1] == (4, 2)
    assert describe_settings({}, record)[name].endswith("; from step 4: 2")
    record.save(checkpoint)
    assert resume(**{name: 2}).history(name) == record.history(name)


def test_what_an_earlier_version_had_no_option_for_was_off(written):
    checkpoint, resume = written
    (path,) = checkpoint.glob("*settings*.json")
    content = json.loads(path.read_text())
    for name in ("batches_of_one_set", "spread_out_weight"):
        del content["periods"][0]["settings"][name]
    path.write_text(json.dumps(content))
    del content["periods"][0]["settings"]["teacher_instruction"]  # which it had, and did not record
    path.write_text(json.dumps(content))
    assert len(resume(batches_of_one_set=False, spread_out_weight=0.0, teacher_instruction="Find").periods) == 1
    assert resume(spread_out_weight=5.0).history("spread_out_weight")[-1] == (4, 5.0)
    with pytest.raises(ValueError, match="batches_of_one_set was None until checkpoint-4 and is True"):
        resume(batches_of_one_set=True)


def test_another_base_other_data_a_longer_run_and_what_cannot_be_applied_are_refused(written):
    _, resume = written
    with pytest.raises(ValueError, match="was trained on another base"):
        resume(base="other")
    with pytest.raises(ValueError, match="was trained on other data: a: t.jsonl has changed"):
        resume(data=DATA | {"datasets": [{"name": "a", "files": {"t.jsonl": "2"}}]})
    with pytest.raises(ValueError, match="was trained on other data: instruction was None and is 'x'"):
        resume(data=DATA | {"instruction": "x"})
    with pytest.raises(ValueError, match="is at step 4 and this run has 3; raise max_steps or num_train_epochs"):
        resume(steps=3)
    with pytest.raises(ValueError, match="learning_rate was None .*: DeepSpeed restores"):
        resume(learning_rate=1.0, is_deepspeed=True)
    with pytest.raises(ValueError, match="lr_scheduler_type was 'linear' .*: this schedule restores its rate"):
        resume(lr_scheduler_type="greedy")


def test_of_a_checkpoint_without_a_record_nothing_is_claimed(written):
    checkpoint, resume = written
    (checkpoint / "settings.json").unlink()
    described = describe_settings({}, resume(learning_rate=0.5))
    assert described["learning_rate"] == "not recorded; from step 4: 0.5"
    assert "chunk_tokens" not in described


def test_a_digest_tells_weights_of_one_shape_apart(model):
    digest = digest_weights(model)
    assert digest == digest_weights(model)
    with torch.no_grad():
        model.embedding_model.layers[1].mlp.up_proj.weight[0, 0] += 0.1
    assert digest_weights(model) != digest
    with torch.device("meta"):
        assert digest_weights(type(model)(model.config)) is None
