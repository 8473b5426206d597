"""`build_data.py` over every family: counts, checks, interruptions, tasks, and what a training reads of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from nvembed import NVEmbedModel
from nvembed.eval import shards
from nvembed.eval.commands import cores
from nvembed.eval.files import claimed
from nvembed.texts_nvembed import format_instruction
from nvembed.train.build_data import BuildArguments, read_recipe, run
from nvembed.train.data.build_steps import checked
from nvembed.train.data.sets import as_source
from tests.triplets import prepare, write_jsonl


INSTRUCTION = "Given a question, retrieve"


@pytest.fixture
def recipe(tmp_path):
    """A recipe over retrieval, classification, label-based classification, STS and triplets, and a test set."""
    data = tmp_path / "data"
    documents = [{"_id": f"d{i}", "text": f"text {i} of topic{i % 5} and word{i}"} for i in range(30)]
    write_jsonl(data / "search" / "corpus.jsonl", documents)
    queries = [{"_id": f"q{i}", "text": f"what of topic{i % 5} word{i}"} for i in range(12)]
    write_jsonl(data / "search" / "queries.jsonl", [*queries, {"_id": "t", "text": "test question"}])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(12))]
    (data / "search" / "qrels").mkdir()
    (data / "search" / "qrels" / "train.tsv").write_text("\n".join([*lines, "q0\td5\t1"]))
    rows = [{"text": f"{label} text {i}", "label": label} for label in ("red", "green", "blue") for i in range(5)]
    write_jsonl(data / "classes" / "train.jsonl", [*rows, {"text": "alone", "label": "single"}])
    close = [{"sentence1": f"cat {i} sleeps", "sentence2": f"cat {i} is asleep", "score": 5} for i in range(4)]
    write_jsonl(data / "sts" / "train.jsonl", [*close, {"sentence1": "a dog", "sentence2": "a cow", "score": 1}])
    ready = [
        {"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i}", "CAT 0 sleeps!", f"p{i}"]} for i in range(3)
    ]
    write_jsonl(data / "ready.jsonl", ready)
    write_jsonl(data / "test" / "test.jsonl", [
        {"sentence1": "Cat 0 sleeps", "sentence2": "x y", "score": 1}, {"sentence1": "u", "sentence2": "v", "score": 2},
    ])  # fmt: skip
    (data / "tasks.yaml").write_text("tasks:\n  - {type: STS, path: test, name: asleep}\n")
    content = {
        "datasets": [
            {"path": "data/search", "mteb": ["NQ"]},
            {"path": "data/classes", "instruction": "Find the class", "samples": 12},
            {"path": "data/classes", "kind": "label_classification", "name": "labels"},
            {"path": "data/sts", "mteb": ["STS12"]},
            {"path": "data/ready.jsonl"},
        ],
        "instruction": INSTRUCTION,
        "num_negatives": 2,
        "decontaminate": {"against": ["data/tasks.yaml"]},
        "shard_rows": 5,
        "corpus_shard_rows": 12,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def change(recipe, **values):
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | values))


def build(recipe, folder, **options):
    return run(BuildArguments(recipe=str(recipe), output_dir=str(folder), **options))


def triplets_of(folder, manifest, name):
    return [row for file in manifest["sets"][name]["files"] for row in pq.read_table(folder / name / file).to_pylist()]


def test_counts_equal_those_of_each_familys_rule(recipe, tmp_path):
    manifest = build(recipe, tmp_path / "out")
    counts = {name: one["counts"] for name, one in manifest["sets"].items()}
    assert counts["search"]["pairs"] == {"rows": 13, "pairs": 13, "documents": 30}
    assert counts["classes"]["pairs"]["rows"] == 16
    assert counts["classes"]["pairs"]["pairs"] + counts["classes"]["pairs"].get("no other text in its class", 0) == 12
    assert counts["labels"]["pairs"] == {"rows": 16, "pairs": 16}
    assert counts["sts"]["pairs"] == {"rows": 5, "score below 4": 1, "pairs": 8, "documents": 10}
    assert counts["sts"]["decontaminate"] == {
        "contaminated pairs": 2, "query close to asleep (normalized)": 1, "positive close to asleep (normalized)": 1,
        "document close to asleep (normalized)": 1,
    }  # fmt: skip
    assert counts["sts"]["mine"]["triplets"] == 6
    assert counts["ready"]["decontaminate"] == {"negative close to asleep (normalized)": 3}
    assert counts["ready"]["pairs"]["negatives that are the query or a positive of it"] == 3
    assert counts["ready"]["mine"] == {"pairs": 3, "triplets": 3, "negatives": 3}
    assert manifest["sets"]["ready"]["decontaminate"][0]["against"] == ["tasks.yaml"]
    folder = tmp_path / "out"
    for name, one in manifest["sets"].items():
        rows = triplets_of(folder, manifest, name)
        assert len(rows) == one["counts"]["mine"]["triplets"] > 0
        assert sum(len(row["negatives"]) for row in rows) == one["counts"]["mine"]["negatives"]
        for row in rows:
            assert row["dataset"] == name
            assert row["instruction"] == ("Find the class" if name == "classes" else INSTRUCTION)
            assert not {row["query"], row["positive"]} & set(row["negatives"])
            assert "cat 0 sleeps" not in [text.lower().rstrip("!") for text in (row["query"], *row["negatives"])]
    page = (folder / "DATA.md").read_text()
    assert "| sts | sts | sts | STS12 | 5 | 8 | 6 | 2.00 |" in page
    assert page.count("- query: ") == 10, "two of every set"
    assert (folder / "dropped.png").stat().st_size > 5000


def test_one_set_alone_and_a_training_read_what_was_built(recipe, tmp_path):
    change(recipe, datasets=[{"set": "nfcorpus", "path": "data/search"}, {"path": "data/sts"}])
    manifest = build(recipe, tmp_path / "out", sets=["nfcorpus"])
    assert list(manifest["sets"]) == ["nfcorpus"]
    assert manifest["sets"]["nfcorpus"]["source"]["mteb"] == ["NFCorpus"]
    source = as_source({"set": "nfcorpus"}, str(tmp_path / "out"))
    read = prepare([source], 2).to_list()
    assert read == triplets_of(tmp_path / "out", manifest, "nfcorpus")
    own = {"datasets": [{"path": "data/ready.jsonl", "name": "mine"}], "teacher": None, "decontaminate": None}
    change(recipe, **own)
    manifest = build(recipe, tmp_path / "own")
    read = prepare([as_source({"set": "mine"}, str(tmp_path / "own"))], 2).to_list()
    assert read == triplets_of(tmp_path / "own", manifest, "mine")
    with pytest.raises(ValueError, match="'yours' is neither in data_dir .*own, which has mine, nor one of"):
        as_source({"set": "yours"}, str(tmp_path / "own"))
    with pytest.raises(ValueError, match="--sets 'nfc' is not in .*recipe.yaml; its sets are"):
        build(recipe, tmp_path / "out", sets=["nfc"])


def test_an_embedding_teacher_ranks_by_its_vectors(recipe, checkpoint, tmp_path):
    change(
        recipe,
        datasets=[
            {"path": "data/search"},
            {"path": "data/sts"},
            {"path": "data/sts", "name": "bare", "instruction": ""},
        ],
        teacher={"model": "an/other", "max_length": 64},
        mining={"last_rank": 10, "fill": False},
        decontaminate=None,
    )
    manifest = build(recipe, tmp_path / "out", teacher=str(checkpoint))
    model = NVEmbedModel.from_pretrained(checkpoint)
    prompt = format_instruction(INSTRUCTION)
    for name, on_queries, on_documents in (("search", prompt, ""), ("sts", prompt, prompt), ("bare", "", "")):
        rows = triplets_of(tmp_path / "out", manifest, name)
        assert any(row["negatives"] for row in rows)
        for row in rows:
            query = model.encode([row["query"]], on_queries, 64).numpy()[0].astype(np.float64)
            texts = [row["positive"], *row["negatives"]]
            scores = model.encode(texts, on_documents, 64).numpy().astype(np.float64) @ query
            np.testing.assert_allclose([row["positive_score"], *row["negative_scores"]], scores, atol=1e-5)
            assert (scores[1:] < scores[0] - 0.05 * abs(scores[0]) + 1e-6).all()
    (tmp_path / "out" / "search" / "train-00000-of-00003.parquet").unlink()
    with (tmp_path / "data" / "search" / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "new", "text": "one more"}) + "\n")
    with pytest.raises(ValueError, match="holds a build of something else: search: corpus.jsonl has changed"):
        build(recipe, tmp_path / "out", teacher=str(checkpoint))


def test_a_cross_encoder_scores_what_bm25_found(recipe, tmp_path):
    """A CrossEncoder of sentence-transformers, as it is saved; its scores anew by transformers alone."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "of", "text", "and"]
    words += [f"{name}{i}" for name in ("topic", "word") for i in range(30)] + [str(i) for i in range(30)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=32, num_labels=1, initializer_range=1.0),
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "cross")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "cross")
    change(
        recipe,
        datasets=[{"path": "data/search"}],
        teacher={"cross_encoder": str(tmp_path / "cross")},
        mining={"last_rank": 10, "fill": False, "max_ratio": 0.9},
        decontaminate=None,
    )
    manifest = build(recipe, tmp_path / "out")
    assert manifest["teacher"] == f"BM25, reranked by {tmp_path / 'cross'}"
    rows = triplets_of(tmp_path / "out", manifest, "search")
    assert sum(len(row["negatives"]) for row in rows) > len(rows)
    for row in rows:
        texts = [row["positive"], *row["negatives"]]
        pairs = fast([row["query"]] * len(texts), texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            scores = model(**pairs).logits.squeeze(1).sigmoid()
        torch.testing.assert_close(torch.tensor([row["positive_score"], *row["negative_scores"]]), scores)
        assert (scores[1:] < 0.9 * scores[0] + 1e-6).all()
        assert row["negative_scores"] == sorted(row["negative_scores"], reverse=True)
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(tmp_path / "cross")
    with pytest.raises(ValueError, match="of something else: teacher.digest of the cross-encoder was"):
        build(recipe, tmp_path / "out")


@pytest.mark.slow
def test_interrupted_in_every_step_and_resumed_it_builds_the_same(recipe, checkpoint, tmp_path, monkeypatch):
    change(recipe, teacher={"model": str(checkpoint), "max_length": 64}, shard_rows=9)
    expected = build(recipe, tmp_path / "whole")
    written, steps = [], Counter()

    @contextmanager
    def counted(path):
        with whole(path) as partial:
            yield partial
            written.append(path)
            if len(written) == stop:
                raise KeyboardInterrupt

    whole, stop = shards.whole, None
    monkeypatch.setattr(shards, "whole", counted)
    build(recipe, tmp_path / "counted")
    total = len(written)
    for number in range(1, total + 1, 3):
        stop, folder = number, tmp_path / f"stopped-{number}"
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            build(recipe, folder)
        steps[written[-1].relative_to(folder).parts[-2 if written[-1].suffix else -1]] += 1
        stop = None
        before = {path: path.stat().st_mtime_ns for path in written[:-1]}
        assert build(recipe, folder) == expected
        assert {path: path.stat().st_mtime_ns for path in before} == before, "what was whole is not made again"
    assert total > 20


@pytest.mark.slow
def test_killed_and_resumed_by_more_tasks_it_builds_the_same(recipe, checkpoint, tmp_path, monkeypatch):
    """SIGKILL of the main process alone: its tasks end, too."""
    change(recipe, teacher={"model": str(checkpoint), "max_length": 64}, shard_rows=9, corpus_shard_rows=5)
    # As many threads as a task has where two share the cores: a model's scores differ in the last digit with them.
    threads, share = torch.get_num_threads(), max(1, cores() // 2)
    monkeypatch.setattr(shards, "cores", lambda: share)
    expected = json.loads(json.dumps(build(recipe, tmp_path / "whole")))
    monkeypatch.undo()
    torch.set_num_threads(threads)
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "nvembed.train.build_data", "--recipe", recipe, "--output_dir", folder]
    for step in ("work/*/clean/0*", "work/*/vectors/0*"):
        process = subprocess.Popen(
            [*command, "--tasks", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and not list(folder.glob(step)) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, f"{step}: not killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.killpg(process.pid, 0)  # until no process of its session is left
                time.sleep(0.1)
        assert not (folder / "manifest.json").exists()
    subprocess.run([*command, "--tasks", "4", "--workers", "2"], check=True, capture_output=True)
    assert json.loads((folder / "manifest.json").read_text()) == expected


def test_a_folder_of_another_build_or_of_anything_else_is_left_alone(recipe, tmp_path):
    build(recipe, tmp_path / "out", sets=["ready"])
    with claimed(tmp_path / "out" / "work", "x"), pytest.raises(ValueError, match="another build_data.py runs in"):
        build(recipe, tmp_path / "out", sets=["ready"])
    with claimed(tmp_path / "new" / "work", "x"), pytest.raises(ValueError, match="another build_data.py runs in"):
        build(recipe, tmp_path / "new", sets=["ready"])
    assert [path.name for path in (tmp_path / "new" / "work").iterdir()] == [".lock"], (
        "its record is the other's to write"
    )
    before = sorted(tmp_path.glob("out/**/*"))
    change(recipe, num_negatives=3)
    with pytest.raises(ValueError, match="out holds a build of something else: num_negatives was 2 and is 3"):
        build(recipe, tmp_path / "out", sets=["ready"])
    assert sorted(tmp_path.glob("out/**/*")) == before
    change(recipe, num_negatives=2)
    build(recipe, tmp_path / "out", sets=["ready"])
    with (tmp_path / "data" / "test" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"sentence1": "p0", "sentence2": "w", "score": 1}) + "\n")
    with pytest.raises(ValueError, match=r"something else: evaluation_sets was \[\['tasks.yaml', .* and is"):
        build(recipe, tmp_path / "out", sets=["ready"])
    with pytest.raises(ValueError, match="data holds files that are not of a build"):
        build(recipe, tmp_path / "data")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"datasets": None}, "has no list `datasets:`"),
        ({"negatives": 3}, "unknown key 'negatives'; known are datasets"),
        ({"teacher": {"name": "x"}}, "teacher has unknown key 'name'; known are model"),
        ({"mining": {"max_ratio": 2}}, "max_ratio is 2"),
        ({"mining": {"max_ratio": "0.95"}}, "mining: max_ratio is '0.95' of type str, not float or left out"),
        ({"mining": {"fill": "false"}}, "mining: fill is 'false' of type str"),
        ({"mining": {"fill": True, "last_rank": 5}}, "fill: true draws from all ranks, and first_rank or last_rank"),
        ({"teacher": {"max_length": 2.5}}, "teacher: max_length is 2.5 of type float, not int"),
        ({"seed": 1.5}, "seed is 1.5 of type float, not int"),
        ({"num_negatives": True}, "num_negatives is True of type bool, not int"),
        (
            {"datasets": [{"path": "data/ready.jsonl", "name": "../out"}]},
            "named '../out', but its name is that of a fo",
        ),
        ({"datasets": [{"path": "data/ready.jsonl", "name": "work"}]}, "named 'work'"),
        (
            {"datasets": [{"path": "data/search", "kind": "retrieval", "columns": {"text": "a"}}]},
            "columns has no effect",
        ),
        ({"mining": 7}, "mining is 7, not a mapping"),
        ({"num_negatives": 0}, "num_negatives is 0"),
        ({"datasets": [{"path": "data/none.jsonl"}]}, "none.jsonl does not exist"),
        ({"datasets": [{"set": "imbd"}]}, "there is no set 'imbd'"),
    ],
)
def test_bad_recipes_are_named(recipe, values, error):
    change(recipe, **values)
    with pytest.raises(ValueError, match=error):
        read_recipe(recipe)


def test_given_negatives_are_never_positives_of_their_query(recipe, tmp_path):
    rows = [
        {"query": "q", "pos": ["a", "b"], "neg": ["b", "c", "A.", "a"]},
        {"query": "Q!", "pos": ["z"], "neg": ["a", "k"]},
    ]
    write_jsonl(tmp_path / "data" / "several.jsonl", rows)
    change(recipe, datasets=[{"path": "data/several.jsonl"}])
    manifest = build(recipe, tmp_path / "out")
    found = triplets_of(tmp_path / "out", manifest, "several")
    assert [(row["positive"], row["negatives"]) for row in found] == [("a", ["c"]), ("b", ["c"]), ("z", ["k"])]
    assert manifest["sets"]["several"]["counts"]["pairs"] == {
        "rows": 2, "pairs": 3, "further positives": 1, "negatives that are the query or a positive of it": 7,
    }  # fmt: skip


def test_a_set_of_which_nothing_is_left_is_an_error(recipe, tmp_path):
    write_jsonl(tmp_path / "data" / "test" / "test.jsonl", [
        {"sentence1": f"q{i}", "sentence2": "x", "score": i} for i in range(3)
    ])  # fmt: skip
    with pytest.raises(ValueError, match="ready: every pair is too close to an evaluation set, so nothing is left"):
        build(recipe, tmp_path / "out", sets=["ready"])


def test_lost_vectors_are_made_again(recipe, checkpoint, tmp_path):
    change(recipe, teacher={"model": str(checkpoint), "max_length": 64}, datasets=[{"path": "data/search"}])
    expected = build(recipe, tmp_path / "out")
    for name in ("work/search/vectors/00001", "search"):
        shutil.rmtree(tmp_path / "out" / name)
    assert build(recipe, tmp_path / "out") == expected


def test_data_without_an_instruction_or_without_pairs_is_named(recipe, tmp_path):
    change(recipe, instruction=None, datasets=[{"path": "data/sts"}])
    with pytest.raises(ValueError, match="sts has no instruction, which every query carries"):
        build(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "work" / "sts" / "pairs").exists()
    change(recipe, instruction="", datasets=[{"path": "data/sts"}])
    assert build(recipe, tmp_path / "out")["sets"]["sts"], "mended as the error says, it goes on in the same folder"
    write_jsonl(tmp_path / "data" / "far" / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 0}])
    change(recipe, instruction="", datasets=[{"path": "data/far"}])
    with pytest.raises(ValueError, match="far: split 'train' of .*far gave no pairs"):
        build(recipe, tmp_path / "other")


def test_bad_triplets_are_named():
    triplet = {"query": "q", "positive": "p", "negatives": ["n", "n", "q", "m"], "dataset": "d", "instruction": "",
               "symmetric": False, "negative_scores": [4.0, 3.0, 2.0, 1.0]}  # fmt: skip
    counts = Counter()
    good = checked(triplet, 7, "set, shard 0", counts)
    assert (good["negatives"], good["negative_scores"]) == (["n", "m"], [4.0, 1.0])
    assert counts == {"repeated negatives": 1, "negatives that are the query or the positive": 1}
    for change_, error in (
        ({"query": " "}, "set, shard 0: query is ' '; every triplet needs text"),
        ({"negatives": ["n", None], "negative_scores": None}, "a negative of 'q' is None"),
        ({"negative_scores": [1.0]}, "1 negative_scores for 4 negatives of 'q'"),
        ({"instruction": None}, "instruction is None"),
        ({"positive": "half \ud800"}, "positive"),
    ):
        with pytest.raises(ValueError, match=error):
            checked(triplet | change_, 7, "set, shard 0", Counter())


def test_a_full_disk_leaves_nothing_half_written(recipe, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        build(recipe, tmp_path / "out", sets=["ready"])
    assert not list(tmp_path.glob("out/**/*.parquet"))
    monkeypatch.undo()
    assert build(recipe, tmp_path / "out", sets=["ready"])["sets"]["ready"]["counts"]["mine"]["triplets"] == 3
