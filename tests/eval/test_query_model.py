"""Queries by one model against documents by another."""

import json
import math
import shutil

import pytest

from nvembed import NVEmbedModel
from nvembed.eval.report import read_run
from nvembed.eval.run_mteb import MtebArguments, run
from nvembed.eval.training_data import FILE
from nvembed.texts_nvembed import format_instruction
from nvembed.train.distillation import add_projection
from tests.conftest import randomize


@pytest.fixture
def student(checkpoint, tmp_path):
    model = NVEmbedModel.from_pretrained(checkpoint)
    randomize(model, std=0.1)
    model.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def arguments(checkpoint, student, data, tmp_path):
    (data / "retrieval.yaml").write_text("tasks:\n- {type: Retrieval, path: retrieval, instruction: Do it}\n")

    def make(**options):
        defaults = {"model": str(checkpoint), "tasks": [str(data / "retrieval.yaml")], "max_length": 64}
        defaults |= {"output_dir": str(tmp_path / "out"), "query_model": str(student)}
        return MtebArguments(**(defaults | options))

    return make


def ndcg(scores, relevant, k=10):
    """nDCG@10 of one query by its definition."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
    gain = sum(relevant.get(i, 0) / math.log2(rank + 2) for rank, i in enumerate(order))
    best = sum(g / math.log2(rank + 2) for rank, g in enumerate(sorted(relevant.values(), reverse=True)[:k]))
    return gain / best


def test_queries_are_the_students_and_documents_the_teachers(arguments, checkpoint, student, data):
    found = run(arguments())["tasks"]["retrieval"]
    texts = {
        name: [json.loads(line)["text"] for line in (data / "retrieval" / f"{name}.jsonl").open()]
        for name in ("queries", "corpus")
    }
    queries = NVEmbedModel.from_pretrained(student).encode(texts["queries"], format_instruction("Do it"), 64)
    documents = NVEmbedModel.from_pretrained(checkpoint).encode(texts["corpus"], "", 64)
    relevant = [{} for _ in texts["queries"]]
    for line in (data / "retrieval" / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, gain = line.split("\t")
        relevant[int(query[1:])][int(document[1:])] = int(gain)
    expected = [ndcg(scores, known) for scores, known in zip((queries @ documents.T).tolist(), relevant)]
    assert found == pytest.approx(sum(expected) / len(expected), abs=2e-3)


def test_a_set_that_either_model_has_seen_is_seen(arguments, checkpoint, student, tmp_path):
    documents = shutil.copytree(checkpoint, tmp_path / "documents")
    seen = {"stages": [{"sets": [{"name": "retrieval", "mteb": []}]}], "complete": True}
    unseen = {"stages": [], "complete": True}
    cases = {"a": (seen, unseen, "seen"), "b": (unseen, seen, "seen"), "c": (unseen, unseen, "zero-shot")}
    for name, (model, query_model, mark) in (cases | {"d": (unseen, None, "-")}).items():
        for folder, certificate in ((documents, model), (student, query_model)):
            (folder / FILE).unlink(missing_ok=True)
            if certificate is not None:
                (folder / FILE).write_text(json.dumps(certificate))
        summary = run(arguments(model=str(documents), output_dir=str(tmp_path / name)))
        assert summary["details"]["retrieval"]["training_data"] == mark
    assert summary["query_model"].endswith(student.name)
    assert read_run(str(tmp_path / "d")).name == f"{summary['model']} queried by {summary['query_model']}"


def test_results_with_and_without_a_query_model_do_not_mix(arguments):
    run(arguments())
    with pytest.raises(ValueError, match="query_model"):
        run(arguments(query_model=None))


def test_tasks_without_queries_are_refused(arguments, data):
    with pytest.raises(ValueError, match="query_model is for retrieval, and"):
        run(arguments(tasks=[str(data / "tasks.yaml")]))


def test_models_of_other_spaces_are_refused(arguments, student):
    model = NVEmbedModel.from_pretrained(student)
    add_projection(model, 20)
    model.save_pretrained(student)
    with pytest.raises(ValueError, match=r"32 dimensions and query_model .*/student of 20: it must"):
        run(arguments())
