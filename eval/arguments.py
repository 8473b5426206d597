"""Options that every script which measures a model shares."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import transformers
from accelerate import PartialState
from transformers import HfArgumentParser

from nvembed.eval.models import MAX_LENGTH, LoadedModel, load_model


@dataclass
class EvaluationArguments:
    """Options of every script that measures a model."""

    model: str = field(metadata={"help": "Checkpoint folder or Hub name; any sentence-transformers model, too."})
    output_dir: str = field(metadata={"help": "Folder for the results of this model; run again to resume."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    max_length: int = field(default=MAX_LENGTH, metadata={"help": "Tokens of a text with its instruction."})
    batch_tokens: int | None = field(default=None, metadata={"help": "Tokens of a batch; found by device if left out."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto: as in the checkpoint."}
    )
    instruct: bool = field(
        default=False, metadata={"help": "Give a sentence-transformers model the tasks' instructions, too."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "For sentence-transformers models with code of their own."}
    )

    def __post_init__(self):
        for name in ("max_length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be a number of tokens, 1 or more")

    def load(self, show_progress_bar: bool = True) -> LoadedModel:
        """As `load_model`; of several processes, the main one shows a progress bar."""
        options = {"instruct": self.instruct, "trust_remote_code": self.trust_remote_code}
        options |= {"show_progress_bar": show_progress_bar and PartialState().is_main_process}
        return load_model(self.model, self.revision, self.max_length, self.batch_tokens, self.dtype, **options)

    def settings(self, model: LoadedModel) -> dict:
        """What decides the scores, apart from the data."""
        settings = {"model": model.name, "revision": model.revision, "max_length": model.max_length}
        return settings | {"dtype": self.dtype, "instruct": self.instruct}


def run_script(name: str, arguments: type[EvaluationArguments], run: Callable[[Any], Any]) -> Any:
    """Runs `run` with the command line's arguments; errors in them, or in the data, are reported in one line."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    transformers.logging.set_verbosity_error()
    try:
        return run(*HfArgumentParser(arguments).parse_args_into_dataclasses())
    except (ValueError, ConnectionError) as error:
        sys.exit(f"{name}: {error}")
