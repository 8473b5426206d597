"""What is freed goes back to the system, and oneDNN's cache has a limit."""

import os
import subprocess
import sys

import pytest

from nvembed import NVEmbedModel
from nvembed.train.arguments import Stage1Arguments
from nvembed.train.memory import PRIMITIVE_CACHE, ReturnFreedMemory, limit_primitive_cache
from nvembed.train.trainer import EmbeddingTrainer


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_returned_every_few_steps():
    """Blocks of ever-new sizes below glibc's own threshold, freed behind one that stays, as batches leave them."""
    script = """
import torch
from types import SimpleNamespace
from nvembed.train.memory import STEPS, ReturnFreedMemory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1e6

callback = ReturnFreedMemory()
on_cpu = SimpleNamespace(device=torch.device("cpu"))
before = resident()
blocks = [torch.ones(25_000 + 10 * i) for i in range(5_000)]  # 0.1 to 0.3 MB each
stays = torch.ones(25_000)
held = resident()
del blocks
callback.on_step_end(on_cpu, SimpleNamespace(global_step=STEPS + 1), None)
kept = resident()
callback.on_step_end(on_cpu, SimpleNamespace(global_step=STEPS), None)
print(held - before, kept - before, resident() - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    held, kept, returned = map(float, done.stdout.split())
    assert kept > 0.5 * held, "nothing to return in this test"
    assert returned < 0.2 * held


def test_the_trainer_returns_memory(tmp_path, checkpoint):
    model = NVEmbedModel.from_pretrained(checkpoint)
    trainer = EmbeddingTrainer(model=model, args=Stage1Arguments(str(tmp_path), use_cpu=True))
    assert any(isinstance(callback, ReturnFreedMemory) for callback in trainer.callback_handler.callbacks)


def test_a_limit_of_the_users_stays(monkeypatch):
    name, limit = PRIMITIVE_CACHE
    monkeypatch.delenv(name, raising=False)
    limit_primitive_cache()
    assert os.environ[name] == limit
    monkeypatch.setenv(name, "7")
    limit_primitive_cache()
    assert os.environ[name] == "7"
