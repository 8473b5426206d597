import json

import pytest
from datasets import Dataset

from nvembed.eval.data.corpus import Texts, TextShards, digest_documents, read_corpus


ROWS = [{"_id": "a", "title": "Fruit", "text": "apples grow"}, {"_id": "b", "title": "", "text": "boats sail"}]
DOCUMENTS = [("a", "Fruit apples grow"), ("b", "boats sail")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_layouts(tmp_path):
    write(tmp_path / "corpus.jsonl", ROWS)
    assert list(read_corpus(str(tmp_path))) == DOCUMENTS
    assert list(read_corpus(str(tmp_path / "corpus.jsonl"))) == DOCUMENTS
    for number, row in enumerate(ROWS):
        Dataset.from_list([{"id": row["_id"]} | row]).remove_columns("_id").to_parquet(
            tmp_path / f"train-{number:05}-of-00002.parquet"
        )
    assert list(read_corpus(str(tmp_path), "train")) == DOCUMENTS
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="the 2 shards of split 'train' are not complete: see train-00000-of-00002"):
        list(read_corpus(str(tmp_path), "train"))
    write(tmp_path / "bare.jsonl", [{"text": "x"}, {"text": "y"}])
    assert list(read_corpus(str(tmp_path / "bare.jsonl"))) == [("0", "x"), ("1", "y")]


def test_bad_corpora_are_named(tmp_path):
    write(tmp_path / "corpus.jsonl", [*ROWS, {"_id": "a", "text": "again"}])
    with pytest.raises(ValueError, match=r"corpus.jsonl:3: id 'a' is a duplicate"):
        list(read_corpus(str(tmp_path)))
    write(tmp_path / "corpus.jsonl", [])
    with pytest.raises(ValueError, match="split 'corpus' has no documents"):
        list(read_corpus(str(tmp_path)))
    with pytest.raises(ValueError, match="has no test.jsonl, .csv or .parquet; found \\['corpus.jsonl'\\]"):
        list(read_corpus(str(tmp_path), "test"))
    with pytest.raises(ValueError, match="'no/corpus' is neither a local file or folder nor a dataset"):
        list(read_corpus("no/corpus"))


def test_text_shards_give_the_documents_by_shard_and_by_position(tmp_path):
    documents = [(f"d{i}", f"text {i}") for i in range(25)]
    written = TextShards.write(documents, tmp_path / "texts", 10)
    shards = TextShards.open(tmp_path / "texts")
    assert shards == written
    assert (shards.rows, shards.shards) == (25, 3)
    assert shards.shard(2)["id"][:] == [f"d{i}" for i in range(20, 25)]
    texts = Texts(shards)
    assert list(texts) == list(shards.texts()) == [text for _, text in documents]
    assert (texts[0], texts[24], len(texts)) == ("text 0", "text 24", 25)
    assert shards.digest == digest_documents(documents) != digest_documents(reversed(documents))
