"""Small raw data sets, and a small task."""

import pytest

from tests.triplets import write_jsonl


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
