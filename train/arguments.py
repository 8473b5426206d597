"""Every option of the training scripts, as dataclasses for `RecipeParser`: YAML and command line alike."""

from dataclasses import dataclass, field, fields
from typing import ClassVar

from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from nvembed.modeling_nvembed import check_characters
from nvembed.train.data.registry import DatasetSource, as_source


STAGES = ("stage1", "stage2")


class RecipeParser(TrlParser):
    """`TrlParser` for recipes that may hold both stages: the keys under `stage1:` or `stage2:` outrank those beside.

    The stage whose part is read is that of the `StageArguments` among the dataclasses.
    """

    def __init__(self, *dataclass_types: type):
        self.stage = next(group.stage for group in dataclass_types if issubclass(group, StageArguments))
        super().__init__(dataclass_types)

    def set_defaults_with_config(self, **config) -> list[str]:
        parts = {name: config.pop(name) for name in STAGES if name in config}
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise ValueError(f"{name} is {part!r} in the recipe; it must be a mapping of that stage's settings")
        if parts and self.stage not in parts:
            raise ValueError(f"the recipe has {', '.join(parts)} and no {self.stage}: run train/{next(iter(parts))}.py")
        return super().set_defaults_with_config(**(config | parts.get(self.stage, {})))


# Options of `TrainingArguments` that the contrastive loss and the blended data leave no place for, with the values that
# ask for nothing; others are refused, not ignored.
IGNORED = {
    "label_smoothing_factor": (0,),
    "neftune_noise_alpha": (None, 0),
    "train_sampling_strategy": ("random",),
    "use_liger_kernel": (False,),
}


@dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig` with the paper's LoRA (Appendix, unverified): all linear layers of the decoder."""

    use_peft: bool = field(default=True, metadata={"help": "LoRA on the decoder; off: train every weight."})
    lora_dropout: float = field(default=0.1, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Linear layers of the decoder that get LoRA."},
    )
    lora_modules_to_save: list[str] | None = field(
        default_factory=lambda: ["latent_attention_model"],
        metadata={"help": "Modules trained in full: the latent (or self-) attention."},
    )
    lora_task_type: str | None = field(default=None, metadata={"help": "None: peft leaves our forward as it is."})

    def __post_init__(self):
        super().__post_init__()
        if self.attn_implementation is not None:
            raise ValueError(
                f"attn_implementation is {self.attn_implementation!r}, but the model chooses its attention by itself: "
                "a variable-length kernel where there is one, torch's elsewhere; leave it out"
            )


@dataclass
class DataArguments:
    """The triplets to train on and the held-out tasks to watch."""

    datasets: list[DatasetSource] = field(
        default_factory=list,
        metadata={"help": "In a recipe a list of mappings (see DatasetSource); on the command line, paths."},
    )
    instruction: str | None = field(default=None, metadata={"help": "Task definition for the datasets that name none."})
    num_negatives: int = field(default=7, metadata={"help": "Hard negatives of a triplet (paper: 7)."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a text with its instruction (paper: 512)."})
    chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Gradient caching: tokens whose activations are held at once. None: those of the whole batch. Loss "
            "and gradient are the same; dropout draws other numbers than in one piece, the same in both passes."
        },
    )
    eval_tasks: str | None = field(
        default=None,
        metadata={"help": "YAML file of local tasks (eval/local_tasks.py), measured every eval_steps."},
    )
    eval_names: list[str] | None = field(
        default=None, metadata={"help": "The tasks of eval_tasks to measure; all if left out."}
    )

    def __post_init__(self):
        if isinstance(self.datasets, (DatasetSource, dict, str)):
            self.datasets = [self.datasets]
        if not isinstance(self.datasets, list):
            raise ValueError(f"datasets is {self.datasets!r}, not a list; write it as `datasets: [path: ...]`")
        self.datasets = [as_source(entry) for entry in self.datasets]
        check_characters(self.instruction or "", "instruction")
        if self.eval_names is not None and self.eval_tasks is None:
            raise ValueError(f"eval_names is {self.eval_names} but there is no eval_tasks to take them from")
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length!r}; it must be a number of tokens, 1 or more")
        if self.chunk_tokens is not None and (not isinstance(self.chunk_tokens, int) or self.chunk_tokens < 1):
            raise ValueError(f"chunk_tokens is {self.chunk_tokens!r}; it must be 1 or more, or left out")
        if not isinstance(self.num_negatives, int) or self.num_negatives < 0:
            raise ValueError(f"num_negatives is {self.num_negatives!r}; it must be 0 or more")


@dataclass
class StageArguments(TrainingArguments):
    """`TrainingArguments` with the paper's optimizer (Appendix, unverified) and the settings of the loss."""

    stage: ClassVar[str]

    in_batch_negatives: bool = field(
        default=True, metadata={"help": "Candidates from the whole batch (stage 1) or from the row alone (stage 2)."}
    )
    temperature: float = field(default=0.02, metadata={"help": "Divisor of the cosine similarities in the loss."})
    weight_decay: float = field(default=0.03, metadata={"help": "AdamW's weight decay."})
    warmup_steps: float = field(default=50, metadata={"help": "Linear warm-up: steps, or below 1 a share of them."})
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of a batch, all processes and accumulated steps together; sets per_device_train_batch_size. "
            "In-batch negatives come from one accumulated step: for more of them at the same memory, set chunk_tokens "
            "instead of gradient_accumulation_steps."
        },
    )
    push_adapter: bool = field(
        default=False,
        metadata={"help": "Push the adapter alone to the Hub; beside --push_to_hub, to <hub_model_id>-adapter."},
    )
    hub_strategy: str = field(default="end", metadata={"help": "Only what is done is pushed."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    save_strategy: str = field(default="no", metadata={"help": "Intermediate adapter checkpoints: no, steps, epoch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs every column."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Every process needs batches of the same size to share negatives."}
    )

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be > 0")
        if str(getattr(self.hub_strategy, "value", self.hub_strategy)) != "end":
            raise ValueError(
                f"hub_strategy is {self.hub_strategy}; only the finished model is pushed, so leave it out (end)"
            )
        for name, without_effect in IGNORED.items():
            value = getattr(self, name)
            if getattr(value, "value", value) not in without_effect:
                raise ValueError(f"{name} is {value!r}, which this training cannot do; leave it out")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0, or set max_steps")
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_average"  # of the tasks; there is no loss on held-out data
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every chunk uses every weight
        super().__post_init__()
        if self.batch_size is not None:
            shares = self.world_size * self.gradient_accumulation_steps
            self.per_device_train_batch_size, rest = divmod(self.batch_size, shares)
            if rest or self.batch_size < 1:
                raise ValueError(
                    f"batch_size is {self.batch_size}, which {self.world_size} processes x "
                    f"{self.gradient_accumulation_steps} gradient_accumulation_steps do not divide into equal shares; "
                    f"{max(1, round(self.batch_size / shares)) * shares} would do"
                )
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type == "cuda"


def check_negatives(data_args: DataArguments, training_args: StageArguments) -> None:
    """Raises a `ValueError` where no row could have a negative: the loss would be 0 whatever the model does."""
    if data_args.num_negatives > 0:
        return
    if not training_args.in_batch_negatives:
        raise ValueError(
            "num_negatives is 0 and in_batch_negatives is off (as in stage 2), so no row has a negative and nothing "
            "would be learned; set num_negatives to 1 or more"
        )
    rows = training_args.per_device_train_batch_size * training_args.world_size
    if rows < 2:
        raise ValueError(
            "num_negatives is 0 and a batch has one row, so there is no negative in it and nothing would be learned; "
            "raise batch_size (accumulated steps do not share negatives) or num_negatives"
        )


def settings_of(
    model_args: ModelArguments, data_args: DataArguments, training_args: StageArguments
) -> dict[str, object]:
    """All settings of a run by name, as JSON has them; LoRA's only where it is used."""
    groups = (training_args, data_args, model_args)
    known = {field.name: getattr(group, field.name) for group in groups for field in fields(group)}
    known["processes"] = training_args.world_size
    share = training_args.world_size * training_args.gradient_accumulation_steps
    known["batch_size"] = training_args.per_device_train_batch_size * share
    if not model_args.use_peft:
        known = {name: value for name, value in known.items() if not name.startswith("lora_")}
    return {name: getattr(value, "value", value) for name, value in known.items()}


@dataclass
class Stage1Arguments(StageArguments):
    """Stage 1: retrieval data, in-batch and hard negatives (paper section 3.3)."""

    stage: ClassVar[str] = "stage1"
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate (Appendix, unverified)."})


@dataclass
class Stage2Arguments(StageArguments):
    """Stage 2: all data blended, hard negatives only (paper section 3.3)."""

    stage: ClassVar[str] = "stage2"
    in_batch_negatives: bool = field(
        default=False, metadata={"help": "Off: two texts of one class in a batch are not negatives of each other."}
    )
    learning_rate: float = field(default=1.5e-5, metadata={"help": "Peak learning rate (Appendix, unverified)."})
