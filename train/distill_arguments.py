"""The options of `train/distill.py`: those of stage 2, and of the teacher."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from nvembed.eval.models import check_revision
from nvembed.train.arguments import Stage2Arguments


KD_LOSSES = ("states", "scores", "similarities", "embeddings")
SIMILARITY_TEMPERATURE = 0.05


@dataclass
class DistillArguments(Stage2Arguments):
    """Retraining by a teacher: the contrastive loss + alpha * what the student lacks (paper, Appendix A)."""

    stage: ClassVar[str] = "distill"
    teacher: str | None = field(
        default=None, metadata={"help": "Checkpoint, or for all but states any model that run_mteb.py measures."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a teacher's."})
    alpha: float = field(default=1.0, metadata={"help": "Weight of the distillation's loss."})
    contrastive_weight: float = field(
        default=1.0, metadata={"help": "Weight of the contrastive loss; 0: learn from the teacher alone."}
    )
    kd_losses: list[str] = field(
        default_factory=lambda: ["states"],
        metadata={
            "help": "What is compared: states (of every layer; the paper's; the teacher must be of the student's width "
            "and tokenizer), scores (of a row's candidates), similarities (of each text to all others of the batch), "
            "embeddings (of every text)."
        },
    )
    states_error: Literal["relative", "absolute"] | None = field(
        default=None,
        metadata={
            "help": "Squared error of a token's states: relative to the teacher's squared length, which grows by "
            "orders of magnitude from layer to layer and at the first token, or absolute, as in the paper. None: "
            "relative."
        },
    )
    layer_map: list[int] | None = field(
        default=None,
        metadata={
            "help": "The teacher's layer, from 0, for each of the student's but the last. None: those that prune.py "
            "kept, or evenly spaced ones."
        },
    )
    teacher_temperature: float | None = field(
        default=None, metadata={"help": "Divisor of the teacher's cosines in scores; None: temperature."}
    )
    similarity_temperature: float | None = field(
        default=None,
        metadata={"help": f"Divisor of both models' cosines in similarities; None: {SIMILARITY_TEMPERATURE}."},
    )
    embedding_distance: Literal["cosine", "mse"] | None = field(
        default=None,
        metadata={"help": "Of embeddings: 1 - cosine, or the mean squared error of a dimension. None: cosine."},
    )
    teacher_instruction: str | None = field(
        default=None,
        metadata={
            "help": "Task definition that a teacher with instructions reads instead of the student's, for all but "
            "states: for a student without any."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the teacher's embeddings, made once, for later runs, too. None: made as they come."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is None:
            raise ValueError("teacher is missing; name the checkpoint to learn from")
        check_revision(self.teacher, self.teacher_revision)
        if not self.kd_losses or set(self.kd_losses) - set(KD_LOSSES):
            raise ValueError(f"kd_losses is {self.kd_losses}; it must hold some of {', '.join(KD_LOSSES)}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0, or train with stage2.py, without a teacher")
        if not 0 <= self.contrastive_weight < math.inf:
            raise ValueError(f"contrastive_weight is {self.contrastive_weight}; it must be 0 or more")
        for name in ("teacher_temperature", "similarity_temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be > 0, and finite")
        if "states" in self.kd_losses and self.teacher_cache is not None:
            raise ValueError(
                "teacher_cache keeps a teacher's embeddings, and kd_losses has states, for which the teacher runs "
                "anyway: leave one out"
            )
        if "states" in self.kd_losses and self.teacher_instruction is not None:
            raise ValueError(
                "teacher_instruction is set and kd_losses has states, for which the teacher reads the student's "
                "tokens: leave one out"
            )
        applies_to = {
            "layer_map": "states", "states_error": "states", "teacher_temperature": "scores",
            "similarity_temperature": "similarities", "embedding_distance": "embeddings",
        }  # fmt: skip
        for name, loss in applies_to.items():
            if getattr(self, name) is not None and loss not in self.kd_losses:
                raise ValueError(f"{name} is {getattr(self, name)} and kd_losses has no {loss} for it to apply to")

    @property
    def needs_negatives(self) -> bool:
        return self.contrastive_weight > 0 or "scores" in self.kd_losses

    def check_texts(self, num_negatives: int) -> None:
        """Raises a `ValueError` if a batch has two texts and only their similarity to teach: the loss would be 0."""
        alone = self.kd_losses == ["similarities"] and self.contrastive_weight == 0
        if alone and self.batch_rows < 2 and num_negatives == 0:
            raise ValueError(
                "a batch has one row and num_negatives is 0, so its two texts have nothing but each other for "
                "similarities to compare and nothing would be learned; raise batch_size or num_negatives"
            )
