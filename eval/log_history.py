"""The log of a training as a file, for timing (`eval/speed`) and for drawing curves."""

import json
import time
from pathlib import Path

from transformers import TrainerCallback


LOG_FILE = "log.jsonl"


class LogHistory(TrainerCallback):
    """Gives every entry of the Trainer's log a time and writes it to `output_dir`/log.jsonl, one entry a line.

    `time` is in seconds since 1970. A resumed run appends to the entries of its checkpoint.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(entry) + "\n" for entry in state.log_history)
            Path(args.output_dir, LOG_FILE).write_text("".join(lines), encoding="utf-8")

    def on_log(self, args, state, control, **kwargs) -> None:
        state.log_history[-1]["time"] = time.time()
        if state.is_world_process_zero:
            with Path(args.output_dir, LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")
