"""mteb's own tasks through `datasets`: read, aggregated, refused; their scores."""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest

from nvembed import NVEmbedModel
from nvembed.eval.results import category_averages, main_score
from nvembed.eval.run_mteb import run
from nvembed.eval.tasks.lookup import select_tasks


def test_only_the_subsets_asked_for_count():
    (task,) = select_tasks(["STS17"])
    parts = [{"hf_subset": subset, "main_score": score} for subset, score in (("en-en", 0.75), ("ko-ko", 0.25))]
    assert main_score(task, SimpleNamespace(scores={"test": parts})) == 0.75
    parts[0]["main_score"] = math.nan
    with pytest.raises(ValueError, match="STS17 has the score nan"):
        main_score(task, SimpleNamespace(scores={"test": parts}))


def test_categories_come_in_the_papers_order():
    types = {"a": "STS", "b": "Retrieval", "c": "STS", "d": "BitextMining"}
    averages = category_averages({"a": 0.2, "b": 0.5, "c": 0.4, "d": 1.0}, types)
    assert list(averages.items()) == [("Retrieval", 0.5), ("STS", pytest.approx(0.3)), ("BitextMining", 1.0)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Data set repositories of the layout and under the names that mteb expects; `datasets` takes a folder first."""
    scifact, banking = tmp_path / "mteb" / "scifact", tmp_path / "mteb" / "banking77"
    claims = [f"claim {i} of {letter}" for i, letter in enumerate("abc" * 4)]
    corpus = [{"_id": str(i), "title": f"{letter} study", "text": f"paper {i}"} for i, letter in enumerate("abc" * 7)]
    tables = {
        scifact / "corpus.jsonl": corpus,
        scifact / "queries.jsonl": [{"_id": str(100 + i), "text": claim} for i, claim in enumerate(claims)],
        scifact / "qrels" / "test.jsonl": [
            {"query-id": str(100 + i), "corpus-id": str((5 * i) % 21), "score": 1.0} for i in range(10)
        ],
    }
    for split, size in (("train", 40), ("test", 20)):
        rows = [
            {"text": f"{'abcd'[i % 4]} {split} {i}", "label": i % 4, "label_text": "abcd"[i % 4]} for i in range(size)
        ]
        tables[banking / f"{split}.jsonl"] = rows
    for path, rows in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (scifact / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: [{split: test, path: qrels/test.jsonl}]\n"
        "- config_name: corpus\n  data_files: [{split: corpus, path: corpus.jsonl}]\n"
        "- config_name: queries\n  data_files: [{split: queries, path: queries.jsonl}]\n---\n"
    )
    (banking / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: test, path: test.jsonl}\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    return corpus, claims


def test_tasks_of_mteb_through_datasets(hub, arguments, checkpoint, caplog):
    summary = run(arguments(tasks=["SciFact", "Banking77Classification"]))
    assert summary["details"]["SciFact"]["dataset"] == "mteb/scifact"
    assert summary["details"]["Banking77Classification"]["type"] == "Classification"

    corpus, claims = hub
    model = NVEmbedModel.from_pretrained(checkpoint)
    instruction = "Instruct: Given a scientific claim, retrieve documents that support or refute the claim\nQuery: "
    queries = model.encode(claims[:10], instruction, 64)
    documents = model.encode([f"{row['title']} {row['text']}" for row in corpus], "", 64)
    total = 0.0
    for i, similarity in enumerate(queries @ documents.T):
        rank = int((similarity > similarity[(5 * i) % 21]).sum())
        total += 1 / math.log2(rank + 2) if rank < 10 else 0
    assert summary["tasks"]["SciFact"] == pytest.approx(round(total / 10, 5), abs=1e-6)
    assert 0.2 < summary["tasks"]["Banking77Classification"] <= 1


def test_a_changed_copy_of_the_data_is_seen(hub, arguments, tmp_path):
    """`datasets` knows a folder by its name; its cache would give the old rows."""
    arguments = partial(arguments, tasks=["SciFact"])
    first = run(arguments("first"))
    file = tmp_path / "mteb" / "scifact" / "qrels" / "test.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:1]))
    with pytest.raises(ValueError, match="holds SciFact with data of the folder '.*', this run has"):
        run(arguments("first"))
    second = run(arguments("second"))
    assert second["tasks"] != first["tasks"]
    revisions = [summary["details"]["SciFact"]["dataset_revision"] for summary in (first, second)]
    (task,) = select_tasks(["SciFact"])
    assert len({*revisions, task.metadata.revision}) == 3, "neither is the Hub's"


@pytest.mark.slow
def test_an_aggregated_task_is_the_mean_of_its_parts(hub, arguments, tmp_path):
    """CQADupstack: twelve forums, each a task with its own result, one score of the paper's 56."""
    (task,) = select_tasks(["CQADupstackRetrieval"])
    for i, part in enumerate(task.metadata.tasks):
        folder = tmp_path / part.metadata.dataset["path"]
        shutil.copytree(tmp_path / "mteb" / "scifact", folder)
        qrels = (folder / "qrels" / "test.jsonl").read_text().splitlines()
        (folder / "qrels" / "test.jsonl").write_text("\n".join(qrels[i % 9 :]))
    summary = run(arguments(tasks=["CQADupstackRetrieval"], max_length=512))
    parts = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("results/*/*/CQADupstack*.json")]
    scores = {part["task_name"]: part["scores"]["test"][0]["main_score"] for part in parts}
    mean = scores.pop("CQADupstackRetrieval")
    assert len(scores) == 12
    assert len(set(scores.values())) > 3
    assert summary["tasks"] == {"CQADupstackRetrieval": pytest.approx(sum(scores.values()) / 12, abs=1e-6)}
    assert summary["average"] == pytest.approx(mean)
    assert run(arguments(tasks=["CQADupstackRetrieval"], max_length=512)) == summary


def test_a_hub_that_cannot_be_reached(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        r"SciFact \(data set 'mteb/scifact', revision .*\): the data is not in the cache and failed to load from https"
    )
    with pytest.raises(
        ConnectionError, match=words + r".*copy the data set's repository to a folder.*What is done is k"
    ):
        run(arguments(tasks=["SciFact"]))


def test_a_task_whose_data_is_wrong_does_not_stop_the_others(hub, arguments, tmp_path):
    shutil.rmtree(tmp_path / "mteb" / "scifact" / "qrels")
    with pytest.raises(ValueError, match=r"not measured, so there is no average: 1 of 2 tasks\n  SciFact: "):
        run(arguments(tasks=["SciFact", "Banking77Classification"]))
    assert len(list((tmp_path / "out").glob("results/*/*/Banking77Classification.json"))) == 1
    assert not (tmp_path / "out" / "summary.json").exists()
