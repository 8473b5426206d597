import pytest

from nvembed.eval.data import beir as beir_layout
from nvembed.eval.data.beir import read_beir


@pytest.fixture
def beir(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "text": "two"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "first"}\n{"_id": "q2", "text": "unjudged"}\n')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    return tmp_path


def test_beir_folder(beir):
    task = read_beir(str(beir), "test")
    assert task.queries == {"q1": "first"}
    assert task.corpus == {"d1": "T one", "d2": "two"}
    assert task.qrels == {"q1": {"d1": 2}}


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("qrels/test.tsv", "q1\td9\t1\n", "names document 'd9', which does not exist"),
        ("qrels/test.tsv", "q9\td1\t1\n", "names query 'q9', which does not exist"),
        ("qrels/test.tsv", "q1\td1\tinf\n", r"test.tsv:1: .* is not query-id, corpus-id, score .a whole number"),
        ("qrels/test.tsv", "q1\td1\t0.5\n", r"test.tsv:1: .*'0.5'. is not query-id, corpus-id, score"),
        ("qrels/test.tsv", "q1\td1\tgood\n", r"test.tsv:1: \['q1', 'd1', 'good'\] is not query-id, corpus-id, score"),
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": null}\n',
            r'corpus.jsonl:1: "text" is None of type NoneType, not a string',
        ),
        (
            "corpus.jsonl",
            '{"_id": 1, "text": "a"}\n{"_id": 1, "text": "b"}\n',
            r"jsonl:2: \"_id\" '1' is a duplicate",
        ),
        ("qrels/test.tsv", "q1\td1\t0\n", "split 'test' of the qrels has no relevant document"),
        ("corpus.jsonl", '{"_id": "d1"}\n', r'corpus.jsonl:1: "text" is missing'),
        ("corpus.jsonl", '{"_id": "d1", "text": "\\ud83d"}\n', r'corpus.jsonl:1: "text" holds half of a surrogate'),
        ("corpus.jsonl", '{"_id": "d1", "title": "a\\u0000", "text": "b"}\n', r'corpus.jsonl:1: "title" holds a NUL'),
        ("corpus.jsonl", '{"_id": "\\ud83d", "text": "b"}\n', r'corpus.jsonl:1: "_id" holds half of a surrogate'),
        ("queries.jsonl", '{"_id": "q1", "text": "a\\u0000"}\n', r'queries.jsonl:1: "text" holds a NUL'),
    ],
)
def test_bad_beir_folders_are_named(beir, file, text, words):
    (beir / file).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_beir(str(beir))


def test_qrels_that_are_not_utf8_are_named(beir):
    (beir / "qrels" / "test.tsv").write_bytes(b"query-id\tcorpus-id\tscore\nq\xff\td1\t1\n")
    with pytest.raises(ValueError, match=r"test.tsv:2: not UTF-8"):
        read_beir(str(beir))


@pytest.mark.parametrize(
    ("part", "row", "words"),
    [
        ("corpus", {"_id": "d1", "title": "", "text": "a\0"}, r'x\[corpus\]\[0\]: "text" holds a NUL'),
        ("queries", {"_id": "q1", "text": None}, r'x\[queries\]\[0\]: "text" is None of type NoneType'),
    ],
)
def test_texts_of_the_hub_are_checked_too(monkeypatch, part, row, words):
    parts = {"corpus": [{"_id": "d1", "text": "a"}], "queries": [{"_id": "q1", "text": "b"}], "default": []}
    parts[part] = [row]
    monkeypatch.setattr(beir_layout, "load_dataset", lambda name, config, split: parts[config])
    with pytest.raises(ValueError, match=words):
        read_beir("owner/x")


def test_a_hub_dataset_in_mteb_layout(tmp_path):
    """The Hub's layout through `datasets` itself: a dataset repository as a local clone."""
    repo = tmp_path / "repo"
    for name, text in {
        "corpus.jsonl": '{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "title": "", "text": "two"}\n',
        "queries.jsonl": '{"_id": "q1", "text": "first"}\n',
        "qrels/test.jsonl": '{"query-id": "q1", "corpus-id": "d2", "score": 1.0}\n',
    }.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text)
    (repo / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: [{split: test, path: qrels/test.jsonl}]\n"
        "- config_name: corpus\n  data_files: [{split: corpus, path: corpus.jsonl}]\n"
        "- config_name: queries\n  data_files: [{split: queries, path: queries.jsonl}]\n---\n"
    )
    from nvembed.eval.data.beir import _read_hub

    corpus, queries, qrels = _read_hub(str(repo), "test")
    assert corpus == {"d1": "T one", "d2": "two"}
    assert queries == {"q1": "first"}
    assert qrels == {"q1": {"d2": 1}}
