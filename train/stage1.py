"""Stage 1: contrastive instruction tuning on retrieval data, in-batch and hard negatives (paper section 3.3).

accelerate launch train/stage1.py --config train/recipes/quickstart-stage1.yaml --output_dir runs/stage1
"""

from pathlib import Path

from transformers import set_seed
from trl import get_quantization_config

from nvembed.eval.local_tasks import read_tasks
from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.adapter import add_adapter
from nvembed.train.arguments import (
    DataArguments,
    ModelArguments,
    RecipeParser,
    Stage1Arguments,
    StageArguments,
    check_negatives,
    settings_of,
)
from nvembed.train.card import describe_run, write_card
from nvembed.train.checkpoints import check_output_dir
from nvembed.train.collator import TripletCollator
from nvembed.train.data.registry import load_blend, provenance
from nvembed.train.hub import check_push, push_folder, repositories
from nvembed.train.memory import limit_primitive_cache
from nvembed.train.resume import APPLIED, REFUSED, RunRecord, check_resume, digest_weights, find_resume, resume_record
from nvembed.train.trainer import ADAPTER, EmbeddingTrainer


def main(model_args: ModelArguments, data_args: DataArguments, training_args: StageArguments) -> None:
    limit_primitive_cache()
    check_output_dir(training_args.output_dir)
    check_negatives(data_args, training_args)
    check_push(training_args, model_args)
    settings = settings_of(model_args, data_args, training_args)
    resume = find_resume(training_args.output_dir, training_args.resume_from_checkpoint)
    held_out = None
    if data_args.eval_tasks is not None:
        held_out = read_tasks(data_args.eval_tasks, data_args.eval_names)
    set_seed(training_args.seed)  # LoRA's first weights are drawn before the Trainer sets it
    model = NVEmbedModel.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(model_args),
    )
    kept = {name: settings[name] for name in (*APPLIED, *REFUSED) if name in settings}
    base = digest_weights(model) if model_args.use_peft else None  # else the checkpoint holds all weights
    adapted = add_adapter(model, model_args)
    if resume is not None:
        check_resume(resume, adapted)
    triplets = load_blend(training_args, data_args.datasets, data_args.num_negatives, data_args.instruction)
    record = RunRecord(kept, base, provenance(training_args.output_dir))
    if resume is not None:
        steps = len(triplets) // settings["batch_size"]
        record = resume_record(resume, record, steps, is_deepspeed=training_args.deepspeed_plugin is not None)

    trainer = EmbeddingTrainer(
        model=adapted,
        args=training_args,
        train_dataset=triplets,
        eval_dataset=held_out,
        eval_max_length=data_args.max_length,
        record=record,
        data_collator=TripletCollator(
            model.tokenizer, model.config, data_args.max_length, data_args.num_negatives, data_args.chunk_tokens
        ),
    )
    trainer.train(resume_from_checkpoint=resume)

    names = repositories(training_args) if trainer.is_world_process_zero() else {}  # others push nothing
    model_name, adapter_name = names.get("model", training_args.output_dir), names.get("adapter", "")

    def card(folder: Path, name: str, adapter: bool = False) -> None:
        saved = trainer.state.best_global_step if training_args.load_best_model_at_end else None
        run = describe_run(
            settings, record, data_args, training_args, triplets, trainer.state.log_history, held_out, saved
        )
        write_card(folder, run, name, adapter)

    trainer.save_merged(
        lambda folder: card(folder, model_name), lambda folder: card(folder, adapter_name, adapter=True)
    )
    for kind, name in names.items():
        folder = Path(training_args.output_dir, ADAPTER if kind == "adapter" else "")
        trainer.accelerator.print(f"Pushed to {push_folder(folder, name, training_args)}")


if __name__ == "__main__":
    main(*RecipeParser(ModelArguments, DataArguments, Stage1Arguments).parse_args_and_config())
