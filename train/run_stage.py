"""What the two stages share: read the recipe, prepare model and data, train, save, push."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers import set_seed
from transformers.utils.logging import get_logger
from trl import get_quantization_config

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.eval.tasks.local import read_tasks
from nvembed.eval.training_data import read_training_data
from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.adapter import add_adapter
from nvembed.train.arguments import (
    DataArguments,
    ModelArguments,
    StageArguments,
    check_negatives,
    settings_of,
)
from nvembed.train.card import describe_run, write_card
from nvembed.train.certificate import certify, with_teacher, write_certificate
from nvembed.train.checkpoints import alone_in, check_output_dir
from nvembed.train.collator import TripletCollator
from nvembed.train.data.blend import Blend
from nvembed.train.data.prepared import (
    are_told_apart_by_positives,
    check_apart,
    check_have_classes,
    check_have_negatives,
    check_have_scores,
    read_provenance,
    read_tables,
    with_positives_as_classes,
    write_tables,
)
from nvembed.train.data.source import check_exists, check_sources
from nvembed.train.distill_arguments import DistillArguments
from nvembed.train.distillation import prepare_distillation
from nvembed.train.hub import check_push, push
from nvembed.train.memory import limit_primitive_cache
from nvembed.train.recipe import RecipeParser
from nvembed.train.resume import APPLIED, REFUSED, RunRecord, check_resume, digest_weights, find_resume, resume_record
from nvembed.train.teacher import EmbeddingTeacher, TeacherCache, texts_of_run
from nvembed.train.trainer import EmbeddingTrainer


logger = get_logger(__name__)


def main(stage: type[StageArguments]) -> None:
    """Runs a stage with the settings from the command line and from the recipe named there."""
    run_stage(*RecipeParser(ModelArguments, DataArguments, stage).parse_args_and_config())


def run_stage(model_args: ModelArguments, data_args: DataArguments, training_args: StageArguments) -> None:
    """Trains one stage and writes its merged checkpoint to `output_dir`; what can fail early fails before training."""
    check_output_dir(training_args.output_dir)
    is_main = training_args.process_index == 0  # the others are of the same run
    with alone_in(training_args.output_dir, "training") if is_main else nullcontext():
        _run_stage(model_args, data_args, training_args)


def _run_stage(model_args: ModelArguments, data_args: DataArguments, training_args: StageArguments) -> None:
    limit_primitive_cache()
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing; give --model_name_or_path, or name it in the recipe")
    check_negatives(data_args, training_args)
    if isinstance(training_args, DistillArguments):
        training_args.check_texts(data_args.num_negatives)
    check_sources(data_args.datasets)
    if training_args.process_index == 0:  # the others read what it makes of them
        for source in data_args.datasets:
            check_exists(source)
            if source.decontaminate is not None:  # of paper.yaml
                logger.warning(
                    f"{source.name} is read as it is, not compared with the test sets that paper.yaml names: "
                    "train/build_data.py does that"
                )
    read_training_data(model_args.model_name_or_path, model_args.model_revision)  # a damaged one is an error now
    repositories = check_push(training_args, model_args)
    settings = settings_of(model_args, data_args, training_args)
    resume = find_resume(training_args.output_dir, training_args.resume_from_checkpoint)
    tasks = None
    if data_args.eval_tasks is not None:
        tasks = read_tasks(data_args.eval_tasks, data_args.eval_names)
    set_seed(training_args.seed)  # LoRA's first weights are drawn before the Trainer sets it
    model = NVEmbedModel.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(model_args),
    )
    if model_args.is_mask_instruction is not None:
        check_instruction_mask(model_args, model.config, training_args)
        model.config.is_mask_instruction = model_args.is_mask_instruction
    distillation, width = None, model.config.hidden_size
    if isinstance(training_args, DistillArguments):
        distillation = prepare_distillation(training_args, model, data_args.max_length)
    check_prefixes(training_args, model.config)
    if training_args.push_adapter:
        check_adapter_fits(model_args, model.config, width)
    base = digest_weights(model)
    saved_dtype = None if model_args.use_peft else model.dtype  # which add_adapter changes
    adapted = add_adapter(model, model_args)
    if resume is not None:
        check_resume(resume, adapted)
    blend = load_blend(data_args, training_args)
    collator = TripletCollator(
        model.tokenizer,
        model.config,
        data_args.max_length,
        data_args.num_negatives,
        data_args.chunk_tokens,
        training_args.false_negative_margin,
    )
    if distillation is not None and training_args.teacher_cache is not None:
        read_teacher_cache(distillation.teacher, blend, collator, training_args)
    kept = {name: settings[name] for name in (*APPLIED, *REFUSED) if name in settings}
    record = RunRecord(kept, base, read_provenance(training_args.triplets_dir))
    if resume is not None:
        steps = len(blend) // training_args.update_rows
        record = resume_record(resume, record, steps, is_deepspeed=training_args.deepspeed_plugin is not None)

    trainer = EmbeddingTrainer(
        model=adapted,
        args=training_args,
        train_dataset=blend,
        eval_dataset=tasks,
        eval_max_length=data_args.max_length,
        record=record,
        distillation=distillation,
        saved_dtype=saved_dtype,
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step < trainer.state.max_steps:  # the Trainer returns as if it were done
        raise RuntimeError(
            f"training ended at step {trainer.state.global_step} of {trainer.state.max_steps}, so no model is written; "
            "the log says why, and checkpoints, if there are any, are for --resume_from_checkpoint true"
        )

    def write_cards(folder: Path, is_adapter: bool) -> None:
        made_of = read_provenance(training_args.triplets_dir)
        base = settings["model_name_or_path"]
        samples = blend.samples(trainer.state.global_step * training_args.update_rows)
        revision = model_args.model_revision
        certificate = certify(training_args.stage, base, data_args.datasets, made_of, blend, samples, revision)
        if distillation is not None:
            certificate = with_teacher(certificate, training_args.teacher, training_args.teacher_revision)
        write_certificate(folder, certificate)
        run = describe_run(settings, record, data_args, training_args, blend, trainer.state, tasks, certificate)
        name = repositories.get("adapter" if is_adapter else "model", training_args.output_dir)
        write_card(folder, run, name, is_adapter)

    trainer.save_merged(write_cards)
    for address in push(repositories, training_args):
        print(f"Pushed to {address}")


def check_instruction_mask(model_args: ModelArguments, config: NVEmbedConfig, training_args: StageArguments) -> None:
    """Raises a `ValueError` if an adapter is pushed whose base pools other tokens than the adapter is trained with."""
    if training_args.push_adapter and model_args.is_mask_instruction != config.is_mask_instruction:
        raise ValueError(
            f"is_mask_instruction is {model_args.is_mask_instruction} and {config.is_mask_instruction} in "
            f"{model_args.model_name_or_path}, by whose config an adapter is loaded: leave out push_adapter, or make "
            "the base with init_checkpoint.py --is_mask_instruction false"
        )


def check_prefixes(training_args: StageArguments, config: NVEmbedConfig) -> None:
    """Raises a `ValueError` if a prefix is longer than the embeddings."""
    for width in training_args.matryoshka:
        if width >= config.hidden_size:
            raise ValueError(
                f"matryoshka_dims has {width} and the embeddings have {config.hidden_size} dimensions, which are "
                "trained in any case: give numbers below"
            )


def check_adapter_fits(model_args: ModelArguments, config: NVEmbedConfig, width: int) -> None:
    """Raises a `ValueError` if an adapter would be loaded on a base that it does not fit.

    Args:
        width: of the base's embeddings.
    """
    base, way_out = model_args.model_name_or_path, "leave push_adapter out; the merged checkpoint is complete"
    if config.is_sparse:
        raise ValueError(
            f"push_adapter: {base} is pruned, and others would load an adapter of it without its zeros: {way_out}"
        )
    if config.hidden_size != width:
        raise ValueError(
            f"push_adapter: a projection makes embeddings of the teacher's {config.hidden_size} dimensions, and "
            f"{base}, on which others would load the adapter, has none: {way_out}"
        )
    if model_args.model_revision not in (None, "main"):
        raise ValueError(
            f"push_adapter: others would load the adapter on {base} as it is now, and it is trained on revision "
            f"{model_args.model_revision}: {way_out}"
        )


def read_teacher_cache(
    teacher: EmbeddingTeacher, blend: Blend, collator: TripletCollator, training_args: DistillArguments
) -> None:
    """Has the teacher read its embeddings from `teacher_cache`, which the main process fills.

    Raises:
        ValueError: as `TeacherCache`.
        TimeoutError: the main process took longer than `ddp_timeout`, its wait for another run that fills the folder
            included.
    """
    with after_main_process(training_args, "the teacher's embeddings"):
        cache = TeacherCache(Path(training_args.teacher_cache), teacher.settings)
        if training_args.process_index == 0:
            cache.fill(teacher, texts_of_run(blend, collator))
        teacher.cache = cache


def load_blend(data_args: DataArguments, training_args: StageArguments) -> Blend:
    """The triplets of the whole run, blended, from tables in `output_dir`/triplets that the main process writes.

    They are made once: a restart with the same settings and files reads them again. Mining can take longer than the
    other processes wait: raise `ddp_timeout`, or mine beforehand.

    Raises:
        FileNotFoundError: `output_dir` is not on a disk that this process's machine shares with the main process's.
        TimeoutError: the main process took longer than `ddp_timeout`.
        ValueError: as `write_tables`; there are fewer triplets than one update takes; a data set has no negatives and
            its rows get none from their batch; `false_negative_margin` has nothing to compare.
    """
    sources = data_args.datasets
    folder, seed = training_args.triplets_dir, training_args.order_seed
    with after_main_process(training_args):
        if training_args.process_index == 0:
            options = (data_args.num_negatives, seed, data_args.instruction)
            write_tables(folder, sources, *options, training_args.checkpoints)
        tables = read_tables(folder, sources)
    in_batch_negatives, rows = training_args.in_batch_negatives, training_args.batch_rows
    if in_batch_negatives == "labels" and rows > 1:
        check_have_classes(tables)
    if training_args.false_negative_margin is not None and not in_batch_negatives:
        check_have_scores(tables)
    if training_args.needs_negatives:
        weights = data_args.weights or [len(table) for table in tables]
        is_divided = training_args.negatives_are_of_the_set and not training_args.batches_of_one_set
        for table, source, weight in zip(tables, sources, weights, strict=True):
            rows_of_set = rows * weight / sum(weights) if is_divided else rows
            check_have_negatives(table, source, data_args.num_negatives, in_batch_negatives, rows_of_set)
    if in_batch_negatives == "sets":
        check_apart(tables)
        by_positives = [are_told_apart_by_positives(*pair) for pair in zip(tables, sources, strict=True)]
        names = ", ".join(source.name for source, is_so in zip(sources, by_positives) if is_so) or "no set"
        logger.info(f"in_batch_negatives is sets: rows of {names} are told apart by positives")
        tables = [with_positives_as_classes(table) if is_so else table for table, is_so in zip(tables, by_positives)]
    triplets = sum(map(len, tables))
    training_args.check_fills_update(triplets)
    together = training_args.update_rows if training_args.batches_of_one_set else 1
    return Blend(tables, training_args.run_rows(triplets), data_args.weights, seed, together)


@contextmanager
def after_main_process(training_args: StageArguments, what: str = "the triplets") -> Iterator[None]:
    """Runs the body, which makes `what`, on the main process first, then on the others.

    Raises:
        TimeoutError: on these, once they have waited too long.
    """
    advice = (
        f"The other processes wait ddp_timeout = {training_args.ddp_timeout} s for {what}, and the run ends if "
        "reading, mining and a teacher's embedding take longer: raise --ddp_timeout then, or mine beforehand "
        "(train/data/mine_negatives.py)."
    )
    if training_args.world_size > 1 and training_args.process_index == 0:
        logger.warning(advice)
    entered = False
    try:
        with training_args.main_process_first(local=False, desc="loading triplets"):
            entered = True
            yield
    except RuntimeError as error:
        if entered:
            raise
        raise TimeoutError(f"the main process did not finish {what} ({error}). {advice}") from error
