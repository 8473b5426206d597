"""Runs a training script under FSDP2 on CPUs: `fsdp2_stage.py train/stage1.py --model_name_or_path ...`.

accelerate shards on GPUs alone: on CPUs it falls back to DDP without a word. Here it is told that its two gloo
processes are GPUs, so that its own FSDP2 code runs, and the run fails unless the weights were shards.
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from nvembed.eval.sharding import is_sharded
from nvembed.train.trainer import EmbeddingTrainer


def compute_loss(self, model, *args, **kwargs):
    assert is_sharded(model), "the weights are whole"
    return whole_compute_loss(self, model, *args, **kwargs)


def init(self, *args, **kwargs):
    state_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


state_init, PartialState.__init__ = PartialState.__init__, init
whole_compute_loss, EmbeddingTrainer.compute_loss = EmbeddingTrainer.compute_loss, compute_loss
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
