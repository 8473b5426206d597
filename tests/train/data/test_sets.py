"""The registry, and every layout that it names, on small local copies with the same columns."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, load_dataset

from nvembed.eval.data import beir as beir_layout
from nvembed.train.data.kinds import KINDS, check_kind
from nvembed.train.data.sets import as_source, find_set, known_sets, list_sets
from nvembed.train.data.source import DatasetSource, check_exists, check_sources
from tests.train.data.test_nemotron import CORPUS, QUERIES, write_set
from tests.triplets import prepare, write_jsonl


def test_every_row_of_the_papers_table_is_there_once():
    """Sizes of the appendix's table: PAQ and MS MARCO 500k, ... (unverified)."""
    sizes = {name: known.samples for name, known in known_sets().items()}
    retrieval = "msmarco paq nli hotpotqa fever nq squad stackexchange hover arguana fiqa nfcorpus bioasq miracl mrtydi"
    retrieval += " scifact synthetic"
    assert list(sizes)[:17] == retrieval.split()
    assert len(sizes) == 17 + 3 + 12 + 11
    assert (sizes["msmarco"], sizes["paq"], sizes["scifact"], sizes["medrxiv_s2s"]) == (500_000, 500_000, 900, 2300)
    for known in known_sets().values():
        assert known.kind in KINDS
        assert known.checked is None, "say when it was read from the Hub"
        assert known.instruction or known.name == "synthetic", "each of its triplets brings its own"
    table = list_sets()
    assert table.count("\n") == len(sizes) + 1
    assert "| banking77 | mteb/banking77 | classification | 10,000 | mit | no | - |" in table


def test_every_entry_of_the_registry_and_of_the_pages_example_is_valid():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    (example,) = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "set: msmarco" in text]
    known = [{"set": name} for name, known in known_sets().items() if known.path is not None]
    for entries in (yaml.safe_load(example)["datasets"], known):
        for source in check_sources([as_source(entry) for entry in entries]):
            check_kind(source)


def test_instructions_are_those_of_the_evaluation_where_a_task_is_named():
    assert find_set("banking77").instruction == "Given a online banking query, find the corresponding intents"
    assert find_set("stsb").instruction == "Retrieve semantically similar text"
    assert find_set("scifact").instruction.startswith("Given a scientific claim")


def test_an_entry_names_a_set_and_overrides_it():
    source = as_source({"set": "imdb", "samples": 10})
    assert (source.path, source.kind, source.samples, source.name) == ("mteb/imdb", "label_classification", 10, "imdb")
    assert source.mteb == ["ImdbClassification"]
    own = as_source({"set": "hover", "path": "data/hover.jsonl"})
    assert (own.path, own.kind, own.samples) == ("data/hover.jsonl", None, 17_000)
    own = as_source({"set": "arxiv_p2p", "path": "data/triplets.jsonl"})
    assert (own.columns, own.label_separator) == (None, None), "of the set's own layout"
    kept = as_source({"set": "arxiv_p2p", "path": "data/copy.jsonl", "kind": "clustering"})
    assert kept.columns is not None and kept.label_separator == " "
    built = as_source({"set": "imdb"}, "runs/data")
    assert (built.path, built.kind, built.samples) == ("runs/data/imdb", "triplets", None)
    with pytest.raises(ValueError, match="runs/data/imdb does not exist: build_data.py makes the set 'imdb'"):
        check_exists(built)
    with pytest.raises(ValueError, match="there is no set 'imbd'; the sets are msmarco"):
        as_source({"set": "imbd"})
    with pytest.raises(ValueError, match=r"the set 'hover' has no public source.*as {set: hover, path: ...}"):
        as_source({"set": "hover"})
    with pytest.raises(ValueError, match="unknown key 'sample'"):
        as_source({"set": "imdb", "sample": 10})


def test_bad_registries_are_named(tmp_path):
    file = tmp_path / "sets.yaml"
    file.write_text("a: {kind: sts, license: mit, paths: x}")
    with pytest.raises(ValueError, match="sets.yaml: a has unknown key 'paths'"):
        known_sets(file)
    other = tmp_path / "other.yaml"
    other.write_text("a: {kind: sts, path: x}")
    with pytest.raises(ValueError, match="other.yaml: a has no license"):
        known_sets(other)
    third = tmp_path / "third.yaml"
    third.write_text("a: {kind: sts, license: mit}")
    with pytest.raises(ValueError, match="a has neither a path nor a note"):
        known_sets(third)


COPIES = {
    "squad": [{"id": "1", "title": "T", "context": f"passage {i}", "question": f"what {i}"} for i in range(3)],
    "stackexchange": [{"title_body": f"t {i}", "upvoted_answer": f"a {i}", "downvoted_answer": "d"} for i in range(3)],
    "arxiv_p2p": [{"id": str(i), "title": f"t{i}", "abstract": "a", "categories": f"c{i % 2} x"} for i in range(6)],
    "arxiv_s2s": [{"id": str(i), "title": f"t{i}", "abstract": "a", "categories": f"c{i % 2} c{i}"} for i in range(6)],
    "biorxiv_p2p": [{"title": f"t{i}", "abstract": "a", "category": f"c{i % 2}"} for i in range(6)],
    "reddit": [{"title": f"t{i}", "body": "b", "subreddit": f"s{i % 2}"} for i in range(6)],
    "stackexchange_p2p": [{"title": f"t{i}", "body": "b", "site": f"s{i % 2}"} for i in range(6)],
    "twenty_newsgroups": [{"text": f"t{i}", "label": i % 2, "label_text": f"l{i % 2}"} for i in range(6)],
    "emotion": [{"text": f"t{i}", "label": i % 2, "label_text": f"l{i % 2}"} for i in range(6)],
    "amazon_counterfactual": [{"text": f"t{i}", "label": i % 2, "label_text": f"l{i % 2}"} for i in range(6)],
    "stsb": [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": 5.0} for i in range(3)],
    "mrtydi": [
        {"query_id": "1", "query": "q", "positive_passages": [{"docid": "1", "title": "T", "text": "p"}],
         "negative_passages": [{"docid": "2", "title": "", "text": "n"}]}
    ],
    "nli": [
        {"premise": "a man runs", "hypothesis": h, "label": label}
        for h, label in (("he moves", 0), ("he may win", 1), ("he sleeps", 2))
    ],
}  # fmt: skip


LABELLED = [{"id": str(i), "text": f"t{i}", "label": i % 2, "label_text": f"l{i % 2}", "lang": "en"} for i in range(6)]
COPIES |= dict.fromkeys(
    ["amazon_polarity", "amazon_reviews", "banking77", "imdb", "mtop_intent", "mtop_domain", "massive_intent",
     "massive_scenario", "toxic_conversations", "tweet_sentiment"],
    LABELLED,
)  # fmt: skip
COPIES |= dict.fromkeys(["biorxiv_s2s", "medrxiv_p2p", "medrxiv_s2s"], COPIES["biorxiv_p2p"])
COPIES |= {"reddit_p2p": COPIES["reddit"], "stackexchange_titles": COPIES["stackexchange_p2p"]}
COPIES |= dict.fromkeys(["sts12", "sts22"], COPIES["stsb"])


@pytest.mark.parametrize("name", COPIES)
def test_registered_columns_are_read(tmp_path, name):
    write_jsonl(tmp_path / "train.jsonl", COPIES[name])
    source = as_source({"set": name, "path": str(tmp_path), "kind": find_set(name).kind})
    rows = prepare([source], 2)
    assert len(rows)
    for row in rows:
        assert row["instruction"] == find_set(name).instruction
        assert row["negatives"] or name == "arxiv_p2p"
        if find_set(name).kind == "label_classification":
            assert row["positive"] in ("l0", "l1"), "the label's name, not its number"
    if name == "arxiv_p2p":
        assert {row["query"] for row in rows} == {f"t{i} a" for i in range(6)}
        assert not any(row["negatives"] for row in rows), "all texts share the label x"
    if name == "arxiv_s2s":
        for row in rows:  # the classes are c0 and c1; t1's second label is c1, t0's c0
            assert row["positive"] != row["query"]
            assert int(row["query"][1]) % 2 == int(row["positive"][1]) % 2
            assert all(int(text[1]) % 2 != int(row["query"][1]) % 2 for text in row["negatives"])


@pytest.mark.parametrize("name", ["msmarco", "hotpotqa", "fever", "fiqa", "nfcorpus", "scifact"])
def test_registered_retrieval_sets_are_read_from_mtebs_configs(beir, tmp_path, name, monkeypatch):
    """The layout of mteb's repositories: the corpus and the queries are configs, the qrels the default one."""
    rows = (beir / "qrels" / "train.tsv").read_text().split()
    qrels = [dict(zip(("query-id", "corpus-id", "score"), rows[i : i + 3])) for i in range(3, len(rows), 3)]
    public = tmp_path / "public"
    write_jsonl(public / "qrels.jsonl", [row | {"score": float(row["score"])} for row in qrels])
    shutil.copy(beir / "corpus.jsonl", public / "documents.jsonl")
    shutil.copy(beir / "queries.jsonl", public / "questions.jsonl")
    parts = (("default", "train", "qrels"), ("corpus", "corpus", "documents"), ("queries", "queries", "questions"))
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n  - {{split: {split}, path: {file}.jsonl}}\n"
        for config, split, file in parts
    )
    (public / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    expected = prepare([DatasetSource(str(beir), instruction=find_set(name).instruction)], 2)
    asked = []

    def load_copy(path, config, split):
        asked.append(path)
        return load_dataset(str(public), config, split=split)

    monkeypatch.setattr(beir_layout, "load_dataset", load_copy)
    rows = prepare([as_source({"set": name})], 2)
    assert set(asked) == {find_set(name).path}
    columns = ("query", "positive", "negatives", "instruction")
    assert [[row[column] for column in columns] for row in rows] == [[row[c] for c in columns] for row in expected]


@pytest.mark.parametrize("name", ["paq", "nq", "miracl"])
def test_registered_sets_of_nvidias_are_read(tmp_path, name):
    write_set(tmp_path / find_set(name).config, QUERIES, CORPUS)
    rows = prepare([as_source({"set": name, "path": str(tmp_path), "kind": "nemotron"})], 7)
    assert [(row["query"], row["positive"]) for row in rows] == [
        ("first", "document 0"), ("first", "document 1"), ("second", "document 4"),
    ]  # fmt: skip
    assert {row["instruction"] for row in rows} == {find_set(name).instruction}


def test_every_set_with_a_source_has_a_local_copy_here():
    elsewhere = {known.name for known in known_sets().values() if known.kind in ("retrieval", "nemotron")}
    assert {known.name for known in known_sets().values() if known.path} <= COPIES.keys() | elsewhere


def test_qa_mines_in_the_passages_of_all_rows(tmp_path):
    rows = [{"question": f"word{i}", "context": f"passage {i} word{i} word{(i + 1) % 4}"} for i in range(4)]
    rows += [{"question": "word0", "context": "another passage of word0"}, rows[0]]
    write_jsonl(tmp_path / "train.jsonl", rows)
    columns = {"query": "question", "positive": "context"}
    source = DatasetSource(str(tmp_path), "qa", columns=columns, samples=2)
    pairs = KINDS["qa"].load(source, 7, 0)
    assert len(pairs.pairs) == 2 and len(pairs.corpus) == 5
    assert dict(pairs.counts) == {"rows": 6, "repeated": 1, "not sampled": 3}
    for row in prepare([DatasetSource(str(tmp_path), "qa", columns=columns)], 7):
        if row["query"] == "word0":
            assert not {rows[0]["context"], rows[4]["context"]} & set(row["negatives"])
    with pytest.raises(ValueError, match=r'train.jsonl:1: "answer" is missing'):
        prepare([DatasetSource(str(tmp_path), "qa", columns={"query": "question", "positive": "answer"})], 7)


def test_nli_takes_contradictions_as_hard_negatives(tmp_path):
    labels = {"e1": "entailment", "e2": 0, "n": "neutral", "c1": 2, "c2": "contradiction", "x": -1}
    rows = [{"premise": "p", "hypothesis": h, "label": str(label)} for h, label in labels.items()]
    rows += [{"premise": "lonely", "hypothesis": "e3", "label": "0"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    source = DatasetSource(str(tmp_path), "nli")
    pairs = KINDS["nli"].load(source, 7, 0)
    assert [(row["query"], row["positive"], sorted(row["negatives"])) for row in pairs.pairs] == [
        ("p", "e1", ["c1", "c2"]),
        ("p", "e2", ["c1", "c2"]),
    ]
    assert dict(pairs.counts) == {
        "rows": 7, "contradictions, as negatives": 2, "neutral or without a label": 2, "no contradiction": 1,
    }  # fmt: skip
    assert prepare([source], 1)[0]["symmetric"]
    write_jsonl(tmp_path / "train.jsonl", [{"premise": "p", "hypothesis": "h", "label": 7}])
    with pytest.raises(ValueError, match='train.jsonl:1: "label" is 7; it must be one of entailment'):
        prepare([source], 1)


def test_a_text_of_two_classes_is_no_negative_of_either(tmp_path):
    rows = [{"text": f"{label}{i}", "label": label} for label in "abc" for i in range(3)]
    rows += [{"text": "both", "label": "a"}, {"text": "both", "label": "b"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    source = DatasetSource(str(tmp_path), "classification")
    pairs = KINDS["classification"].load(source, 5, 0)
    triplets = list(pairs.pairs)
    for row in triplets:
        if row["query"][0] in "ab":
            assert "both" not in row["negatives"]
        assert len(set(row["negatives"])) == len(row["negatives"]) >= 3
    assert pairs.counts["drawn, but also of the class"] > 0
    assert pairs.counts["rows"] == 11


def test_shards_of_the_hubs_layout_are_read_in_order(tmp_path):
    for number in range(2):
        rows = [{"query": f"q{number}{i}", "positive": "p", "negatives": ["n"]} for i in range(2)]
        Dataset.from_list(rows).to_parquet(tmp_path / f"train-{number:05}-of-00002.parquet")
    triplets = prepare([DatasetSource(str(tmp_path))], 1)
    assert triplets["query"][:] == ["q00", "q01", "q10", "q11"]


def test_a_misspelt_task_of_mteb_certifies_nothing():
    with pytest.raises(ValueError, match="mteb of my.jsonl has 'MSMARCCO', which is no task .*near are 'MSMARCO'"):
        as_source({"path": "my.jsonl", "mteb": ["MSMARCCO"]})
    assert as_source({"path": "my.jsonl", "mteb": ["MSMARCO"]}).mteb == ["MSMARCO"]
