"""Splits cut from training sets."""

import json

import pytest

from nvembed.eval.data.beir import read_beir
from nvembed.train.data.hold_out import hold_out, is_held_out
from tests.triplets import write_jsonl


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_table_is_cut_by_its_texts_alone(tmp_path):
    rows = [{"text": f"text number {i}", "label": str(i % 3)} for i in range(500)]
    write_jsonl(tmp_path / "set" / "train.jsonl", [*rows, {"text": "Text, number 7!", "label": "1"}])
    counts = hold_out(tmp_path / "set", tmp_path / "out", 0.2)
    train, dev = (rows_of(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "dev"))
    assert counts == {"train": len(train), "dev": len(dev)} and len(train) + len(dev) == 501
    assert 70 <= len(dev) <= 130
    sides = [{row["text"] for row in side} for side in (train, dev)]
    assert any({"text number 7", "Text, number 7!"} <= side for side in sides), "equal but for case and punctuation"
    write_jsonl(tmp_path / "other" / "train.jsonl", rows[::-2])
    hold_out(tmp_path / "other", tmp_path / "out2", 0.2)
    assert {row["text"] for row in rows_of(tmp_path / "out2" / "dev.jsonl")} <= sides[1]
    with pytest.raises(FileExistsError, match="out exists; name another output_dir"):
        hold_out(tmp_path / "set", tmp_path / "out", 0.2)


def test_a_documents_queries_are_on_one_side(tmp_path):
    folder = tmp_path / "beir"
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": f"document {i}"} for i in range(60)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(180)])
    (folder / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i % 60}\t1" for i in range(180))]
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines))
    counts = hold_out(folder, tmp_path / "out", 0.3)
    train, dev = (read_beir(str(tmp_path / "out"), split) for split in ("train", "dev"))
    documents = [{document for judged in side.qrels.values() for document in judged} for side in (train, dev)]
    assert not documents[0] & documents[1] and documents[0] | documents[1] == {f"d{i}" for i in range(60)}
    assert counts == {"train": len(train.queries), "dev": len(dev.queries)} and sum(counts.values()) == 180
    assert all(is_held_out(dev.corpus[document], 0.3) for document in documents[1])
    assert dev.corpus == train.corpus and len(dev.corpus) == 60


def test_what_cannot_be_cut_is_named(tmp_path):
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": "one", "label": "a"}])
    with pytest.raises(ValueError, match="share 0.5 leaves nothing for one of the splits"):
        hold_out(tmp_path / "set", tmp_path / "out", 0.5)
    with pytest.raises(ValueError, match="has neither corpus.jsonl nor train.jsonl"):
        hold_out(tmp_path / "none", tmp_path / "out", 0.5)
    write_jsonl(tmp_path / "odd" / "train.jsonl", [{"words": "one"}])
    with pytest.raises(ValueError, match="has none of the columns text, query"):
        hold_out(tmp_path / "odd", tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()
