"""Training with --push_to_hub and --push_adapter against a local Hub, through huggingface_hub's own HTTP client."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from nvembed import NVEmbedModel
from nvembed.texts_nvembed import format_instruction
from tests.hub_server import LocalHub


pytestmark = pytest.mark.slow  # trainings in processes of their own


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub():
    with LocalHub({"hf_ann": "ann", "hf_bob": "bob"}) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences) -> Path:
    """Triplets, held-out tasks, and an untrained base with a card."""
    folder = tmp_path_factory.mktemp("push")
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in sentences]
    with (folder / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps({"query": q, "positive": p}) + "\n" for q, p in halves)
    rows = [json.dumps({"sentence1": q, "sentence2": p, "score": i}) for i, (q, p) in enumerate(halves)]
    (folder / "similar").mkdir()
    (folder / "similar" / "test.jsonl").write_text("\n".join(rows))
    (folder / "tasks.yaml").write_text("tasks: [{type: STS, path: similar, instruction: Complete}]")
    return folder


def environment(hub, folder, token="hf_ann") -> dict[str, str]:
    """As of a machine whose Hub is the local one, with nothing in its caches."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    home = {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | home | ({"HF_TOKEN": token} if token else {})


def train(hub, folder, base, data, *arguments, token="hf_ann", launcher=()):
    """Runs stage 1 in a process of its own, or as many as the launcher starts."""
    command = [
        sys.executable, *launcher, str(ROOT / "train" / "stage1.py"), f"--model_name_or_path={base}", "--use_cpu",
        f"--datasets={data / 'pairs.jsonl'}", "--instruction=Complete", "--num_negatives=1", "--max_length=64",
        "--per_device_train_batch_size=4", "--max_steps=4", "--eval_steps=2", f"--eval_tasks={data / 'tasks.yaml'}",
        "--learning_rate=1e-2", "--warmup_steps=0", "--logging_steps=1", "--disable_tqdm=true",
        f"--output_dir={folder / 'tiny-embed'}", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, env=environment(hub, folder, token), capture_output=True, text=True)


def in_clean_process(hub, folder, code: str):
    """Runs code where the package is not, with the local Hub."""
    (folder / "elsewhere").mkdir(exist_ok=True)
    code = "import sys; sys.modules['nvembed'] = None\n" + code
    command = [sys.executable, "-c", code]
    env = environment(hub, folder, token=None)
    return subprocess.run(command, env=env, cwd=folder / "elsewhere", capture_output=True, text=True)


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory, init_args, data) -> Path:
    """Base pushed by name, then trained from that name, with model and adapter pushed."""
    from nvembed.train.init_checkpoint import main as init

    folder = tmp_path_factory.mktemp("pushed")
    init(init_args(folder / "base"))
    hub.repositories["ann/base"] = {
        path.name: path.read_bytes() for path in (folder / "base").iterdir() if path.is_file()
    }
    done = train(hub, folder, "ann/base", data, "--push_to_hub", "--push_adapter", "--hub_model_id=ann/tiny")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Pushed to {hub.endpoint}/ann/tiny" in done.stdout
    return folder


def test_pushed_model_loads_by_name(hub, pushed, sentences):
    files = hub.repositories["ann/tiny"]
    assert {"model.safetensors", "config.json", "modeling_nvembed.py", "README.md", "loss_stage1.png"} <= files.keys()
    assert not any("/" in name or "triplets" in name for name in files), "neither data nor training checkpoints"
    code = f"""
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained("ann/tiny", trust_remote_code=True)
torch.save(model.encode({sentences!r}, "Instruct: Complete\\nQuery: "), "out.pt")
"""
    done = in_clean_process(hub, pushed, code)
    assert done.returncode == 0, done.stderr
    local = NVEmbedModel.from_pretrained(pushed / "tiny-embed")
    expected = local.encode(sentences, format_instruction("Complete"))
    torch.testing.assert_close(torch.load(pushed / "elsewhere" / "out.pt"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["ann/tiny", "ann/tiny-adapter"])
def test_usage_in_the_card_runs_as_written(hub, pushed, name):
    usage = re.search(r"```python\n(.*?)```", hub.repositories[name]["README.md"].decode(), re.DOTALL)[1]
    assert f'"{name}"' in usage
    done = in_clean_process(hub, pushed, usage)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tensor\(\[\[[-0-9.]+, ", done.stdout)


def test_the_adapter_gives_what_the_merged_model_gives(hub, pushed, sentences):
    code = f"""
import torch
from peft import PeftModel
from transformers import AutoModel
base = AutoModel.from_pretrained("ann/base", trust_remote_code=True)
before = base.encode({sentences!r})
adapted = PeftModel.from_pretrained(base, "ann/tiny-adapter").eval().encode({sentences!r})
merged = AutoModel.from_pretrained("ann/tiny", trust_remote_code=True).encode({sentences!r})
print((adapted - merged).abs().max() < 1e-5, (before - merged).abs().max() > 1e-3)
"""
    done = in_clean_process(hub, pushed, code)
    assert done.stdout.split() == ["tensor(True)", "tensor(True)"], done.stderr


def test_card_says_how_the_model_was_made(hub, pushed):
    card = ModelCard(hub.repositories["ann/tiny"]["README.md"].decode())
    data = card.data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("ann/base", "transformers", "feature-extraction")
    assert data.datasets is None, "a local file is not a data set of the Hub"
    (main, detailed) = data.eval_results
    assert (main.task_type, main.metric_type, main.dataset_split) == ("STS", "main_score", "test")
    measured = re.search(r"\| similar \| cosine spearman \| zero-shot \| (\S+) \| (\S+) \|", card.text)
    assert float(measured[2]) == pytest.approx(main.metric_value, abs=0.011)
    assert "| step 2 | step 4 |" in card.text
    assert "| pairs | triplets | Complete | 8 | 16 |" in card.text, "8 triplets, 4 steps of 4"
    assert "| `learning_rate` | 0.01 |" in card.text and "| `lora_r` | 16 |" in card.text
    assert "![Loss by step](loss_stage1.png)" in card.text
    assert hub.repositories["ann/tiny"]["loss_stage1.png"].startswith(b"\x89PNG")
    assert ModelCard(hub.repositories["ann/tiny-adapter"]["README.md"].decode()).data.library_name == "peft"


def test_two_processes_push_to_the_users_own(hub, tmp_path, checkpoint, data):
    """Only the main process asks the Hub who the user is, and completes the name."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--push_adapter", "--ddp_backend=gloo", "--per_device_train_batch_size=2"]
    done = train(hub, tmp_path, checkpoint, data, *options, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"Pushed to {hub.endpoint}/ann/tiny-embed") == 1
    assert "adapter_model.safetensors" in hub.repositories["ann/tiny-embed"]
    assert (tmp_path / "tiny-embed" / "config.json").is_file(), "the merged model stays here"


def test_a_push_leaves_one_model_in_its_repository(hub, tmp_path, checkpoint, data):
    mine, stale = hub.repositories, {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    mine["ann/model"] = dict.fromkeys({"config.json", "NOTES.md", "2_Dense/model.safetensors"} | stale, b"{}")
    mine["ann/adapter"] = {"adapter_config.json": b"{}"}
    for option, name, held in (
        ("--push_to_hub", "ann/adapter", "adapter_config.json"),
        ("--push_adapter", "ann/model", "config.json"),
    ):
        done = train(hub, tmp_path, checkpoint, data, option, f"--hub_model_id={name}")
        assert f"({held}); a repository cannot hold both" in done.stderr
        assert not (tmp_path / "tiny-embed").exists(), "nothing was begun"
    done = train(hub, tmp_path, checkpoint, data, "--push_to_hub", "--hub_model_id=ann/model")
    assert done.returncode == 0, done.stderr[-3000:]
    assert mine["ann/model"].keys() >= {"model.safetensors", "NOTES.md", "2_Dense/model.safetensors"}
    assert not mine["ann/model"].keys() & stale


def test_no_token_and_no_right_are_found_before_training(hub, tmp_path, checkpoint, data):
    done = train(hub, tmp_path, checkpoint, data, "--push_to_hub", token=None)
    assert "ValueError: pushing needs a Hub token: run `hf auth login`" in done.stderr
    done = train(hub, tmp_path, checkpoint, data, "--push_to_hub", token="hf_stolen")
    assert "does not accept the token" in done.stderr
    done = train(hub, tmp_path, checkpoint, data, "--push_to_hub", "--hub_model_id=ann/tiny", token="hf_bob")
    assert "the token of bob may not write to ann/tiny" in done.stderr
    done = train(hub, tmp_path, checkpoint, data, "--push_adapter", "--use_peft=false")
    assert "--push_adapter has no adapter to push" in done.stderr
    assert not (tmp_path / "tiny-embed").exists(), "nothing was begun"
