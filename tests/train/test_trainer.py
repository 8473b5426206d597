"""Two real training steps on the tiny checkpoint: what moves, what is saved, what is logged."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
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


@pytest.fixture
def pairs_file(tmp_path, sentences):
    """Each sentence's first half finds its second."""
    path = tmp_path / "pairs.jsonl"
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in sentences]
    path.write_text(
        "".join(json.dumps({"query": q, "positive": p, "instruction": "Complete"}) + "\n" for q, p in halves)
    )
    return path


@pytest.fixture
def tasks_file(tmp_path, sentences):
    """Each sentence's first half finds its second."""
    folder = tmp_path / "halves"
    (folder / "qrels").mkdir(parents=True)
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in sentences]
    for name, side in (("queries", 0), ("corpus", 1)):
        rows = [json.dumps({"_id": str(i), "text": pair[side]}) for i, pair in enumerate(halves)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (folder / "qrels" / "test.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(len(halves))))
    file = tmp_path / "tasks.yaml"
    file.write_text("tasks: [{type: Retrieval, path: halves, instruction: Complete}]")
    return file


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
        positives = {other["positive"] for other in rows if other["query"] == row["query"]} | {row["query"]}
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


def test_full_fine_tuning_needs_no_peft(tmp_path, checkpoint, pairs_file):
    trainer = make_trainer(checkpoint, pairs_file, tmp_path / "out", use_peft=False)
    trainer.train()
    trainer.save_merged()
    base, tuned = NVEmbedModel.from_pretrained(checkpoint), NVEmbedModel.from_pretrained(tmp_path / "out")
    names = [n for n, p in base.named_parameters() if not torch.equal(p, tuned.get_parameter(n))]
    assert "embedding_model.layers.0.mlp.up_proj.weight" in names


ACCELERATE = ["accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
TORCHRUN = [
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node=2",
]  # accelerate starts CPU processes by MPI only


def run_stage(launcher, script, checkpoint, pairs_file, output_dir, *options, environment=None, timeout=300):
    arguments = ["--model_name_or_path", checkpoint, "--datasets", pairs_file, "--output_dir", output_dir]
    arguments += ["--max_steps=2", "--warmup_steps=0", "--num_negatives=2", "--logging_steps=1", "--use_cpu"]
    arguments += ["--learning_rate=1e-2", "--lora_dropout=0", *options]
    sharded = [ROOT / "tests" / "train" / "fsdp2_stage.py"] if environment else []
    command = [sys.executable, "-m", *launcher, *sharded, ROOT / "train" / script, *arguments]
    environment = os.environ | (environment or {})
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)


@pytest.mark.slow
def test_stages_run_from_the_command_line(tmp_path, checkpoint, pairs_file, sentences):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_length: 64\nper_device_train_batch_size: 4\n")
    stage1 = run_stage(ACCELERATE, "stage1.py", checkpoint, pairs_file, tmp_path / "one", "--config", recipe)
    assert stage1.returncode == 0, stage1.stderr
    stage2 = run_stage(ACCELERATE, "stage2.py", tmp_path / "one", pairs_file, tmp_path / "two", "--config", recipe)
    assert stage2.returncode == 0, stage2.stderr
    assert NVEmbedModel.from_pretrained(tmp_path / "two").encode(sentences).isfinite().all()

    again = run_stage(ACCELERATE, "stage1.py", checkpoint, pairs_file, tmp_path / "one", "--config", recipe)
    assert again.returncode != 0
    assert "already holds a checkpoint" in again.stderr


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, checkpoint, pairs_file, tasks_file, sentences):
    """DDP on gloo with half the batch each: the same weights and scores after two steps as one with the whole."""
    scores = {}
    for name, launcher, options in (
        ("one", ACCELERATE, ["--per_device_train_batch_size=8"]),
        ("two", TORCHRUN, ["--per_device_train_batch_size=4", "--ddp_backend=gloo"]),
    ):
        options += ["--eval_tasks", tasks_file, "--eval_names", "halves", "--eval_steps=1", "--disable_tqdm=true"]
        result = run_stage(launcher, "stage1.py", checkpoint, pairs_file, tmp_path / name, *options)
        assert result.returncode == 0, result.stderr
        scores[name] = re.findall(r"'eval_halves': '?([0-9.]+)", result.stdout)
    assert len(scores["one"]) == 2
    assert scores["one"] == scores["two"], "measured after each step, logged once"
    one, two = (NVEmbedModel.from_pretrained(tmp_path / name).encode(sentences) for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=0)
    assert (one - NVEmbedModel.from_pretrained(checkpoint).encode(sentences)).abs().max() > 1e-2


@pytest.fixture
def many_pairs(tmp_path, sentences):
    rows = [
        {"query": f"{a[:15]} {b[:15]}", "positive": f"{b} {a[:9]}", "instruction": "Complete"}
        for a in sentences
        for b in sentences
    ]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def fsdp2_environment() -> dict[str, str]:
    """What `accelerate launch --config_file train/recipes/accelerate/fsdp2.yaml` sets; it starts no CPU processes."""
    settings = yaml.safe_load((ROOT / "train" / "recipes" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    settings["fsdp_transformer_cls_to_wrap"] = settings.pop("fsdp_transformer_layer_cls_to_wrap")
    return {"ACCELERATE_USE_FSDP": "true"} | {
        name.upper(): str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()
    }


FSDP2 = fsdp2_environment()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["stage1.py", "stage2.py"])
def test_loss_curve_is_the_same_in_one_process_two_and_sharded(tmp_path, checkpoint, many_pairs, sentences, script):
    """20 steps of the same batches of 8: one process, DDP, FSDP2, and one that accumulates or caches."""
    in_parts = ["--gradient_accumulation_steps=2"] if script == "stage2.py" else ["--chunk_tokens=50"]
    curves = {}
    for name, launcher, environment, options in (
        ("one", ACCELERATE, {}, []),
        ("in parts", ACCELERATE, {}, in_parts),
        ("ddp", TORCHRUN, {}, ["--ddp_backend=gloo", "--chunk_tokens=100"]),
        ("fsdp2", TORCHRUN, FSDP2, ["--ddp_backend=gloo", "--chunk_tokens=100"]),
    ):
        options += ["--batch_size=8", "--max_steps=20", "--learning_rate=3e-3", "--disable_tqdm=true"]
        options += ["--report_to=none", "--log_level=error"]
        result = run_stage(launcher, script, checkpoint, many_pairs, tmp_path / name, *options, environment=environment)
        assert result.returncode == 0, (name, result.stderr)
        logs = [line for line in result.stdout.splitlines() if "'loss'" in line]
        curves[name] = [float(re.search(r"'loss': '?([0-9.]+)", line)[1]) for line in logs]
        assert len(curves[name]) == 20
    assert curves["one"][-1] < 0.9 * curves["one"][0], "it learns"
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["one"], abs=1.01e-4), name  # logged with four digits
    one = NVEmbedModel.from_pretrained(tmp_path / "one").encode(sentences)
    for name in curves:
        other = NVEmbedModel.from_pretrained(tmp_path / name).encode(sentences)
        torch.testing.assert_close(other, one, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_sharded_training_resumes(tmp_path, checkpoint, many_pairs, sentences):
    """Stopped after 3 of 6 steps, in two processes with the weights in shards, it ends where an unbroken one does."""
    options = ["--ddp_backend=gloo", "--batch_size=8", "--disable_tqdm=true", "--report_to=none"]
    options += ["--lr_scheduler_type=constant", "--save_strategy=steps", "--save_steps=3", "--max_steps=6"]
    whole = run_stage(TORCHRUN, "stage1.py", checkpoint, many_pairs, tmp_path / "a", *options, environment=FSDP2)
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "a" / "checkpoint-3").is_dir()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    resumed = run_stage(
        TORCHRUN, "stage1.py", checkpoint, many_pairs, tmp_path / "b", *options, "--resume_from_checkpoint=true",
        environment=FSDP2,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    a, b = (NVEmbedModel.from_pretrained(tmp_path / name).encode(sentences) for name in "ab")
    torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
    assert len(re.findall("'loss'", resumed.stdout)) == 3


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


@pytest.mark.slow
def test_a_failing_process_ends_all_with_its_error(tmp_path, checkpoint, many_pairs):
    """The second process finds its weights broken; the first waits for it in the gathering of the embeddings."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        """
import os, sys
from nvembed.train import run_stage
from nvembed.train.arguments import DataArguments, ModelArguments, Stage1Arguments
from nvembed.train.recipe import RecipeParser

if os.environ["RANK"] == "1":
    compute_loss = run_stage.EmbeddingTrainer.compute_loss
    def broken(self, model, inputs, **options):
        if self.state.global_step == 2:
            inputs["query_ids"] = None
        return compute_loss(self, model, inputs, **options)
    run_stage.EmbeddingTrainer.compute_loss = broken
run_stage.run_stage(*RecipeParser(ModelArguments, DataArguments, Stage1Arguments).parse_args_and_config())
"""
    )
    options = ["--ddp_backend=gloo", "--batch_size=8", "--max_steps=20", "--disable_tqdm=true", "--report_to=none"]
    result = run_stage(TORCHRUN, worker, checkpoint, many_pairs, tmp_path / "out", *options, timeout=120)
    assert result.returncode != 0
    assert "[rank1]" in result.stderr and "Error" in result.stderr
    assert not (tmp_path / "out" / "config.json").exists()


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
    ],
)
def test_options_without_effect_are_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option} is .*, which this training cannot do; leave it out"):
        Stage1Arguments(str(tmp_path), use_cpu=True, **{option: value})


def test_the_attention_cannot_be_chosen():
    with pytest.raises(ValueError, match="attn_implementation is 'eager', but the model chooses"):
        ModelArguments("x", attn_implementation="eager")
