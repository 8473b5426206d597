"""Small raw data sets, a small task, and a student beside its teacher."""

from pathlib import Path

import pytest

from nvembed import NVEmbedModel
from nvembed.train.collator import TripletCollator
from nvembed.train.data.source import DatasetSource
from tests.conftest import SENTENCES, randomize
from tests.triplets import prepare, write_jsonl


@pytest.fixture
def beir(tmp_path):
    """Two topics of three documents each, one query with two relevant documents."""
    documents = {
        "a1": "apples grow on old trees", "a2": "apples are red or green", "a3": "apples make good cider",
        "b1": "boats sail on the sea", "b2": "boats need a new coat of paint", "b3": "boats are made of wood",
    }  # fmt: skip
    write_jsonl(
        tmp_path / "corpus.jsonl",
        [{"_id": key, "title": "Fruit" if key[0] == "a" else "", "text": text} for key, text in documents.items()],
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "do apples grow"}, {"_id": "q2", "text": "boats"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\ta1\t1\nq1\ta2\t1\nq2\tb1\t1\nq2\ta3\t0\n"
    )
    return tmp_path


@pytest.fixture
def labelled(tmp_path):
    rows = [
        {"text": f"{label} text {i}", "label": label} for label in ("card_lost", "card_new", "rate") for i in range(4)
    ]
    write_jsonl(tmp_path / "train.jsonl", [*rows, {"text": "alone", "label": "single"}])
    return tmp_path


@pytest.fixture
def halves(sentences):
    """Each sentence's two halves."""
    return [(sentence[: len(sentence) // 2], sentence[len(sentence) // 2 :]) for sentence in sentences]


@pytest.fixture
def pairs_file(tmp_path, halves):
    """Each sentence's first half finds its second."""
    rows = [{"query": first, "positive": second, "instruction": "Complete"} for first, second in halves]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def tasks_file(tmp_path, halves):
    """Each sentence's first half finds its second."""
    folder = tmp_path / "halves"
    for name, side in (("queries", 0), ("corpus", 1)):
        write_jsonl(folder / f"{name}.jsonl", [{"_id": str(i), "text": pair[side]} for i, pair in enumerate(halves)])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(len(halves))))
    file = tmp_path / "tasks.yaml"
    file.write_text("tasks: [{type: Retrieval, path: halves, instruction: Complete}]")
    return file


@pytest.fixture
def teacher_dir(model, tmp_path) -> Path:
    """The tiny checkpoint with random latents, saved."""
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def student(teacher_dir) -> NVEmbedModel:
    """The teacher, moved a little."""
    student = NVEmbedModel.from_pretrained(teacher_dir)
    randomize(student, std=0.05, seed=2)
    return student


@pytest.fixture
def triplets_file(tmp_path) -> str:
    """Each sentence with its lower-case form as the positive and another sentence as the negative."""
    rows = [{"query": t, "positive": t.lower(), "negatives": [SENTENCES[i - 1]]} for i, t in enumerate(SENTENCES)]
    return write_jsonl(tmp_path / "triplets.jsonl", rows)


@pytest.fixture
def batch(student, triplets_file) -> dict:
    """All rows of `triplets_file`, collated for the student."""
    rows = prepare([DatasetSource(triplets_file, instruction="Find it")], 1)
    return TripletCollator(student.tokenizer, student.config, 32, 1, chunk_tokens=40)(list(rows))
