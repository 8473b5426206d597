"""`transformers.Trainer` for triplets: contrastive loss, evaluation on local tasks, tokens/s in the log."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from functools import partial
from pathlib import Path

import torch
from mteb.abstasks import AbsTask
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from nvembed.eval.callback import LocalTasksCallback
from nvembed.eval.log_history import LogHistory
from nvembed.eval.sharding import is_sharded
from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.adapter import ADAPTER, is_quantized, merge_adapter, with_weights, write_adapter
from nvembed.train.arguments import StageArguments
from nvembed.train.checkpoints import add_card, write_checkpoint
from nvembed.train.compress.sparsity import check_pattern
from nvembed.train.data.blend import Blend
from nvembed.train.distillation import Distillation
from nvembed.train.gradient_cache import embed_and_observe
from nvembed.train.guard import BAD_BATCH, LossGuard
from nvembed.train.keep_zeros import KeepZeros
from nvembed.train.log import LogWindow
from nvembed.train.losses import matryoshka_contrast, matryoshka_spread_out
from nvembed.train.memory import ReturnFreedMemory
from nvembed.train.resume import FreshSettings, RunRecord


PARTIAL_CHECKPOINT = ".partial-checkpoint"


class CurrentIntervals(TrainerCallback):
    """Logs, saves and evaluates at the intervals of this run, not at those in the trainer state that a resume loads."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        state.compute_steps(args, state.max_steps)


class EmbeddingTrainer(Trainer):
    """Trains on batches of `TripletCollator`; `eval_dataset` is a list of local tasks (`nvembed.eval.tasks.local`).

    Args:
        eval_max_length: tokens of a text of these tasks, its instruction included.
        record: the run's settings, written into its checkpoints; None: nothing is written.
        distillation: what the student is compared with; None: the loss is the contrastive one alone.
        saved_dtype: of the merged checkpoint; None: the decoder's, as it is trained.

    Raises:
        ValueError: there are fewer triplets than one batch of all processes holds; an evaluation set is given without
            `eval_steps`; the decoder is bf16 and the training is not; a quantized decoder would be split over
            processes, or a pruned one trained under DeepSpeed.
    """

    def __init__(
        self,
        model: nn.Module,
        args: StageArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Sequence[AbsTask] | None = None,
        eval_max_length: int = 512,
        record: RunRecord | None = None,
        distillation: Distillation | None = None,
        saved_dtype: torch.dtype | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs,
    ):
        if isinstance(train_dataset, Blend):
            args = copy(args)
            args.num_train_epochs = 1.0  # a blend holds the whole run, all its epochs
        if eval_dataset is not None:  # first, so that later callbacks see its metrics
            callbacks = [LocalTasksCallback(eval_dataset, eval_max_length), *(callbacks or ())]
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, callbacks=callbacks, **kwargs
        )
        self.add_callback(ReturnFreedMemory())
        self.add_callback(CurrentIntervals())
        self.add_callback(LogHistory())
        if not isinstance(self.model, PeftModel) and self.model.config.is_sparse:
            self.add_callback(KeepZeros(self.model.embedding_model))
        self._record, self._distillation, self._saved_dtype = record, distillation, saved_dtype
        self._checkpoint_folder: str | None = None
        self._check_settings()
        self.model_accepts_loss_kwargs = False  # the loss is a mean over rows: accumulation divides it by steps
        self._window = LogWindow(
            self.model,
            self.args.device,
            self.args.false_negative_margin is not None,
            self.args.needs_negatives,
            self.args.batches_of_one_set,
        )
        self._guard = LossGuard()
        self._bad_batch = Path(self.args.output_dir, BAD_BATCH.format(self.args.process_index))

    def _check_settings(self) -> None:
        """Raises the `ValueError`s listed for the class."""
        if self.train_dataset is not None:
            self.args.check_fills_update(len(self.train_dataset))
        if self.eval_dataset is not None and self.args.eval_strategy == "no":
            raise ValueError("tasks to measure are given but no eval_steps: set eval_tasks and eval_steps, or none")
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        if len(dtypes) > 1 and not (self.args.bf16 or self.args.fp16):
            raise ValueError(
                f"the weights are of {dtypes} and mixed precision is off: set bf16: true, or dtype: float32"
            )
        if is_quantized(self.model) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "a base of 8 or 4 bit is not split over processes: use DDP (train/recipes/accelerate/ddp.yaml), or "
                "drop load_in_4bit and load_in_8bit"
            )
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if self.is_deepspeed_enabled and isinstance(base, NVEmbedModel) and base.config.is_sparse:
            raise ValueError(
                "a pruned checkpoint is not trained under DeepSpeed, which hides the weights that are to stay zero: "
                "use DDP or FSDP2 (train/recipes/accelerate/)"
            )
        if (
            getattr(self.model, "is_loaded_in_4bit", False)
            and self.eval_dataset is not None
            and self.args.device.type == "cpu"
        ):
            raise ValueError(
                "on a CPU, bitsandbytes rearranges weights of 4 bit when tasks are measured, and passes no gradients "
                "through them then: train without eval_tasks, or without load_in_4bit"
            )

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, Blend):  # already shuffled, in an order independent of the processes
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def _save_checkpoint(self, model, trial) -> None:
        """Writes `checkpoint-<step>` under another name and renames it, so that it is never half-written."""
        folder = Path(self.args.output_dir)
        unfinished = folder / PARTIAL_CHECKPOINT
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a run killed while writing
        self.accelerator.wait_for_everyone()
        try:
            self._checkpoint_folder = str(unfinished)
            super()._save_checkpoint(model, trial)
            best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.name == name or best.is_dir():  # its final name, whichever folder the run began in
                self.state.best_model_checkpoint = str(best)
                if self.is_world_process_zero():
                    self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
            if self._record is not None and self.is_world_process_zero():
                self._record.save(unfinished / name)
        except Exception as error:  # an OSError, or what safetensors and torch turn it into
            if shutil.disk_usage(folder).free > 2**20 and getattr(error, "errno", None) != errno.ENOSPC:
                raise
            shutil.rmtree(unfinished, ignore_errors=True)
            last = get_last_checkpoint(str(folder))
            raise OSError(
                errno.ENOSPC, f"no space left for {folder / name}; earlier checkpoints are whole, the last is {last}"
            ) from error
        finally:
            self._checkpoint_folder = None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(unfinished / name, folder / name)
            shutil.rmtree(unfinished)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        fresh = FreshSettings(self.optimizer, self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        fresh.give_back(self.optimizer, self.lr_scheduler)

    def _get_output_dir(self, trial) -> str:
        return self._checkpoint_folder or super()._get_output_dir(trial)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        distillation, parts = self._distillation, {}
        observe = None if distillation is None else distillation.observer(inputs)
        embeddings, observed = embed_and_observe(model, inputs["chunks"], observe)
        queries, passages = embeddings[inputs["query_index"]], embeddings[inputs["passage_index"]]
        query_ids, passage_ids, classes = inputs["query_ids"], inputs["passage_ids"], inputs["classes"]
        rows = matryoshka_contrast(
            queries,
            passages,
            self.args.matryoshka,
            query_ids,
            passage_ids,
            self.args.temperature,
            bool(self.args.in_batch_negatives),
            self.args.false_negative_margin,
            None if distillation is None else distillation.scores(inputs),
            classes if self.args.negatives_are_of_the_set else None,
        )
        loss = rows.losses.mean()
        if distillation is not None:
            parts = distillation.losses(inputs, embeddings, observed, rows)
            loss = self.args.contrastive_weight * loss + self.args.alpha * sum(parts.values())
        is_on = self.args.spread_out_weight > 0  # off, it is in the log alone
        with nullcontext() if is_on else torch.no_grad():
            prefixes = self.args.matryoshka if is_on else {}
            spread = matryoshka_spread_out(queries, passages[:, 0], prefixes, query_ids, passage_ids[:, 0], classes)
        if is_on:
            loss = loss + self.args.spread_out_weight * spread.penalty
        self._guard.check(loss.item(), inputs, rows, self._bad_batch, self.data_collator.tokenizer.decode)
        self._window.add(inputs, rows, spread, embeddings, parts)
        return (loss, {"embeddings": embeddings}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Main scores of the held-out tasks, measured by `LocalTasksCallback`; every process gets them.

        Raises:
            ValueError: the trainer was created without tasks, or `eval_dataset` is another set of tasks.
        """
        if self.eval_dataset is None or (eval_dataset is not None and eval_dataset is not self.eval_dataset):
            raise ValueError(
                "the trainer measures the tasks that it was made with: EmbeddingTrainer(eval_dataset=tasks)"
            )
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        metrics = {f"{metric_key_prefix}_{key.removeprefix('eval_')}": score for key, score in metrics.items()}
        self.log(metrics)
        self._window.leave_out(time.perf_counter() - start)  # tokens/s is of training alone
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._window.close()
        elif "train_loss" in logs:  # the end of training: drops the batches since the last log
            memory = self._window.close().get("peak_memory_gb")
            logs |= {} if memory is None else {"peak_memory_gb": memory}
        super().log(logs, start_time)

    def save_merged(self, write_card: Callable[[Path, bool], None] | None = None) -> None:
        """Writes the merged checkpoint to `output_dir` on the main process and, with `push_adapter`, the adapter, too.

        Args:
            write_card: called as `write_card(folder, is_adapter)` to write a model card; None: no cards.
        """
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"Merging into {self.args.output_dir}")
        model = self.accelerator.unwrap_model(self.model)
        if is_sharded(model):
            weights = self.accelerator.get_state_dict(self.model_wrapped)  # whole, on the main process
            model = with_weights(model, weights) if self.is_world_process_zero() else None
        if self.is_world_process_zero():
            if self.args.push_adapter:
                folder = Path(self.args.output_dir, ADAPTER)
                shutil.rmtree(folder, ignore_errors=True)  # left by a run killed here
                write_adapter(model, folder)
                add_card(folder, write_card and partial(write_card, is_adapter=True))
            card = write_card and partial(write_card, is_adapter=False)
            merged = merge_adapter(model, self._saved_dtype)
            check_pattern(merged.embedding_model, merged.config.pruning)
            write_checkpoint(merged, self.args.output_dir, card)
        self.accelerator.wait_for_everyone()
