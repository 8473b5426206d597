"""Two real training steps on the tiny checkpoint: what moves, what is saved, what is logged."""

import errno
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import set_seed

from nvembed import NVEmbedModel
from nvembed.eval.log_history import LOG_FILE
from nvembed.eval.run_mteb import MtebArguments, run
from nvembed.eval.tasks.local import read_tasks
from nvembed.texts_nvembed import format_instruction
from nvembed.train.adapter import add_adapter
from nvembed.train.arguments import DataArguments, ModelArguments, Stage1Arguments, Stage2Arguments
from nvembed.train.collator import TripletCollator
from nvembed.train.data.source import DatasetSource
from nvembed.train.run_stage import load_blend
from nvembed.train.run_stage import run_stage as train
from nvembed.train.trainer import EmbeddingTrainer
from tests.triplets import prepare, write_jsonl


ROOT = Path(__file__).parents[2]


def make_trainer(
    checkpoint, pairs_file, output_dir, arguments=Stage1Arguments, task=None, use_peft=True, dtype=None, **options
):
    model = NVEmbedModel.from_pretrained(checkpoint, dtype=dtype)
    defaults = {"max_steps": 2, "warmup_steps": 0, "weight_decay": 0.0, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    return EmbeddingTrainer(
        model=add_adapter(model, ModelArguments(use_peft=use_peft)),
        args=arguments(output_dir=str(output_dir), **(defaults | options)),
        train_dataset=prepare([DatasetSource(str(pairs_file))], num_negatives=2),
        eval_dataset=task,
        saved_dtype=None if use_peft else dtype,
        data_collator=TripletCollator(model.tokenizer, model.config, max_length=64, num_negatives=2),
    )


def test_spread_out_and_labels_change_the_loss(tmp_path, checkpoint, labelled):
    losses = {}
    for name, options in {
        "plain": {},
        "spread": {"spread_out_weight": 5.0},
        "labels": {"in_batch_negatives": "labels"},
    }.items():
        trainer = make_trainer(checkpoint, labelled, tmp_path / name, Stage2Arguments, max_steps=1, seed=1, **options)
        trainer.train()
        losses[name] = trainer.state.log_history[0]
        assert 1 <= losses[name]["effective_rank"] <= 8 * 2 and -1 <= losses[name]["mean_cosine"] <= 1
    plain, spread, labels = losses.values()
    assert spread["loss"] == pytest.approx(plain["loss"] + 5 * plain["spread_out"], abs=2e-3)
    assert labels["loss"] > plain["loss"], "more candidates"


@pytest.mark.parametrize("in_batch_negatives", ["false", "labels", "sets", "true"])
def test_the_loss_takes_the_negatives_that_were_asked_for(tmp_path, checkpoint, labelled, in_batch_negatives):
    """Against a loop over the batch's texts, of a set with classes and one without."""
    pairs = [{"query": f"why {i}", "positive": f"since {i // 2}", "negatives": [f"not {i}"]} for i in range(8)]
    sources = [DatasetSource(write_jsonl(tmp_path / "pairs.jsonl", pairs)), DatasetSource(str(labelled), name="labels")]
    options = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8, "max_steps": 1, "use_cpu": True}
    args = Stage2Arguments(**options, in_batch_negatives=in_batch_negatives)
    blend = load_blend(DataArguments(sources, num_negatives=1, instruction=""), args)
    model = NVEmbedModel.from_pretrained(checkpoint).eval()
    collate = TripletCollator(model.tokenizer, model.config, max_length=64, num_negatives=1)
    trainer = EmbeddingTrainer(model=model, args=args, train_dataset=blend, data_collator=collate)
    rows = [blend[i] for i in range(8)]
    assert len({row["dataset"] for row in rows}) == 2
    with torch.no_grad():
        loss = trainer.compute_loss(model, collate(rows))

    def embed(texts):
        return model.encode(texts, instruction=format_instruction(""), max_length=64).double()

    losses = []
    for row in rows:
        near = row["query"], row["positive"]
        positives = {other["positive"] for other in rows if other["query"] in near} | {row["query"]}
        others = [text for text in row["negatives"][:1] if text not in positives]
        for other in rows:
            is_other = other is not row and other["positive"] not in positives
            is_proven = is_other and other["dataset"] == row["dataset"] and row["class"] != other["class"]
            has_classes = row["dataset"] == "labels"
            is_taken = {"false": False, "labels": is_proven and has_classes, "sets": is_proven, "true": is_other}
            if is_taken[in_batch_negatives]:
                others.append(other["positive"])
            if in_batch_negatives == "true" and other is not row:
                others += [text for text in other["negatives"][:1] if text not in positives]
        similarity = embed([row["query"]]) @ embed([row["positive"], *others]).T
        losses.append(-(similarity / args.temperature).log_softmax(-1)[0, 0])
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize("arguments", [Stage1Arguments, Stage2Arguments])
@pytest.mark.parametrize("pooling_type", ["latent_attention", "self_attention", "mean", "eos"])
def test_two_steps_move_what_is_trained_and_nothing_else(tmp_path, init_args, pairs_file, arguments, pooling_type):
    from nvembed.train.init_checkpoint import main as init

    init(init_args(tmp_path / "base", pooling_type=pooling_type))
    trainer = make_trainer(tmp_path / "base", pairs_file, tmp_path / "out", arguments)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained
    kinds = {
        "lora" if "lora_" in name else "latent_attention_model" in name and "modules_to_save" in name
        for name in trained
    }
    has_weights = pooling_type in ("latent_attention", "self_attention")
    assert kinds == ({"lora", True} if has_weights else {"lora"}), "LoRA on the decoder, the pooling in full"
    lora = {name for name in trained if "lora_" in name}
    assert len(lora) == 3 * 7 * 2, "3 layers, 7 linear maps, A and B"


def test_merged_checkpoint_equals_the_adapter_model(tmp_path, checkpoint, pairs_file, sentences):
    trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out")
    untrained = NVEmbedModel.from_pretrained(checkpoint).encode(sentences)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    instruction = format_instruction("Complete")
    adapted = trainer.model.encode(sentences, instruction=instruction)
    assert (trainer.model.encode(sentences) - untrained).abs().max() > 1e-2, "training changed too little to compare"
    trainer.save_merged()
    merged = NVEmbedModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged.encode(sentences, instruction=instruction), adapted, atol=1e-5, rtol=0)
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    assert merged.state_dict().keys() == NVEmbedModel.from_pretrained(checkpoint).state_dict().keys()


def test_logs_and_evaluation(tmp_path, checkpoint, pairs_file, tasks_file):
    options = {"task": read_tasks(tasks_file), "eval_steps": 2}
    trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", **options)
    trainer.train()
    history = trainer.state.log_history
    training = [log for log in history if "loss" in log]
    assert len(training) == 2
    assert all(log["tokens_per_second"] > 0 and log["learning_rate"] > 0 for log in training)
    times = [log["time"] for log in history]
    assert times == sorted(times)
    assert [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()] == history
    (evaluation,) = [log for log in history if "eval_halves" in log]
    assert evaluation["step"] == 2
    trainer.save_merged()
    measured = run(MtebArguments(str(tmp_path / "out"), str(tmp_path / "scores"), tasks=[str(tasks_file)]))
    assert evaluation["eval_halves"] == evaluation["eval_average"] == measured["tasks"]["halves"]
    assert 0.3 < measured["average"] < 1
    again = trainer.evaluate(metric_key_prefix="test")
    assert again["test_halves"] == again["test_average"] == measured["average"]
    with pytest.raises(ValueError, match="measures the tasks that it was made with"):
        trainer.evaluate(read_tasks(tasks_file))


def test_evaluation_leaves_the_training_as_it_is(tmp_path, checkpoint, pairs_file, tasks_file, sentences):
    """mteb seeds every generator; LoRA's dropout would follow it."""
    embeddings = []
    for options in ({}, {"task": read_tasks(tasks_file), "eval_steps": 2}):
        set_seed(0)
        trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", max_steps=3, **options)
        trainer.train()
        embeddings.append(trainer.model.encode(sentences))
    assert torch.equal(*embeddings)
    measured = [log["step"] for log in trainer.state.log_history if "eval_halves" in log]
    assert measured == [2, 3], "what comes out is measured, too"


def test_accumulated_batches_equal_one(tmp_path, checkpoint, pairs_file, sentences):
    """Stage 2's loss is a mean over rows: two halves accumulated are the whole."""
    embeddings = []
    for rows, steps in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", Stage2Arguments, use_peft=False, **options)
        trainer.train()
        embeddings.append(trainer.model.encode(sentences))
    torch.testing.assert_close(*embeddings, atol=1e-4, rtol=0)


def test_settings_that_cannot_work_are_errors_before_training(tmp_path, checkpoint, pairs_file, tasks_file):
    with pytest.raises(ValueError, match="tasks to measure are given but no eval_steps"):
        make_trainer(checkpoint, pairs_file, tmp_path / "out", task=read_tasks(tasks_file))
    with pytest.raises(ValueError, match="mixed precision is off: set bf16: true"):
        make_trainer(checkpoint, pairs_file, tmp_path / "out", dtype=torch.bfloat16)


def test_a_folded_checkpoint_is_not_trained(tmp_path, model, pairs_file):
    model.fold_latent_attention().save_pretrained(tmp_path / "folded")
    with pytest.raises(ValueError, match="has a folded latent attention, .*train the unfolded checkpoint"):
        make_trainer(tmp_path / "folded", pairs_file, tmp_path / "out")


def test_training_lowers_the_loss(tmp_path, checkpoint, pairs_file):
    trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", max_steps=12, per_device_train_batch_size=8)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.5 * losses[0]


def test_all_weights_that_were_saved_on_the_way_are_merged_in_the_dtype_asked_for(tmp_path, checkpoint, pairs_file):
    """transformers writes the dtype at hand, fp32, into the config of the model that it saves."""
    options = {"use_peft": False, "dtype": torch.bfloat16, "bf16": True, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", **options)
    trainer.train()
    trainer.save_merged()
    assert NVEmbedModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_full_fine_tuning_needs_no_peft(tmp_path, checkpoint, pairs_file):
    trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", use_peft=False)
    trainer.train()
    trainer.save_merged()
    base, tuned = NVEmbedModel.from_pretrained(checkpoint), NVEmbedModel.from_pretrained(tmp_path / "out")
    assert tuned.dtype == torch.float32
    names = [n for n, p in base.named_parameters() if not torch.equal(p, tuned.get_parameter(n))]
    assert "embedding_model.layers.0.mlp.up_proj.weight" in names


def test_the_best_checkpoint_stays_and_is_loaded_at_the_end(
    tmp_path, checkpoint, pairs_file, tasks_file, sentences, monkeypatch
):
    options = {"task": read_tasks(tasks_file), "eval_steps": 1, "max_steps": 4, "save_strategy": "steps"}
    options |= {"save_steps": 1, "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": None}
    trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", **options)
    evaluate, embeddings = trainer.evaluate, {}

    def second_is_best(*args, **kwargs):
        embeddings[trainer.state.global_step] = trainer.model.encode(sentences)
        return evaluate(*args, **kwargs) | {"eval_average": float(trainer.state.global_step == 2)}

    monkeypatch.setattr(trainer, "evaluate", second_is_best)
    trainer.train()
    best = tmp_path / "out" / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best), "as a resumed run reads it"
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    torch.testing.assert_close(trainer.model.encode(sentences), embeddings[2], atol=1e-6, rtol=0)
    assert (embeddings[4] - embeddings[2]).abs().max() > 1e-3
    trainer.state.best_model_checkpoint = "begun/elsewhere/checkpoint-2"
    trainer.state.global_step = 5
    trainer._save_checkpoint(trainer.model, None)
    assert trainer.state.best_model_checkpoint == str(best) and best.is_dir()


def test_a_card_that_fails_costs_no_weights(tmp_path, checkpoint, pairs_file, caplog):
    trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", push_adapter=True)

    def fail(folder, is_adapter):
        raise KeyError("no such score")

    trainer.save_merged(fail)
    NVEmbedModel.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert caplog.text.count("saved without one") == 2 and "no such score" in caplog.text


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, checkpoint, pairs_file, monkeypatch):
    trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", save_strategy="steps", save_steps=1, max_steps=3)
    save = torch.save

    def full(thing, path, *args, **kwargs):
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"no space left for .*checkpoint-2; earlier .* the last is .*checkpoint-1$"):
        trainer.train()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-1", LOG_FILE}, "nothing half-written"
    monkeypatch.setattr(torch, "save", save)
    make_trainer(checkpoint, pairs_file, tmp_path / "out", max_steps=3).train(
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1")
    )


def test_too_few_triplets_are_an_error_before_training(tmp_path, checkpoint, pairs_file):
    with pytest.raises(ValueError, match="8 triplets do not fill one batch of 9"):
        make_trainer(checkpoint, pairs_file, tmp_path / "out", per_device_train_batch_size=9)


def test_paper_recipes_options_work_together(tmp_path, checkpoint, pairs_file, tasks_file, sentences):
    """bf16 base and autocast, gradient checkpointing, an evaluation on the way: merged back to bf16."""
    options = {"bf16": True, "gradient_checkpointing": True, "eval_steps": 1}
    trainer = make_trainer(
        checkpoint, pairs_file, tmp_path / "out", task=read_tasks(tasks_file), dtype=torch.bfloat16, **options
    )
    pooling = trainer.model.latent_attention_model
    assert {parameter.dtype for parameter in pooling.parameters()} == {torch.float32}
    trainer.train()
    assert trainer.model.get_base_model().embedding_model.gradient_checkpointing
    with torch.autocast("cpu", torch.bfloat16):
        adapted = trainer.model.encode(sentences)
    trainer.save_merged()
    merged = NVEmbedModel.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert torch.cosine_similarity(merged.encode(sentences), adapted).min() > 0.99


# --- Runs that would train nothing


@pytest.mark.parametrize(
    ("arguments", "rows", "words"),
    [
        (Stage2Arguments, 4, "num_negatives is 0 and in_batch_negatives is off"),
        (Stage1Arguments, 1, "num_negatives is 0 and a batch has one row"),
    ],
)
def test_settings_that_leave_no_negative_are_refused(tmp_path, checkpoint, pairs_file, arguments, rows, words):
    options = arguments(str(tmp_path / "out"), per_device_train_batch_size=rows, use_cpu=True, max_steps=1)
    data = DataArguments([str(pairs_file)], num_negatives=0)
    with pytest.raises(ValueError, match=words):
        train(ModelArguments(str(checkpoint)), data, options)
    assert not (tmp_path / "out").exists()


def test_a_run_without_negatives_stops_at_its_log_or_at_its_end(tmp_path, checkpoint, sentences):
    """Every row has the same query and positive, so the batch gives no negative either."""
    path = tmp_path / "same.jsonl"
    path.write_text((json.dumps({"query": sentences[0], "positive": sentences[1], "instruction": "x"}) + "\n") * 8)
    for logging_steps in (2, 50):
        trainer = make_trainer(checkpoint, path, tmp_path / "out", max_steps=4, logging_steps=logging_steps)
        with pytest.raises(ValueError, match=f"none of the last {8 if logging_steps == 2 else 16} rows had a negative"):
            trainer.train()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("train_sampling_strategy", "group_by_length"),
        ("use_liger_kernel", True),
        ("auto_find_batch_size", True),
        ("dataloader_drop_last", False),
        ("ignore_data_skip", True),
        ("per_device_eval_batch_size", 4),
        ("include_for_metrics", ["loss"]),
        ("enable_jit_checkpoint", True),
        ("hub_revision", "experiment"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option} is .*, which this training cannot do; leave it out"):
        Stage1Arguments(str(tmp_path), use_cpu=True, **{option: value})


@pytest.mark.parametrize("kind", ["logging", "save", "eval"])
def test_the_end_of_each_epoch_is_no_interval(tmp_path, kind):
    """A blend holds all epochs: `epoch` would be once, at the end."""
    with pytest.raises(ValueError, match=f"{kind}_strategy is epoch.*set it to steps, and {kind}_steps"):
        Stage1Arguments(str(tmp_path), use_cpu=True, **{f"{kind}_strategy": "epoch"})


def test_batches_are_not_split(tmp_path):
    with pytest.raises(ValueError, match="split_batches.*set batch_size"):
        Stage1Arguments(str(tmp_path), use_cpu=True, accelerator_config={"split_batches": True})


def test_a_run_of_epochs_ends_with_a_whole_update(tmp_path):
    """So that our count of its steps is the Trainer's, which a resume at the last one compares."""
    args = Stage1Arguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1.5
    )
    assert args.run_rows(31) == 40, "of 46.5 rows"
    assert args.run_rows(3) == 5, "too few for one update, which is said elsewhere"


def test_the_attention_cannot_be_chosen():
    with pytest.raises(ValueError, match="attn_implementation is 'eager', but the model chooses"):
        ModelArguments("x", attn_implementation="eager")
