"""The callback against the harness: in half precision, with shared and with sharded weights."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nvembed.eval.callback import LocalTasksCallback
from nvembed.eval.encoder import TaskEncoder
from nvembed.eval.measure import measure
from nvembed.eval.models import LoadedModel
from nvembed.eval.sharding import is_sharded
from nvembed.eval.tasks.local import read_tasks
from tests import preloaded


class LookUp(nn.Module):
    """A model whose `encode` gives fixed vectors, and records whether it ran under autocast."""

    def __init__(self, embed):
        super().__init__()
        self.embed, self.autocast = embed, []

    def encode(self, texts, instruction, max_length, batch_tokens, convert_to_numpy):
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return self.embed(texts, instruction)


def arguments(**options):
    return SimpleNamespace(**({"bf16": False, "fp16": False, "device": torch.device("cpu")} | options))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_scores_are_the_harnesss_whatever_the_precision(data, embed, bf16):
    """Only the model runs in half precision: mteb's similarities would get ties."""
    tasks = read_tasks(str(data / "tasks.yaml"))
    callback, metrics, model = LocalTasksCallback(tasks), {}, LookUp(embed)
    callback.on_evaluate(arguments(bf16=bf16), None, None, model=model, metrics=metrics)
    assert set(model.autocast) == {bf16}
    results = measure(tasks, TaskEncoder(LoadedModel("m", "r", embed), embed, callback.instructions))
    expected = {f"eval_{name}": round(result.get_score(), 5) for name, result in results.items()}
    assert metrics == expected | {"eval_average": pytest.approx(np.mean(list(expected.values())), abs=1e-5)}


def test_random_numbers_go_on(data, embed):
    callback = LocalTasksCallback(read_tasks(str(data / "tasks.yaml"), ["classification"]))

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    drawn = []
    for evaluates in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        draw()
        if evaluates:
            callback.on_evaluate(arguments(), None, None, model=LookUp(embed), metrics={})
        drawn.append(draw())
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_sharded_weights(checkpoint, data, tmp_path):
    """FSDP2 on two gloo processes: each forward pass needs both, so both embed all texts, and nobody waits for ever."""
    script = tmp_path / "sharded.py"
    script.write_text(f"""
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from types import SimpleNamespace
from nvembed import NVEmbedModel
from nvembed.eval.callback import LocalTasksCallback
from nvembed.eval.sharding import is_sharded
from nvembed.eval.tasks.local import read_tasks
dist.init_process_group("gloo")
model = NVEmbedModel.from_pretrained({str(checkpoint)!r})
callback = LocalTasksCallback(read_tasks({str(data / "tasks.yaml")!r}, ["sts", "reranking"]), 64)
args = SimpleNamespace(bf16=False, fp16=False, device=torch.device("cpu"))
whole, shards = {{}}, {{}}
assert not is_sharded(model)
callback.on_evaluate(args, None, None, model=model, metrics=whole)
for layer in model.embedding_model.layers:
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
model.encode = lambda *a, encode=model.encode, **k: encode(*a, **k)
torch.distributed.fsdp.register_fsdp_forward_method(model, "encode")
assert is_sharded(model)
callback.on_evaluate(args, None, None, model=model, metrics=shards)
assert whole.keys() == shards.keys() == {{"eval_sts", "eval_reranking", "eval_average"}}
assert all(abs(whole[key] - shards[key]) < 1e-3 for key in whole), (whole, shards)
print("equal on rank", dist.get_rank())
""")
    done = preloaded.run(script, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal on rank") == 2


def test_a_plain_model_is_not_sharded(model):
    assert not is_sharded(model)
