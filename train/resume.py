"""Resumes a training: finds the checkpoint, checks that its weights belong to this run, and compares settings.

A setting that differs from the checkpoint's either applies from there on, and the log and the model card say so, or is
refused because the checkpoint's contents depend on the earlier value.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import get_logger

from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.data.prepared import first_difference


logger = get_logger(__name__)

SETTINGS_FILE = "settings.json"  # within a training checkpoint
NOT_RECORDED = "not recorded"  # value of a setting where an earlier nvembed trained that part of the run

OPTIMIZER_SETTINGS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SCHEDULE_SETTINGS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs")
# Settings that may change at a resume: the run continues with the new value.
APPLIED = (
    *OPTIMIZER_SETTINGS, *SCHEDULE_SETTINGS, "max_grad_norm", "temperature", "in_batch_negatives", "max_length",
    "lora_dropout", "bf16", "fp16", "gradient_accumulation_steps", "gradient_checkpointing", "chunk_tokens",
    "processes", "false_negative_margin", "matryoshka_dims", "matryoshka_weights", "spread_out_weight", "alpha",
    "contrastive_weight", "kd_losses", "states_error", "layer_map", "teacher_temperature", "similarity_temperature",
    "embedding_distance",
)  # fmt: skip
UNRECORDED = ("teacher_instruction",)  # by earlier versions, which had it
# Settings that may not change, and why.
REFUSED = {
    "optim": "the checkpoint has the states of that optimizer",
    "optim_args": "the checkpoint has the states of that optimizer",
    "batch_size": "the place in the data is counted in batches",
    "num_negatives": "the triplets were made with it",
    "seed": "the order of the data follows from it",
    "batches_of_one_set": "the order of the data follows from it",
    "data_seed": "the order of the data follows from it",
    "dtype": "the weights were trained on a base of that dtype",
    "teacher": "the student was trained towards it",
    "teacher_revision": "the student was trained towards it",
    "teacher_instruction": "the student was trained towards what the teacher makes of it",
} | dict.fromkeys(
    (
        "use_peft", "lora_r", "lora_alpha", "use_rslora", "use_dora", "lora_target_modules", "lora_target_parameters",
        "lora_modules_to_save", "is_mask_instruction", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
        "use_bnb_nested_quant",
    ),
    "the adapter in the checkpoint was trained with it",
)  # fmt: skip
# Schedules whose rate is part of their saved state, so that a new learning rate cannot be applied.
STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def find_resume(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """The training checkpoint to resume from: the one named or, for true, the last in `output_dir`; None to start anew.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it lacks the state of the optimizer.
        FileExistsError: `output_dir` holds checkpoints, but the run would start anew, or from a checkpoint elsewhere,
            and overwrite them.
    """
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if resume_from_checkpoint is None or str(resume_from_checkpoint).lower() == "false":
        if last is not None:
            raise FileExistsError(
                f"{last} belongs to an unfinished run: go on from it with --resume_from_checkpoint true or, to start "
                "anew, name another --output_dir or move its checkpoints away"
            )
        return None
    if str(resume_from_checkpoint).lower() == "true":  # a string from the command line, a bool from a recipe
        if last is None:
            raise FileNotFoundError(
                f"{output_dir} holds no checkpoint to resume from; leave --resume_from_checkpoint out to start anew"
            )
        check_optimizer_is_there(last)
        return last
    if not Path(resume_from_checkpoint, TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(
            f"--resume_from_checkpoint {resume_from_checkpoint} is no training checkpoint: no {TRAINER_STATE_NAME}"
        )
    folder = Path(resume_from_checkpoint).absolute().parent  # the checkpoint itself may be a link to another disk
    if last is not None and folder.resolve() != Path(output_dir).resolve():
        raise FileExistsError(
            f"{output_dir} already holds {Path(last).name}: go on from it with --resume_from_checkpoint true or, to "
            f"start from {resume_from_checkpoint}, name another --output_dir or move its checkpoints away"
        )
    check_optimizer_is_there(resume_from_checkpoint)
    return str(resume_from_checkpoint)


def check_optimizer_is_there(checkpoint: str) -> None:
    """Raises a `FileNotFoundError` if a training checkpoint holds weights alone: the Trainer would go on in silence.

    The optimizer's state is a file, a folder of FSDP's, or in DeepSpeed's `global_step<N>`.
    """
    if not any(any(Path(checkpoint).glob(pattern)) for pattern in ("optimizer*", "global_step*")):
        raise FileNotFoundError(
            f"{checkpoint} has no state of the optimizer (save_only_model was on), so the run cannot go on as it was: "
            "start anew in another --output_dir, and leave save_only_model out to be able to resume"
        )


def check_resume(checkpoint: str, model: NVEmbedModel | PeftModel) -> None:
    """Compares names and shapes of a training checkpoint's weights with the model's; reads only file headers.

    Sharded weights (a checkpoint of FSDP, a model under ZeRO-3) are not compared.

    Raises:
        ValueError: the checkpoint does not fit this model and adapter, or holds an adapter while this run trains all
            weights, or the reverse.
    """
    adapter, whole = Path(checkpoint, SAFETENSORS_WEIGHTS_NAME), sorted(Path(checkpoint).glob("model*.safetensors"))
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    adapted = isinstance(model, PeftModel)
    if adapter.is_file() != adapted and (adapter.is_file() or whole):
        kinds = ("an adapter", "all weights")
        there, here = kinds if adapter.is_file() else kinds[::-1]
        raise ValueError(
            f"{checkpoint} holds {there} and this run trains {here}: set use_peft: {str(not adapted).lower()}"
        )
    check_lora(checkpoint, model)
    weights = get_peft_model_state_dict(model) if adapted else model.state_dict()
    expected = {name: list(tensor.shape) for name, tensor in weights.items()}
    found = {}
    for path in [adapter] if adapter.is_file() else whole:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in list(file.keys())}
    if not found:
        return
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{checkpoint} does not belong to this model and adapter: {name} is {found.get(name, 'absent')} there and "
            f"{expected.get(name, 'absent')} here; give the model_name_or_path and LoRA settings it was trained with"
        )


def check_lora(checkpoint: str, model: NVEmbedModel | PeftModel) -> None:
    """Raises a `ValueError` if the adapter in a checkpoint was trained with another scale, or as another kind."""
    file = Path(checkpoint, CONFIG_NAME)
    if not isinstance(model, PeftModel) or not file.is_file():
        return
    there, here = json.loads(file.read_text()), model.peft_config[model.active_adapter].to_dict()
    for name in ("lora_alpha", "use_rslora", "use_dora"):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{name} was {there.get(name)!r} until {Path(checkpoint).name} and is {here.get(name)!r}: the adapter "
                "in the checkpoint was trained with it; give what it began with, or start anew in another --output_dir"
            )


class RunRecord:
    """The settings of a run and the steps from which they applied; saved in each of its checkpoints.

    Args:
        settings: this run's values of the settings in `APPLIED` and `REFUSED`.
        base: `digest_weights` of the model that training starts from; None: not compared.
        data: what the triplets were made from (`nvembed.train.data.prepared.read_provenance`); None: not compared.
        periods: (first step, settings) pairs of the checkpoint being resumed, in order; empty for a new run.
    """

    def __init__(
        self,
        settings: Mapping,
        base: str | None,
        data: Mapping | None = None,
        periods: Sequence[tuple[int, Mapping]] = (),
    ):
        self.base, self.data = base, data
        self.periods = [*periods] or [(0, dict(settings))]

    def save(self, checkpoint: Path) -> None:
        periods = [{"from_step": step, "settings": settings} for step, settings in self.periods]
        content = {"base": self.base, "data": self.data, "periods": periods}
        (checkpoint / SETTINGS_FILE).write_text(json.dumps(content, indent=1) + "\n")

    def history(self, name: str) -> list[tuple[int, object]]:
        """The values of a setting, each with its first step; a single one if it never changed."""
        values: list[tuple[int, object]] = []
        for step, settings in self.periods:
            value = settings.get(name, NOT_RECORDED)
            if not values or value != values[-1][1]:
                values.append((step, value))
        return values


def resume_record(checkpoint: str, now: RunRecord, steps: int, is_deepspeed: bool = False) -> RunRecord:
    """The record of the run being resumed, extended by this run's settings; logs what changes.

    Args:
        now: record of a new run with these settings.
        steps: length of the whole run with these settings.

    Raises:
        ValueError: the data, the base's weights or a setting that may not change has changed, or the checkpoint is
            past the end of this run.
    """
    settings = now.periods[-1][1]
    step = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())["global_step"]
    if steps < step:
        raise ValueError(
            f"{checkpoint} is at step {step} and this run has {steps}; raise max_steps or num_train_epochs to go on"
        )
    file = Path(checkpoint, SETTINGS_FILE)
    if not file.is_file():
        logger.warning(
            f"{checkpoint} does not say which settings it was trained with (an earlier nvembed wrote it), so a change "
            "of them is not noticed; optimizer and schedule have those of this run from here on"
        )
        return RunRecord(settings, now.base, now.data, [(0, {}), (step, settings)])
    content = json.loads(file.read_text())
    periods = [(period["from_step"], period["settings"]) for period in content["periods"]]
    before = periods[-1][1]
    # What an earlier nvembed had no option for was off; what it did not record is not known.
    absent = [name for name in settings if name not in before and (not settings[name] or name in UNRECORDED)]
    changed = [name for name, value in settings.items() if value != before.get(name) and name not in absent]
    for name in changed:
        reason = REFUSED.get(name)
        if name in (*OPTIMIZER_SETTINGS, *SCHEDULE_SETTINGS):
            if is_deepspeed:
                reason = "DeepSpeed restores its optimizer and schedule as they were"
            elif {settings["lr_scheduler_type"], before.get("lr_scheduler_type")} & set(STATEFUL_SCHEDULES):
                reason = "this schedule restores its rate as it was"
        if reason is not None:
            raise ValueError(
                f"{name} was {before.get(name)!r} until {Path(checkpoint).name} and is {settings[name]!r}: {reason}; "
                "give what it began with, or name another --output_dir and start from the checkpoint it began with"
            )
    if None not in (now.base, content["base"]) and now.base != content["base"]:
        raise ValueError(
            f"{checkpoint} was trained on another base: the weights of model_name_or_path are not those that it began "
            "with; give that base, or name another --output_dir"
        )
    if None not in (now.data, content.get("data")) and now.data != content["data"]:
        raise ValueError(
            f"{checkpoint} was trained on other data: {first_difference(content['data'], now.data)}; give what it "
            "began with, or start anew in another --output_dir"
        )
    for name in changed:
        logger.warning(f"From step {step} on, {name} is {settings[name]!r}; it was {before.get(name)!r}.")
    return RunRecord(settings, now.base, now.data, [*periods, (step, dict(settings))] if changed else periods)


def digest_weights(model: nn.Module) -> str | None:
    """A digest of each weight's name, shape and first numbers, enough to tell trained models of one shape apart.

    None if the weights are sharded or on the meta device, so that they cannot be read.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or hasattr(tensor, "ds_id"):
            return None
        numbers = tensor.detach().flatten()[:64].float().cpu()
        digest.update(f"{name} {list(tensor.shape)}".encode() + numbers.numpy().tobytes())
    return digest.hexdigest()[:16]


class FreshSettings:
    """Remembers the settings of an optimizer and its schedule and restores them after their states were loaded.

    Optimizers and schedules load learning rate, weight decay and the like with their states, which would override what
    the user asks for at the resume.
    """

    def __init__(self, optimizer: Optimizer, scheduler):
        left_out = ("params", "lr")
        self.groups = [{k: v for k, v in group.items() if k not in left_out} for group in optimizer.param_groups]
        self.base_rates = list(getattr(_inner(scheduler), "base_lrs", ()))

    def give_back(self, optimizer: Optimizer, scheduler) -> None:
        scheduler = _inner(scheduler)
        for group, fresh in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(fresh)
        if not isinstance(scheduler, LambdaLR):
            return
        scheduler.base_lrs = self.base_rates
        rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(self.base_rates, scheduler.lr_lambdas)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        scheduler._last_lr = rates


def _inner(scheduler):
    return getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
