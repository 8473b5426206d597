"""NVIDIA's layout: whole, and with ids only beside small local copies of the public sets they point to."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from nvembed.train.data import nemotron
from nvembed.train.data.source import DatasetSource
from tests.triplets import prepare, write_jsonl


def ids(*names):
    return [{"id": name} for name in names]


def write_set(folder, queries, corpus=None, config=None, **metadata):
    folder.mkdir(parents=True)
    metadata = {"corpus_id": "wiki", "ids_only": corpus is None} | metadata
    (folder / "dataset_metadata.json").write_text(json.dumps(metadata))
    rows = [{"corpus_id": "wiki"} | row for row in queries]
    Dataset.from_list(rows).to_parquet(folder / "queries.parquet")
    if corpus is not None:
        Dataset.from_list(corpus).to_parquet(folder / "corpus.parquet")
    if config is not None:
        (folder / "source_config.json").write_text(json.dumps(config))
    return folder


CORPUS = [{"id": f"d{i}", "text": f"document {i}"} for i in range(5)] + [{"id": "empty", "text": " "}]
QUERIES = [
    {
        "question_id": "1",
        "question": "first",
        "pos_doc": ids("d0", "d1"),
        "neg_doc": ids("d2", "d1", "d3", "d2", "empty"),
    },
    {"question_id": "2", "question": "second", "pos_doc": ids("d4"), "neg_doc": ids("d0")},
    {"question_id": "3", "question": " ", "pos_doc": ids("d4"), "neg_doc": ids("d0")},
    {"question_id": "4", "question": "none", "pos_doc": [], "neg_doc": ids("d0")},
]


def test_a_set_with_its_texts(tmp_path):
    write_set(tmp_path / "PAQ", QUERIES, CORPUS, instructions={"query": "Its own", "passage": ""})
    source = DatasetSource(str(tmp_path), "nemotron", config="PAQ", name="paq")
    pairs = nemotron.load(source, 7, 0)
    assert [(row["query"], row["positive"], row["negatives"]) for row in pairs.pairs] == [
        ("first", "document 0", ["document 2", "document 3"]),
        ("first", "document 1", ["document 2", "document 3"]),
        ("second", "document 4", ["document 0"]),
    ]
    assert pairs.counts == Counter(
        {"rows": 4, "further positives": 1, "empty question": 1, "no positive": 1,
         "negatives that are empty, repeated, or a positive": 3}
    )  # fmt: skip
    assert {row["instruction"] for row in prepare([source], 7)} == {"Its own"}
    source = DatasetSource(str(tmp_path / "PAQ"), "nemotron", instruction="The recipe's", samples=2)
    assert [row["instruction"] for row in prepare([source], 7)] == ["The recipe's"] * 2


def test_ids_only_by_row_number(tmp_path):
    """`loader_config` column: q_<i> and d_<i> are row numbers of a public table."""
    write_jsonl(tmp_path / "public" / "train.jsonl", [{"q": f"question {i}", "a": f"answer {i}"} for i in range(4)])
    config = {"loader_config": "column", "source_repo": str(tmp_path / "public"), "query_column": "q",
              "document_column": "a", "split": "train"}  # fmt: skip
    queries = [{"question_id": "q_2", "pos_doc": ids("d_2"), "neg_doc": ids("d_0", "d_3")}]
    folder = write_set(tmp_path / "SQuAD", queries, config=config)
    (row,) = nemotron.load(DatasetSource(str(folder), "nemotron"), 7, 0).pairs
    assert row == {"query": "question 2", "positive": "answer 2", "negatives": ["answer 0", "answer 3"]}


def test_ids_only_in_the_layout_of_mteb(tmp_path):
    public = tmp_path / "public"
    write_jsonl(public / "corpus.jsonl", [{"_id": f"d{i}", "title": "T", "text": f"text {i}"} for i in range(3)])
    write_jsonl(public / "queries.jsonl", [{"_id": "7", "text": "question"}])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: {name}, path: {name}.jsonl}}\n"
        for name in ("corpus", "queries")
    )
    (public / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    queries = [{"question_id": "7", "pos_doc": ids("d1"), "neg_doc": ids("d0", "d2")}]
    config = {"loader_config": "mteb", "source_repo": str(public)}
    folder = write_set(tmp_path / "FEVER", queries, config=config)
    (row,) = nemotron.load(DatasetSource(str(folder), "nemotron"), 1, 0).pairs
    assert row == {"query": "question", "positive": "T text 1", "negatives": ["T text 0"]}


def fault(tmp_path, queries=QUERIES, corpus=CORPUS, **options):
    folder = write_set(tmp_path / "set", queries, corpus, **options)
    return nemotron.load(DatasetSource(str(folder), "nemotron"), 7, 0)


def test_bad_sets_are_named(tmp_path):
    row = QUERIES[0]
    with pytest.raises(ValueError, match=r"queries.parquet\[0\]: 'd9' is not among the 6 texts of .*corpus.parquet"):
        fault(tmp_path / "1", [row | {"neg_doc": ids("d9")}])
    with pytest.raises(ValueError, match=r'corpus.parquet\[6\]: "id" \'d0\' is a duplicate'):
        fault(tmp_path / "2", corpus=[*CORPUS, CORPUS[0]])
    with pytest.raises(ValueError, match="\"corpus_id\" is 'other'; the set has the corpus 'wiki' alone"):
        fault(tmp_path / "3", [row | {"corpus_id": "other"}])
    with pytest.raises(ValueError, match='"neg_doc" is missing'):
        fault(tmp_path / "4", [{key: value for key, value in row.items() if key != "neg_doc"}])
    folder = write_set(tmp_path / "5" / "set", QUERIES, CORPUS)
    empty = pa.array([], pa.string())
    pq.write_table(pa.table({"id": empty, "text": empty}), folder / "corpus.parquet")
    with pytest.raises(ValueError, match="corpus.parquet has no documents"):
        nemotron.load(DatasetSource(str(folder)), 7, 0)
    with pytest.raises(ValueError, match="source_config.json is missing"):
        fault(tmp_path / "6", corpus=None)
    with pytest.raises(ValueError, match="loader_config is 'zip'; known are mteb, column"):
        fault(tmp_path / "7", corpus=None, config={"loader_config": "zip", "source_repo": "x"})
    with pytest.raises(ValueError, match="name one of its sets with `config:`: set"):
        nemotron.load(DatasetSource(str(tmp_path / "1"), "nemotron"), 7, 0)
    with pytest.raises(ValueError, match="'no/such' is neither a local folder nor a dataset found on the Hub"):
        nemotron.load(DatasetSource("no/such", "nemotron"), 7, 0)
    write_jsonl(tmp_path / "public" / "train.jsonl", [{"q": "question", "a": "answer"}])
    config = {"loader_config": "column", "source_repo": str(tmp_path / "public"), "query_column": "q",
              "document_column": "a", "split": "train"}  # fmt: skip
    queries = [{"question_id": "q_0", "pos_doc": ids("d_1"), "neg_doc": []}]
    with pytest.raises(ValueError, match=r"queries.parquet\[0\]: 'd_1' is not d_<row number> below 1"):
        fault(tmp_path / "8", queries, None, config=config)
    with pytest.raises(ValueError, match="has no column 'b'; it has \\['q', 'a'\\]"):
        fault(tmp_path / "9", queries, None, config=config | {"document_column": "b"})
