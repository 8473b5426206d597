import math

import pytest
import torch

from nvembed.eval.clustering import v_measure
from nvembed.eval.retrieval import RetrievalTask, ndcg_at_10, read_beir


def encoder(vectors):
    """An `encode` that looks texts up; the instruction is recorded."""
    seen = []

    def encode(texts, instruction=""):
        seen.append(instruction)
        return torch.nn.functional.normalize(torch.tensor([vectors[text] for text in texts]), dim=-1)

    return encode, seen


def test_ndcg_equals_a_direct_loop():
    torch.manual_seed(0)
    queries = {f"q{i}": f"query {i}" for i in range(7)}
    corpus = {f"d{i}": f"document {i}" for i in range(30)}
    vectors = {text: torch.randn(5).tolist() for text in [*queries.values(), *corpus.values()]}
    qrels = {q: {f"d{(3 * i + j) % 30}": 1 + j % 2 for j in range(i + 1)} for i, q in enumerate(queries)}
    encode, seen = encoder(vectors)
    actual = ndcg_at_10(encode, RetrievalTask("t", queries, corpus, qrels, "Find it"))

    expected = 0.0
    for query_id, text in queries.items():
        query = torch.tensor(vectors[text], dtype=torch.float64)

        def cosine(document_id, query=query):
            document = torch.tensor(vectors[corpus[document_id]], dtype=torch.float64)
            return float(query @ document / query.norm() / document.norm())

        ranking = sorted(corpus, key=cosine, reverse=True)[:10]
        gain = sum(qrels[query_id].get(d, 0) / math.log2(rank + 2) for rank, d in enumerate(ranking))
        best = sorted(qrels[query_id].values(), reverse=True)[:10]
        expected += gain / sum(grade / math.log2(rank + 2) for rank, grade in enumerate(best)) / len(queries)
    assert actual == pytest.approx(expected, abs=1e-6)
    assert seen == ["Instruct: Find it\nQuery: ", ""], "queries carry the instruction, documents none"


def test_v_measure_of_separated_and_of_mixed_classes():
    vectors = {f"{label}{i}": [float(label == "a"), float(label == "b"), 0.01 * i] for label in "abc" for i in range(5)}
    vectors |= {f"c{i}": [0.0, 0.0, 1.0] for i in range(5)}
    encode, seen = encoder(vectors)
    labels = [text[0] for text in vectors]
    assert v_measure(encode, list(vectors), labels, "Group") == pytest.approx(1.0)
    assert seen == ["Instruct: Group\nQuery: "]
    assert v_measure(encode, list(vectors), [str(i % 3) for i in range(15)]) < 0.5


@pytest.fixture
def beir(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "text": "two"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "first"}\n{"_id": "q2", "text": "unjudged"}\n')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    return tmp_path


def test_beir_folder(beir):
    task = read_beir(str(beir), "test", "Find it")
    assert task.queries == {"q1": "first"}
    assert task.corpus == {"d1": "T one", "d2": "two"}
    assert task.qrels == {"q1": {"d1": 2}}
    assert task.instruction == "Find it"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("qrels/test.tsv", "q1\td9\t1\n", "names document 'd9', which does not exist"),
        ("qrels/test.tsv", "q9\td1\t1\n", "names query 'q9', which does not exist"),
        ("qrels/test.tsv", "q1\td1\tgood\n", r"test.tsv:1: \['q1', 'd1', 'good'\] is not query-id, corpus-id, score"),
        ("corpus.jsonl", '{"_id": "d1", "text": null}\n', r'corpus.jsonl:1: "text" is None, not a string'),
        (
            "corpus.jsonl",
            '{"_id": 1, "text": "a"}\n{"_id": 1, "text": "b"}\n',
            r"jsonl:2: \"_id\" '1' stands there a sec",
        ),
        ("qrels/test.tsv", "q1\td1\t0\n", "split 'test' of the qrels has no relevant document"),
        ("corpus.jsonl", '{"_id": "d1"}\n', r'corpus.jsonl:1: "text" is missing'),
    ],
)
def test_bad_beir_folders_are_named(beir, file, text, words):
    (beir / file).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_beir(str(beir))


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
    from nvembed.eval.retrieval import _read_hub

    corpus, queries, qrels = _read_hub(str(repo), "test")
    assert corpus == {"d1": "T one", "d2": "two"}
    assert queries == {"q1": "first"}
    assert qrels == {"q1": {"d2": 1}}


def test_embeddings_that_are_not_finite_have_no_score():
    encode, _ = encoder({"q": [float("nan"), 1.0], "d": [0.0, 1.0]})
    with pytest.raises(ValueError, match="embeddings hold NaN"):
        ndcg_at_10(encode, RetrievalTask("t", {"q": "q"}, {"d": "d"}, {"q": {"d": 1}}))
