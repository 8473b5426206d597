"""Training of pruned weights: what is zero stays zero, and the loss is of the model that will be saved."""

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from transformers import TrainerCallback

from nvembed.train.compress.sparsity import decoder_matrices


# Options of LoRA whose own forward pass or merging would fill the zeros.
DENSE_ONLY = ("use_dora", "lora_bias", "target_parameters")


class SparseLora(lora.Linear):
    """LoRA whose update counts only where the base's weight is not zero: W + (W != 0) * (B A).

    An update masked only when it is merged would be of another model than the one that was trained. The sum is made in
    every forward pass, `rank` multiplications a weight, and kept for the backward pass: with gradient checkpointing,
    that of one layer at a time.
    """

    def get_delta_weight(self, adapter: str) -> Tensor:
        return super().get_delta_weight(adapter) * (self.get_base_layer().weight != 0)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        (adapter,) = self.active_adapters
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base, dropout = self.get_base_layer(), self.lora_dropout[adapter]
        delta = self.get_delta_weight(adapter)
        if isinstance(dropout, nn.Identity) or not self.training:
            return F.linear(x, base.weight + delta.to(base.weight.dtype), base.bias)
        result = base(x)
        return result + F.linear(dropout(x), delta.to(x.dtype)).to(result.dtype)


def keep_zeros_in_lora(config: LoraConfig) -> None:
    """Makes `config` put `SparseLora` on linear layers.

    Raises:
        ValueError: an option is set that would fill the zeros.
    """
    for name in DENSE_ONLY:
        if getattr(config, name, None):
            raise ValueError(f"{name} is set, and the checkpoint is pruned: its zeros would not stay; leave it out")
    for module in config.modules_to_save or ():
        if not module.startswith("latent_attention_model"):
            raise ValueError(
                f"lora_modules_to_save has {module}, and the decoder is pruned: trained in full, its zeros would not "
                "stay; leave it to LoRA"
            )
    config._register_custom_module({nn.Linear: SparseLora})


class KeepZeros(TrainerCallback):
    """For a pruned model of which every weight is trained: gradients of zeros are zero, so AdamW leaves them there.

    Raises:
        ValueError: another optimizer is used, which may move a weight without a gradient.
    """

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        optimizer = getattr(args.optim, "value", args.optim)
        if not str(optimizer).startswith("adamw"):
            raise ValueError(
                f"the checkpoint is pruned and use_peft is false with optim {optimizer}: zeros are kept with LoRA, or "
                "by AdamW"
            )

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        for module in decoder_matrices(self.decoder).values():
            if module.weight.grad is not None:
                module.weight.grad.mul_(module.weight != 0)
