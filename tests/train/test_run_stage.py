"""The data of a run: blended, made once, and never exchanged under a checkpoint."""

import json
import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pyarrow as pa
import pytest
from datasets import Dataset

from nvembed.train.arguments import DataArguments, ModelArguments, Stage1Arguments, Stage2Arguments
from nvembed.train.data.source import DatasetSource
from nvembed.train.resume import find_resume
from nvembed.train.run_stage import after_main_process, load_blend, run_stage
from nvembed.train.trainer import CurrentIntervals
from tests.triplets import prepare, write_jsonl


def blend_of(tmp_path, sources, **options):
    arguments = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "use_cpu": True}
    arguments = Stage1Arguments(**(arguments | options))
    return load_blend(DataArguments(sources, num_negatives=1, instruction="all"), arguments), arguments


def test_checkpoints_keep_the_data_that_they_were_trained_on(tmp_path, labelled, monkeypatch):
    sources = [DatasetSource(str(labelled), name="labels")]
    table = tmp_path / "out" / "triplets" / "000.arrow"
    blend_of(tmp_path, sources)
    made = table.read_bytes()
    (tmp_path / "out" / "checkpoint-1").mkdir()
    os.utime(labelled / "train.jsonl", (0, 0))  # copied or touched, it is the same data
    monkeypatch.chdir(labelled)
    blend_of(tmp_path, [DatasetSource(".", name="labels")])
    for arguments, words in (
        ({"name": "others"}, "datasets were labels and are others"),
        ({"name": "labels", "samples": 5}, "labels: samples was None and is 5"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-1 was trained on other data: {words}; give what"):
            blend_of(tmp_path, [DatasetSource(str(labelled), **arguments)])
    with pytest.raises(ValueError, match="seed was 42 and is 1;"):
        blend_of(tmp_path, sources, data_seed=1)
    with (labelled / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a text of today", "label": "rate"}) + "\n")
    with pytest.raises(ValueError, match="labels: train.jsonl has changed; .* or name another --output_dir"):
        blend_of(tmp_path, sources)
    assert table.read_bytes() == made
    (tmp_path / "out" / "checkpoint-1").rmdir()
    blend_of(tmp_path, sources)
    assert b"a text of today" in table.read_bytes(), "edited, made anew"


def test_checkpoints_of_an_unfinished_run_are_not_overwritten(tmp_path):
    for folder in ("out", "other"):
        (tmp_path / folder / "checkpoint-2").mkdir(parents=True)
        (tmp_path / folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
        (tmp_path / folder / "checkpoint-2" / "optimizer.pt").touch()
    (tmp_path / "out" / "checkpoint-4").symlink_to(tmp_path / "other" / "checkpoint-2")
    out, elsewhere = str(tmp_path / "out"), str(tmp_path / "other" / "checkpoint-2")
    for value in (None, False, "false"):
        with pytest.raises(FileExistsError, match=r"out/checkpoint-4 belongs to .* --resume_from_checkpoint true"):
            find_resume(out, value)
    with pytest.raises(FileExistsError, match=r"out already holds checkpoint-4: .* start from .*other/checkpoint-2,"):
        find_resume(out, elsewhere)
    for name in ("checkpoint-2", "checkpoint-4"):
        assert find_resume(out, f"{out}/{name}") == f"{out}/{name}"
    assert find_resume(out, "true") == f"{out}/checkpoint-4"
    assert find_resume(str(tmp_path / "new"), elsewhere) == elsewhere
    assert find_resume(str(tmp_path / "new"), None) is None
    with pytest.raises(FileNotFoundError, match="new holds no checkpoint to resume from"):
        find_resume(str(tmp_path / "new"), "true")
    with pytest.raises(FileNotFoundError, match="other is no training checkpoint"):
        find_resume(out, str(tmp_path / "other"))
    (tmp_path / "other" / "checkpoint-2" / "optimizer.pt").unlink()
    for value in ("true", f"{out}/checkpoint-4"):
        with pytest.raises(FileNotFoundError, match="checkpoint-4 has no state of the optimizer.*save_only_model"):
            find_resume(out, value)
    (tmp_path / "other" / "checkpoint-2" / "global_step2").mkdir()  # DeepSpeed's
    assert find_resume(out, "true") == f"{out}/checkpoint-4"


def test_a_training_that_ended_early_writes_no_model(tmp_path, checkpoint, labelled, monkeypatch):
    """The Trainer returns as usual when a callback, or data that ran out, has stopped it."""

    def stop(callback, args, state, control, **kwargs):
        control.should_training_stop = True

    monkeypatch.setattr(CurrentIntervals, "on_step_end", stop)
    args = Stage1Arguments(
        str(tmp_path / "out"), use_cpu=True, max_steps=3, per_device_train_batch_size=4, report_to="none"
    )
    data = DataArguments([DatasetSource(str(labelled), name="labels")], num_negatives=1, instruction="all")
    with pytest.raises(ValueError, match="model_name_or_path is missing; give --model_name_or_path"):
        run_stage(ModelArguments(), data, args)
    with pytest.raises(RuntimeError, match="training ended at step 1 of 3, so no model is written"):
        run_stage(ModelArguments(str(checkpoint)), data, args)
    assert not (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / ".lock").exists()


def test_a_set_from_which_nothing_could_be_learned_is_refused(tmp_path):
    same = write_jsonl(tmp_path / "same.jsonl", [{"query": "q", "positive": "p"}] * 8)  # nothing to mine
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "per_device_train_batch_size": 4}
    sources = [DatasetSource(same, instruction="")]
    words = r"same.jsonl: none of its 8 triplets has a negative, .* nothing would be learned"
    with pytest.raises(ValueError, match=words):
        load_blend(DataArguments(sources, num_negatives=2), Stage2Arguments(**options))
    with pytest.raises(ValueError, match=words):
        load_blend(
            DataArguments(sources, num_negatives=2), Stage1Arguments(**(options | {"per_device_train_batch_size": 1}))
        )
    blend = load_blend(DataArguments(sources, num_negatives=2), Stage1Arguments(**(options | {"max_steps": 2})))
    assert len(blend) == 8, "in-batch negatives"


def test_tables_of_earlier_versions_are_made_anew_unless_a_run_has_begun(tmp_path, labelled):
    """They have no classes, without which labels would prove nothing."""
    source, options = DatasetSource(str(labelled), name="labels"), {"max_steps": 2}
    blend_of(tmp_path, [source], **options)
    table = tmp_path / "out" / "triplets" / "000.arrow"
    old = Dataset.from_file(str(table)).remove_columns("class")
    with pa.OSFile(str(table), "wb") as file, pa.ipc.new_stream(file, old.data.table.schema) as writer:
        writer.write_table(old.data.table)
    (tmp_path / "out" / "checkpoint-1").mkdir()
    blend, _ = blend_of(tmp_path, [source], **options)
    assert "class" not in blend[0], "what was trained on stays"
    with pytest.raises(ValueError, match="a run begun by an earlier version has none"):
        blend_of(tmp_path, [source], in_batch_negatives="labels", **options)
    (tmp_path / "out" / "checkpoint-1").rmdir()
    assert "class" in blend_of(tmp_path, [source], **options)[0][0]


def test_batches_of_one_set_are_of_one_set(tmp_path, labelled):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(12)])
    sources = [DatasetSource(str(labelled), name="labels"), DatasetSource(pairs, name="pairs")]
    for is_on, kinds in ((True, {1}), (False, {1, 2})):
        blend, _ = blend_of(tmp_path / str(is_on), sources, batches_of_one_set=is_on, max_steps=6)
        names = [row["dataset"] for row in blend]
        assert {len({*names[start : start + 4]}) for start in range(0, 24, 4)} <= kinds
        assert is_on or any(len({*names[start : start + 4]}) == 2 for start in range(0, 24, 4))


def test_labels_as_negatives_need_classes(tmp_path, labelled):
    """A set with classes needs no negatives of its own; one without any does, and a run has some classes."""
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 2}
    arguments = Stage2Arguments(**options, in_batch_negatives="labels")
    classes = DatasetSource(str(labelled), instruction="")
    blend = load_blend(DataArguments([classes], num_negatives=0), arguments)
    assert {row["class"] for row in blend} == {"card_lost", "card_new", "rate"}
    same = write_jsonl(tmp_path / "same.jsonl", [{"query": "q", "positive": "p"}] * 8)
    with pytest.raises(ValueError, match="in_batch_negatives is labels and none of the triplets has a class"):
        load_blend(DataArguments([DatasetSource(same, instruction="")], num_negatives=2), arguments)
    with pytest.raises(ValueError, match="same.jsonl: none of its 8 triplets has a negative"):
        load_blend(DataArguments([classes, DatasetSource(same, instruction="")], num_negatives=2), arguments)
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negatives": ["n"]} for i in range(8)]
    mined = DatasetSource(write_jsonl(tmp_path / "mined.jsonl", rows), instruction="")
    with pytest.raises(ValueError, match="mined.jsonl: num_negatives is 0, so none of its 8 triplets has a negative"):
        load_blend(DataArguments([classes, mined], num_negatives=0), arguments)


def test_texts_of_several_labels_are_not_told_apart_by_their_positives(tmp_path):
    """Two of them may share a label, and which is not known: no row is a sure negative."""
    rows = [{"text": f"text {i}", "label": f"{'abc'[i % 3]} {'xyz'[i % 3]}"} for i in range(12)]
    write_jsonl(tmp_path / "many" / "train.jsonl", rows)
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 2}
    source = DatasetSource(str(tmp_path / "many"), instruction="", label_separator=" ")
    blend = load_blend(DataArguments([source], num_negatives=1), Stage2Arguments(**options, in_batch_negatives="sets"))
    assert {row["class"] for row in blend} == {None}


def test_a_margin_with_nothing_to_compare_is_refused(tmp_path):
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 2}
    arguments = Stage2Arguments(**options, false_negative_margin=0.1)
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negatives": ["n"]} for i in range(8)]
    plain = DatasetSource(write_jsonl(tmp_path / "plain.jsonl", rows), instruction="")
    with pytest.raises(ValueError, match="false_negative_margin leaves out in-batch negatives, which are off"):
        load_blend(DataArguments([plain], num_negatives=1), arguments)
    half = [row | {"negative_scores": [0.1]} for row in rows]
    half = DatasetSource(write_jsonl(tmp_path / "half.jsonl", half), instruction="")
    with pytest.raises(ValueError, match="which no triplet has"):
        load_blend(DataArguments([half], num_negatives=1), arguments)
    rows = [row | {"positive_score": 0.9, "negative_scores": [0.1]} for row in rows]
    scored = DatasetSource(write_jsonl(tmp_path / "scored.jsonl", rows), instruction="")
    assert len(load_blend(DataArguments([plain, scored], num_negatives=1), arguments)) == 8


def test_sets_as_negatives_tell_rows_without_classes_apart_by_their_positives(tmp_path, labelled):
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "per_device_train_batch_size": 8, "max_steps": 3}
    arguments = Stage2Arguments(**options, in_batch_negatives="sets")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"query": f"q{i}", "positive": f"p{i // 2}"} for i in range(8)])
    sources = [DatasetSource(pairs, instruction=""), DatasetSource(str(labelled), name="labels", instruction="")]
    blend = load_blend(DataArguments(sources, num_negatives=0), arguments)
    classes = {name: {row["class"] for row in blend if row["dataset"] == name} for name in ("pairs", "labels")}
    assert classes == {"pairs": {"p0", "p1", "p2", "p3"}, "labels": {"card_lost", "card_new", "rate"}}
    assert all(row["class"] == row["positive"] for row in blend if row["dataset"] == "pairs")
    plain = load_blend(DataArguments(sources, num_negatives=0), Stage1Arguments(**options))
    assert [row["query"] for row in plain] == [row["query"] for row in blend]
    assert {row["class"] for row in plain if row["dataset"] == "pairs"} == {None}
    few = DatasetSource(pairs, instruction="", weight=0.2), DatasetSource(str(labelled), instruction="", weight=0.8)
    with pytest.raises(ValueError, match=r"none of its 8 triplets .* \(a batch has 1.6 rows of the set\)"):
        load_blend(DataArguments([*few], num_negatives=0), arguments)
    same = write_jsonl(tmp_path / "same.jsonl", [{"query": f"q{i}", "positive": "p"} for i in range(8)])
    with pytest.raises(ValueError, match="same.jsonl: num_negatives is 0, so none of its 8 triplets has a negative"):
        load_blend(DataArguments([DatasetSource(same, instruction="")], num_negatives=0), arguments)
    rows = [{"query": f"q{i}", "positive": f"p{i}", "dataset": "labels"} for i in range(8)]
    unlabelled = DatasetSource(write_jsonl(tmp_path / "more.jsonl", rows), instruction="")
    with pytest.raises(ValueError, match="of the data set 'labels' some files have classes and others none"):
        load_blend(DataArguments([sources[1], unlabelled], num_negatives=0), arguments)


def test_processes_that_wait_too_long_say_what_for(tmp_path, caplog):
    """By a stand-in for the timeout of the process group, which transformers sets on GPUs alone."""

    @contextmanager
    def main_process_first(local, desc):
        raise RuntimeError("Timed out waiting 3000ms for recv operation to complete")
        yield

    arguments = SimpleNamespace(ddp_timeout=3, world_size=2, process_index=0, main_process_first=main_process_first)
    with (
        pytest.raises(TimeoutError, match=r"did not finish the triplets .* raise --ddp_timeout"),
        after_main_process(arguments),
    ):
        pass
    (message,) = [record.message for record in caplog.records]
    assert "The other processes wait ddp_timeout = 3 s for the triplets" in message, "said before the wait"
    arguments.main_process_first = lambda local, desc: nullcontext()
    with pytest.raises(RuntimeError, match="of its own"), after_main_process(arguments):
        raise RuntimeError("of its own")


def by_texts(triplet: dict) -> list:
    return [triplet[column] for column in ("dataset", "query", "positive", "negatives", "instruction", "symmetric")]


def test_a_blend_lasts_the_run_and_is_made_once(tmp_path, labelled, beir):
    sources = [DatasetSource(str(labelled), name="labels"), DatasetSource(str(beir), name="papers")]
    triplets = prepare(sources, 1, seed=42, instruction="all").to_list()
    blend, arguments = blend_of(tmp_path, sources, num_train_epochs=2)
    assert arguments.num_train_epochs == 2, "nobody writes into the arguments"
    for epoch in (blend[i] for i in range(len(triplets))), (blend[len(triplets) + i] for i in range(len(triplets))):
        assert sorted(map(by_texts, epoch)) == sorted(map(by_texts, triplets))
    assert len(blend_of(tmp_path, sources, max_steps=7)[0]) == 28

    made = (tmp_path / "out" / "triplets" / "000.arrow").stat().st_mtime_ns
    blend_of(tmp_path, sources)
    assert (tmp_path / "out" / "triplets" / "000.arrow").stat().st_mtime_ns == made, "mining is not done twice"
    sources[0].samples = 1
    assert len(blend_of(tmp_path, sources, num_train_epochs=1)[0]) < len(triplets), "other settings, other tables"
    with pytest.raises(ValueError, match="triplets do not fill one batch of 400"):
        blend_of(tmp_path, sources, per_device_train_batch_size=100, gradient_accumulation_steps=4)
