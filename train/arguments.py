"""Every option of the training scripts but a teacher's, as dataclasses for `RecipeParser`."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig

from nvembed.eval.models import check_revision
from nvembed.texts_nvembed import check_characters
from nvembed.train.data.kinds import check_kind
from nvembed.train.data.sets import as_source
from nvembed.train.data.source import DatasetSource


IN_BATCH_NEGATIVES = {"true": True, "false": False, "labels": "labels", "sets": "sets"}

# Options of `TrainingArguments` that cannot apply here, with the values that do nothing; other values are refused.
UNSUPPORTED = {
    # Of other losses, and of data that is not blended for the whole run.
    "label_smoothing_factor": (0,), "label_names": (None,), "length_column_name": ("length",),
    "neftune_noise_alpha": (None, 0), "train_sampling_strategy": ("random",), "use_liger_kernel": (False,),
    # They change how many rows a batch has, or which ones; what is laid out, recorded and resumed counts on batch_size.
    "auto_find_batch_size": (False,), "dataloader_drop_last": (True,), "ignore_data_skip": (False,),
    "parallelism_config": (None,),
    # Of an evaluation by the Trainer; tasks are measured by mteb.
    "batch_eval_metrics": (False,), "bf16_full_eval": (False,), "eval_accumulation_steps": (None,),
    "eval_do_concat_batches": (True,), "eval_use_gather_object": (False,), "fp16_full_eval": (False,),
    "include_for_metrics": ([],), "per_device_eval_batch_size": (8,), "prediction_loss_only": (False,),
    # Of the Trainer's way to save and push: checkpoints are staged, and what is done is pushed to the main branch.
    "enable_jit_checkpoint": (False,), "hub_always_push": (False,), "hub_revision": (None,),
    "save_on_each_node": (False,),
}  # fmt: skip


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
    is_mask_instruction: bool | None = field(
        default=None,
        metadata={
            "help": "Leave instructions out of the pooling; false for stock servers (train/export.py). None: as "
            "the checkpoint does."
        },
    )
    lora_task_type: str | None = field(default=None, metadata={"help": "None: peft leaves our forward as it is."})

    def __post_init__(self):
        super().__post_init__()
        check_revision(self.model_name_or_path, self.model_revision)
        if self.attn_implementation is not None:
            raise ValueError(
                f"attn_implementation is {self.attn_implementation!r}, but the model chooses its own attention: "
                "a variable-length kernel where there is one, torch's elsewhere; leave it out"
            )


@dataclass
class TripletArguments:
    """The triplets that a step reads."""

    datasets: list[DatasetSource] = field(
        default_factory=list,
        metadata={
            "help": "In a recipe a list of mappings (see DatasetSource), their paths relative to the recipe, or of "
            "the paper's sets ({set: msmarco}); on the command line, paths."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that build_data.py wrote; sets named by `set:` are read from there, ready."},
    )
    leave_out: list[str] | None = field(
        default=None,
        metadata={"help": "Datasets of the recipe, by name, that are not read: to measure what they give."},
    )
    instruction: str | None = field(default=None, metadata={"help": "Task definition for the datasets that name none."})
    num_negatives: int = field(default=7, metadata={"help": "Hard negatives of a triplet (paper: 7)."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a text with its instruction (paper: 512)."})

    def __post_init__(self):
        if isinstance(self.datasets, (DatasetSource, dict, str)):
            self.datasets = [self.datasets]
        if not isinstance(self.datasets, list):
            raise ValueError(f"datasets is {self.datasets!r}, not a list; write it as `datasets: [path: ...]`")
        for entry in self.datasets:
            if isinstance(entry, dict) and "decontaminate" in entry:
                raise ValueError(
                    f"datasets: {entry}: decontaminate is for train/build_data.py; trainings take what it made"
                )
        self.datasets = [as_source(entry, self.data_dir) for entry in self.datasets]
        if unknown := {*(self.leave_out or ())} - {source.name for source in self.datasets}:
            names = ", ".join(source.name for source in self.datasets)
            raise ValueError(f"leave_out has {min(unknown)!r}, which is none of the datasets: {names}")
        self.datasets = [source for source in self.datasets if source.name not in (self.leave_out or ())]
        for source in self.datasets:
            check_kind(source)
        check_characters(self.instruction or "", "instruction")
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length!r}; it must be a number of tokens, 1 or more")
        if not isinstance(self.num_negatives, int) or self.num_negatives < 0:
            raise ValueError(f"num_negatives is {self.num_negatives!r}; it must be 0 or more")

    @property
    def weights(self) -> list[float] | None:
        """The sets' shares; None: by their number of triplets."""
        return None if self.datasets[0].weight is None else [source.weight for source in self.datasets]


@dataclass
class DataArguments(TripletArguments):
    """The triplets to train on and the held-out tasks to watch."""

    chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Gradient caching: tokens whose activations are held at once. None: those of the whole batch. Loss "
            "and gradient are the same; dropout draws other numbers than in one piece, the same in both passes."
        },
    )
    eval_tasks: str | None = field(
        default=None,
        metadata={"help": "YAML file of local tasks (eval/tasks/local.py), measured every eval_steps."},
    )
    eval_names: list[str] | None = field(
        default=None, metadata={"help": "The tasks of eval_tasks to measure; all if left out."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_names is not None and self.eval_tasks is None:
            raise ValueError(f"eval_names is {self.eval_names} but there is no eval_tasks to take them from")
        if self.chunk_tokens is not None and (not isinstance(self.chunk_tokens, int) or self.chunk_tokens < 1):
            raise ValueError(f"chunk_tokens is {self.chunk_tokens!r}; it must be 1 or more, or left out")


@dataclass
class StageArguments(TrainingArguments):
    """`TrainingArguments` with the paper's optimizer (Appendix, unverified) and the settings of the loss."""

    stage: ClassVar[str]

    in_batch_negatives: str = field(
        default="true",
        metadata={
            "help": "Candidates from the whole batch (true, as in stage 1), from the row alone (false, as in stage 2), "
            "from the row and what labels prove to be a negative: the positive of a row of the same data set and "
            "another class (labels), or from those and, in a data set without classes, the positives of its other "
            "rows (sets).",
            "nargs": "?",
            "const": "true",
        },
    )
    spread_out_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean squared cosine of the batch's unrelated texts, beside the contrastive loss: "
            "keeps embeddings from crowding into a cone (EmbeddingGemma). 0: off, as in the paper."
        },
    )
    temperature: float = field(default=0.02, metadata={"help": "Divisor of the cosine similarities in the loss."})
    false_negative_margin: float | None = field(
        default=None,
        metadata={
            "help": "Leave out in-batch candidates that the model, and hard negatives that the data's teacher, scores "
            "at least the positive's score plus this (0.1 in Qwen3-Embedding). None: off, as in the paper."
        },
    )
    matryoshka_dims: list[int] | None = field(
        default=None,
        metadata={
            "help": "Train the embeddings' first dimensions to be embeddings, too: 64 128 256. None: whole ones alone, "
            "as in the paper."
        },
    )
    matryoshka_weights: list[float] | None = field(
        default=None, metadata={"help": "One for each of matryoshka_dims, that of the whole being 1. None: 1 each."}
    )
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
    batches_of_one_set: bool = field(
        default=False,
        metadata={"help": "Each batch from one data set; off: every batch blends them, as in the paper's stage 2."},
    )
    push_adapter: bool = field(
        default=False,
        metadata={"help": "Push the adapter alone to the Hub; beside --push_to_hub, to <hub_model_id>-adapter."},
    )
    hub_strategy: str = field(default="end", metadata={"help": "Only what is done is pushed."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    save_strategy: str = field(
        default="no", metadata={"help": "Training checkpoints: no; steps, every save_steps; best."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs every column."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Every process needs batches of the same size to share negatives."}
    )

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be > 0, and finite")
        if self.false_negative_margin is not None and not 0 <= self.false_negative_margin < math.inf:
            raise ValueError(
                f"false_negative_margin is {self.false_negative_margin}; it must be 0 or more, or left out"
            )
        self._check_matryoshka()
        asked = str(self.in_batch_negatives).lower()  # "false" on a command line, a bool in a recipe
        if asked not in IN_BATCH_NEGATIVES:
            raise ValueError(f"in_batch_negatives is {asked!r}; it must be true, false, labels or sets")
        self.in_batch_negatives = IN_BATCH_NEGATIVES[asked]
        if not 0 <= self.spread_out_weight < math.inf:
            raise ValueError(f"spread_out_weight is {self.spread_out_weight}; it must be 0 (off) or more")
        if str(getattr(self.hub_strategy, "value", self.hub_strategy)) != "end":
            raise ValueError(
                f"hub_strategy is {self.hub_strategy}; only the finished model is pushed, so leave it out (end)"
            )
        for name, without_effect in UNSUPPORTED.items():
            value = getattr(self, name, without_effect[0])  # other versions of transformers lack some
            if getattr(value, "value", value) not in without_effect:
                raise ValueError(f"{name} is {value!r}, which this training cannot do; leave it out")
        for name in ("logging_strategy", "save_strategy", "eval_strategy"):
            value = getattr(self, name)
            if getattr(value, "value", value) == "epoch":
                raise ValueError(
                    f"{name} is epoch, and the Trainer sees all epochs of a run as one, which ends with it: set it to "
                    f"steps, and {name.removesuffix('strategy')}steps"
                )
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0, or set max_steps")
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_average"  # of the tasks; there is no loss on held-out data
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every chunk uses every weight
        super().__post_init__()
        if self.accelerator_config.split_batches:
            raise ValueError(
                "accelerator_config has split_batches, which changes how many rows a batch has; set batch_size, which "
                "counts those of all processes"
            )
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

    def _check_matryoshka(self) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is None:
            if weights is not None:
                raise ValueError(f"matryoshka_weights is {weights} and there are no matryoshka_dims to weigh")
            return
        if not dims or min(dims) < 1 or len({*dims}) < len(dims):
            raise ValueError(f"matryoshka_dims is {dims}; it must hold different numbers of dimensions, 1 or more")
        if weights is not None and (len(weights) != len(dims) or not all(0 < one < math.inf for one in weights)):
            raise ValueError(f"matryoshka_weights is {weights} for matryoshka_dims {dims}; each needs one above 0")

    @property
    def negatives_are_of_the_set(self) -> bool:
        """Whether in-batch negatives come from rows of the same data set alone."""
        return self.in_batch_negatives in ("labels", "sets")

    @property
    def needs_negatives(self) -> bool:
        """Whether nothing would be learned without them."""
        return True

    @property
    def matryoshka(self) -> dict[int, float]:
        """The weights of the embeddings' prefixes in the loss, by their number of dimensions."""
        dims = self.matryoshka_dims or []
        return dict(zip(dims, self.matryoshka_weights or [1.0] * len(dims), strict=True))

    @property
    def batch_rows(self) -> int:
        """Rows that one forward pass of all processes holds, and that share in-batch negatives."""
        return self.per_device_train_batch_size * self.world_size

    @property
    def update_rows(self) -> int:
        """Rows of one update of the weights: of all processes and accumulated steps."""
        return self.batch_rows * self.gradient_accumulation_steps

    @property
    def order_seed(self) -> int:
        """Seed of sampling, mining and the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def triplets_dir(self) -> Path:
        """Where the run keeps its triplets."""
        return Path(self.output_dir, "triplets")

    @property
    def checkpoints(self) -> list[Path]:
        """Training checkpoints in `output_dir`, by step."""
        steps = Path(self.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        return sorted(steps, key=lambda path: (len(path.name), path.name))

    def check_fills_update(self, triplets: int) -> None:
        """Raises a `ValueError` if there are fewer triplets than one update takes."""
        if triplets < self.update_rows:
            raise ValueError(
                f"{triplets} triplets do not fill one batch of {self.update_rows} (per_device_train_batch_size x "
                "processes x gradient_accumulation_steps); lower the batch size or add data"
            )

    def run_rows(self, triplets: int) -> int:
        """Rows of the whole run over this many triplets: of whole updates, like its batches."""
        if self.max_steps > 0:
            return self.max_steps * self.update_rows
        rows = math.ceil(triplets * self.num_train_epochs)
        return rows - rows % self.update_rows or rows  # less than one update: `check_fills_update` refuses it


def check_negatives(data_args: DataArguments, training_args: StageArguments) -> None:
    """Raises a `ValueError` if no row can have a negative: the loss would always be 0."""
    if data_args.num_negatives > 0 or not training_args.needs_negatives:
        return
    if not training_args.in_batch_negatives:
        raise ValueError(
            "num_negatives is 0 and in_batch_negatives is off (as in stage 2), so no row has a negative and nothing "
            "would be learned; set num_negatives to 1 or more, or in_batch_negatives to sets"
        )
    if training_args.batch_rows < 2:
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
    known["batch_size"] = training_args.update_rows
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
    in_batch_negatives: str = field(
        default="false",
        metadata={
            "help": "false: two texts of one class in a batch are not negatives of each other. labels: those of "
            "different classes of one data set are. sets: so are any two of a data set without classes. true: all are.",
            "nargs": "?",
            "const": "true",
        },
    )
    learning_rate: float = field(default=1.5e-5, metadata={"help": "Peak learning rate (Appendix, unverified)."})
