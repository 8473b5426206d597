"""Every layout becomes triplets that mean what the paper says; every bad file is named with its line."""

import pytest
from datasets import Dataset

from nvembed.train.arguments import DataArguments
from nvembed.train.data.prepared import provenance, read_tables
from nvembed.train.data.sets import as_source
from nvembed.train.data.source import DatasetSource, check_sources
from tests.triplets import prepare, write_jsonl


def test_retrieval(beir):
    triplets = prepare([DatasetSource(str(beir), instruction="Find it")], num_negatives=2)
    assert [(row["query"], row["positive"]) for row in triplets] == [
        ("do apples grow", "Fruit apples grow on old trees"),  # title and text
        ("do apples grow", "Fruit apples are red or green"),
        ("boats", "boats sail on the sea"),  # a grade of 0 is no relevance
    ]
    for row in triplets:
        assert len(set(row["negatives"])) == 2
        assert row["instruction"] == "Find it"
        assert not row["symmetric"]
    relevant = {"Fruit apples grow on old trees", "Fruit apples are red or green"}
    assert not relevant & {*triplets[0]["negatives"], *triplets[1]["negatives"]}, "another relevant document"


def test_sts(tmp_path):
    path = write_jsonl(
        tmp_path / "train.jsonl",
        [
            {"sentence1": "a cat sleeps", "sentence2": "a cat is asleep", "score": 4.0},
            {"sentence1": "a dog barks", "sentence2": "a dog sleeps", "score": 3.9},
            {"sentence1": "rain falls", "sentence2": "it rains", "score": 5},
        ],
    )
    triplets = prepare([DatasetSource(path)], num_negatives=2)
    assert [(row["query"], row["positive"]) for row in triplets] == [
        ("a cat sleeps", "a cat is asleep"), ("a cat is asleep", "a cat sleeps"),
        ("rain falls", "it rains"), ("it rains", "rain falls"),
    ]  # fmt: skip
    assert all(row["symmetric"] for row in triplets)
    assert all(not {row["query"], row["positive"]} & set(row["negatives"]) for row in triplets)
    assert all(len(row["negatives"]) == 2 for row in triplets)


def test_example_based_classification(labelled):
    triplets = prepare([DatasetSource(str(labelled))], num_negatives=3)
    assert len(triplets) == 12, "a class of one text has no positive"
    for row in triplets:
        label = row["query"].split(" ")[0]
        assert row["positive"].startswith(label)
        assert row["positive"] != row["query"]
        assert len(row["negatives"]) == 3
        assert not any(negative.startswith(label) for negative in row["negatives"])
        assert row["symmetric"]


def test_label_based_classification(labelled):
    triplets = prepare([DatasetSource(str(labelled), "label_classification")], num_negatives=7)
    assert triplets[0]["query"] == "card_lost text 0"
    assert triplets[0]["positive"] == "card lost"
    assert sorted(triplets[0]["negatives"]) == ["card new", "rate", "single"]
    assert not triplets[0]["symmetric"]


def test_triplets_may_come_with_their_class(tmp_path):
    known = {"query": "a", "positive": "b", "negatives": ["c"], "class": "x"}
    rows = [known, {"query": "d", "positive": "e", "negatives": ["f"]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [row["class"] for row in prepare([DatasetSource(path, instruction="")], 1)] == ["x", None]


def test_a_pair_has_a_class_where_no_other_label_casts_doubt_on_it(tmp_path):
    labels = {"a0": "a", "a1": "a", "a2": "a", "b0": "b", "b1": "b", "ab": "a|b", "c0": "c", "c1": "c"}
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text, "label": label} for text, label in labels.items()])
    source = DatasetSource(path, "classification", instruction="", label_separator="|")
    for row in prepare([source], num_negatives=2):
        doubtful = "ab" in (row["query"], row["positive"])
        assert row["class"] == (None if doubtful else labels[row["query"]])
    for row in prepare([DatasetSource(path, "label_classification", instruction="", label_separator="|")], 2):
        assert row["class"] == (None if row["query"] == "ab" else labels[row["query"]])


@pytest.mark.parametrize("kind", ["classification", "label_classification"])
def test_a_text_in_two_rows_has_the_labels_of_both(tmp_path, kind):
    rows = [{"text": text, "label": text[0]} for text in ("a0", "a1", "b0", "b1", "c0", "c1")]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"text": "both", "label": "a"}, {"text": "both", "label": "b"}])
    triplets = [row for row in prepare([DatasetSource(path, kind, instruction="")], 7) if row["query"] == "both"]
    assert len(triplets) == 2
    for row in triplets:
        assert row["class"] is None
        assert {negative[0] for negative in row["negatives"]} == {"c"}


def test_ready_triplets_keep_their_negatives_and_instruction(tmp_path):
    row = {"query": "q", "positive": "p", "negatives": ["n1", "n2"], "instruction": "Own", "symmetric": True}
    path = write_jsonl(tmp_path / "mine.jsonl", [row, {"query": "r", "positive": "s", "negatives": ["n"]}])
    first, second = prepare([DatasetSource(path)], num_negatives=1)
    assert (first["negatives"], first["instruction"], first["symmetric"]) == (["n1", "n2"], "Own", True)
    assert (second["negatives"], second["instruction"], second["symmetric"]) == (["n"], "", False)
    first, _ = prepare([DatasetSource(path, instruction="Recipe's", symmetric=False)], num_negatives=1)
    assert (first["instruction"], first["symmetric"]) == ("Recipe's", False)


LAYOUTS = {
    "sentence-transformers": [{"anchor": "q", "positive": "p", "negative_2": "n2", "negative_10": "n10"}],
    "sentence-transformers, one": [{"query": "q", "positive": "p", "negative": "n2"}],
    "FlagEmbedding": [
        {"query": "q", "pos": ["p", "p2"], "neg": ["n2", "n10"], "pos_scores": [0.9, 0.8], "neg_scores": [0.5, 0.4],
         "prompt": "Find it"}
    ],
    "tevatron": [
        {"query_id": "7", "query": "q", "positive_passages": [{"docid": "1", "title": "Title", "text": "p"}],
         "negative_passages": [{"docid": "2", "title": "", "text": "n2"}, {"docid": "3", "text": "n10"}]}
    ],
}  # fmt: skip


@pytest.mark.parametrize("as_table", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_people_come_with_are_read_as_they_are(tmp_path, layout, as_table, caplog):
    path = write_jsonl(tmp_path / "train.jsonl", LAYOUTS[layout])
    if as_table:
        path = str(tmp_path / "train.parquet")
        Dataset.from_list(LAYOUTS[layout]).to_parquet(path)
    triplets = prepare([DatasetSource(path)], num_negatives=1).to_list()
    assert not caplog.records
    negatives = ["n2"] if layout == "sentence-transformers, one" else ["n2", "n10"]
    positives = {"FlagEmbedding": ["p", "p2"], "tevatron": ["Title p"]}.get(layout, ["p"])
    assert [(row["query"], row["positive"], row["negatives"]) for row in triplets] == [
        ("q", positive, negatives) for positive in positives
    ]
    if layout == "FlagEmbedding":
        assert [row["positive_score"] for row in triplets] == [0.9, 0.8]
        assert [row["negative_scores"] for row in triplets] == [[0.5, 0.4]] * 2
        assert {row["instruction"] for row in triplets} == {"Find it"}
    else:
        assert triplets[0]["positive_score"] is triplets[0]["negative_scores"] is None


def test_samples_count_triplets_and_unread_texts_are_named(tmp_path, caplog):
    rows = [
        {"query": f"q{i}", "pos": [f"p{i}", f"o{i}"], "neg": ["n"], "hard_neg": "a text of words", "id": "x1"}
        for i in range(4)
    ]
    triplets = prepare([DatasetSource(write_jsonl(tmp_path / "t.jsonl", rows), samples=5)], 1)
    assert len(triplets) == 5
    (message,) = [record.message for record in caplog.records]
    assert '"hard_neg" hold texts that are not read' in message
    assert '"id"' not in message


def test_triplets_without_negatives_get_mined_ones(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"query": f"word{i} up", "positive": f"word{i} down"} for i in range(5)])
    for row in prepare([DatasetSource(path)], num_negatives=2):
        assert len(set(row["negatives"]) - {row["positive"]}) == 2


def test_parquet_and_csv(tmp_path, labelled):
    from datasets import load_dataset

    table = load_dataset("json", data_files=str(labelled / "train.jsonl"), split="train")
    table.to_parquet(tmp_path / "train.parquet")
    table.to_csv(tmp_path / "table.csv")
    expected = prepare([DatasetSource(str(labelled), name="t")], 3)
    for path in (tmp_path / "train.parquet", tmp_path / "table.csv"):
        assert prepare([DatasetSource(str(path), name="t")], 3).to_list() == expected.to_list()


def test_sts_samples_whole_pairs_and_knows_the_others(tmp_path):
    rows = [{"sentence1": "a cat sleeps", "sentence2": f"a cat naps {i}", "score": 5} for i in range(3)]
    rows.append({"sentence1": "a cat", "sentence2": "cat food", "score": 1})
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    first, second = prepare([DatasetSource(path, samples=1)], num_negatives=4)
    assert (first["query"], first["positive"]) == (second["positive"], second["query"])
    (from_the_shared,) = (row for row in (first, second) if row["query"] == "a cat sleeps")
    assert not any("naps" in negative for negative in from_the_shared["negatives"]), "close in pairs not sampled"


def test_positives_of_one_query_are_never_its_negatives(tmp_path):
    rows = [{"query": "reset password", "positive": f"reset password way {i}"} for i in range(3)]
    rows += [{"query": "other", "positive": f"password text {i}"} for i in range(4)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    for row in prepare([DatasetSource(path)], num_negatives=3)[:3]["negatives"]:
        assert len(row) == 3
        assert all(negative.startswith("password text") for negative in row)


def test_positives_of_one_query_in_any_spelling_are_never_its_negatives(tmp_path):
    """Nor those of another id of the same text that were not drawn."""
    rows = [
        {"query": query, "positive": f"reset password way {i}"} for i, query in enumerate(("Reset it?", "reset  it"))
    ]
    path = write_jsonl(tmp_path / "t.jsonl", [*rows, *({"query": f"q{i}", "positive": f"w {i}"} for i in range(3))])
    for row in prepare([DatasetSource(path)], num_negatives=4)[:2]["negatives"]:
        assert len(row) == 3 and all(negative.startswith("w ") for negative in row)
    folder = tmp_path / "beir"
    texts = ["password of a bank", "password of a shop", "a boat", "a tree"]
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": "forgot password"} for i in range(2)])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    (row,) = prepare([DatasetSource(str(folder), samples=1, instruction="")], num_negatives=4)
    assert sorted(row["negatives"]) == ["a boat", "a tree"]


def test_the_global_instruction_fills_only_gaps(tmp_path):
    rows = [{"query": "q", "positive": "p", "instruction": "own"}, {"query": "r", "positive": "s"}]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert prepare([DatasetSource(path)], 0, instruction="all")["instruction"] == ["own", "all"]


def test_labels_that_are_numbers_have_no_words(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(4)])
    with pytest.raises(ValueError, match="labels are the numbers"):
        prepare([DatasetSource(path, "label_classification")], 1)
    assert len(prepare([DatasetSource(path, "classification")], 1)) == 4


def test_labels_alike_in_words_are_no_negatives_of_each_other(tmp_path):
    labels = ["lost_card", "lost card", "top up", "top up "]
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": labels[i]} for i in range(4)])
    triplets = prepare([DatasetSource(path, "label_classification")], 3)
    pairs = {"lost card": ["top up"], "top up": ["lost card"]}
    assert [pairs[positive] for positive in triplets["positive"]] == triplets["negatives"][:]
    path = write_jsonl(tmp_path / "u.jsonl", [{"text": "t", "label": "_"}, {"text": "u", "label": "x"}])
    with pytest.raises(ValueError, match="label '_' has no words"):
        prepare([DatasetSource(path, "label_classification")], 1)
    path = write_jsonl(tmp_path / "v.jsonl", [{"text": "t", "label": " "}, {"text": "u", "label": "x"}])
    with pytest.raises(ValueError, match='v.jsonl:1: "label" is empty'):
        prepare([DatasetSource(path, "classification")], 1)


def test_label_text_outranks_the_number(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2, "label_text": ["no_way", "yes"][i % 2]} for i in range(4)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert prepare([DatasetSource(path, "label_classification")], 1)["positive"][:2] == ["no way", "yes"]


def test_samples_are_a_fixed_choice(labelled):
    source = DatasetSource(str(labelled), samples=5)
    first, second = (prepare([source], 1, seed=3)["query"] for _ in range(2))
    assert len(first) == 5
    assert first == second
    assert first != prepare([source], 1, seed=4)["query"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"query": "q", "positive": "p"}', "", '{"query": "q"}'], r'bad.jsonl:3: "positive" is missing'),
        (['{"query": "q", "positive": "  "}'], r'bad.jsonl:1: "positive" is empty'),
        (['{"query": 7, "positive": "p"}'], r'bad.jsonl:1: "query" is 7 of type int'),
        (['{"query": "q", "positive": "p", "negatives": "n"}'], r"bad.jsonl:1: \"negatives\" is 'n', not a list"),
        (['{"query": "q", "positive": "p", "negatives": ["n", ""]}'], r'bad.jsonl:1: "negatives\[1\]" is empty'),
        (['{"query": "q"}'], r'bad.jsonl:1: "positive" is missing'),
        (['{"query": "q", "anchor": "a", "positive": "p"}'], r'bad.jsonl:1: "query" and "anchor" are both there'),
        (['{"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": [1, 2]}'], r"bad.jsonl:1: the scores of the neg"),
        (['{"query": "q", "pos": []}'], r'bad.jsonl:1: "pos" is an empty list'),
        (['{"query": "q", "pos": "p"}'], r"bad.jsonl:1: \"pos\" is 'p', not a list"),
        (
            ['{"query": "q", "positive": "p", "negatives": ["n", "\\ud83d"]}'],
            r'bad.jsonl:1: "negatives\[1\]" holds half',
        ),
        (['{"query": "q", "positive": "a\\u0000b"}'], r'bad.jsonl:1: "positive" holds a NUL character at position 1'),
        (['{"query": "q", "positive": "p", "instruction": "\\ud83d"}'], r'bad.jsonl:1: "instruction" holds half'),
        (['{"query": "q", "pos": ["p"], "prompt": "\\u0000"}'], r'bad.jsonl:1: "prompt" holds a NUL'),
        (['{"query": "q", "positive": "p", "dataset": 5}'], r'bad.jsonl:1: "dataset" is 5 of type int'),
        (['{"query": "q", "positive": "p", "positive_score": NaN}'], r"bad.jsonl:1: the scores of the positives are"),
        (['{"text": "\\ud83d", "label": "a"}'], r'bad.jsonl:1: "text" holds half of a surrogate pair'),
        (['{"text": "t", "label": "\\ud83d"}'], r'bad.jsonl:1: "label" holds half of a surrogate pair'),
        (['{"sentence1": "a\\u0000", "sentence2": "b", "score": 5}'], r'bad.jsonl:1: "sentence1" holds a NUL'),
        (['{"query": "q", "positive": "p", "symmetric": "false"}'], r"bad.jsonl:1: \"symmetric\" is 'false'"),
        (['{"query": "q", "positive": "p", "instruction": 5}'], r'bad.jsonl:1: "instruction" is 5'),
        (['{"sentence1": "a", "sentence2": "b", "score": "high"}'], r"bad.jsonl:1: \"score\" is 'high'"),
        (['{"text": "a", "label": ["b"]}'], r"bad.jsonl:1: \"label\" is \['b'\]"),
        (['{"query": "q", '], r"bad.jsonl:1: not valid JSON"),
        (["[1, 2]"], r"bad.jsonl:1: a list, not a JSON object"),
        (['{"title": "t", "body": "b"}'], r"unknown dataset layout with columns \['body', 'title'\]"),
        ([], r"split 'train' is empty"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, lines, words):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=words):
        prepare([DatasetSource(str(path))], num_negatives=1)


def test_bad_sources_are_named(tmp_path, beir):
    with pytest.raises(ValueError, match="kind is 'retrieve'; known kinds are classification, clustering"):
        DataArguments([{"path": "x", "kind": "retrieve"}])
    with pytest.raises(ValueError, match="datasets: instruction of x holds a NUL character"):
        DatasetSource("x", instruction="a\0b")
    with pytest.raises(ValueError, match="samples is 0"):
        DatasetSource("x", samples=0)
    with pytest.raises(ValueError, match="datasets is empty"):
        prepare([], 1)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "data.txt").write_text("x")
    with pytest.raises(ValueError, match=r"odd: unknown dataset layout: no train.jsonl.*found \['data.txt'\]"):
        prepare([DatasetSource(str(tmp_path / "odd"))], 1)
    with pytest.raises(ValueError, match=r"qrels/dev.tsv is missing; found"):
        prepare([DatasetSource(str(beir), split="dev")], 1)
    with pytest.raises(ValueError, match="absent does not exist; in a recipe, relative paths start at the recipe"):
        prepare([DatasetSource(str(tmp_path / "absent"))], 1)
    with pytest.raises(ValueError, match="absent does not exist; in a recipe, relative paths start at the recipe"):
        prepare([DatasetSource(str(tmp_path / "absent"), "retrieval")], 1)
    with pytest.raises(ValueError, match="neither a local file or folder nor a dataset found on the Hub"):
        prepare([DatasetSource("org/absent")], 1)
    file = write_jsonl(tmp_path / "whole.jsonl", [{"query": "q", "positive": "p", "negatives": ["n"]}])
    with pytest.raises(ValueError, match="whole.jsonl: split is 'dev', and a file is read whole; leave split out"):
        prepare([DatasetSource(str(file), split="dev")], 1)
    with pytest.raises(ValueError, match="whole.jsonl: split is 'dev', and a file is read whole"):
        prepare([as_source({"set": "nq", "path": str(file), "split": "dev"})], 1)
    with pytest.raises(ValueError, match="whole.jsonl: config is 'en', which Hub datasets have and local data has not"):
        prepare([DatasetSource(str(file), config="en")], 1)
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "t", "label": "only"}] * 3)
    with pytest.raises(ValueError, match=r"one label only, \['only'\]"):
        prepare([DatasetSource(one)], 1)


def test_ragged_rows_train_and_what_is_missing_is_said_once(tmp_path, caplog):
    rows = [{"query": "q", "positive": "p", "negatives": ["n", "m"]}, {"query": "r", "positive": "s"}] * 3
    source = DatasetSource(write_jsonl(tmp_path / "mine.jsonl", rows))
    triplets = prepare([source], num_negatives=2)
    assert [len(row) for row in triplets["negatives"]] == [2, 0] * 3
    (message,) = [record.message for record in caplog.records]
    assert "3 of 6 triplets have fewer than num_negatives = 2 negatives; 6 of 12 places stay empty" in message


def test_no_instruction_is_an_error(tmp_path):
    rows = [{"query": "q", "positive": "p", "negatives": ["n", "m"]}, {"query": "r", "positive": "s"}]
    source = DatasetSource(write_jsonl(tmp_path / "mine.jsonl", rows))
    with pytest.raises(ValueError, match=r"mine.jsonl has no instruction, .*set `instruction:` in its entry"):
        prepare([source], num_negatives=0, instruction=None)
    assert prepare([DatasetSource(source.path, instruction="")], 0, instruction=None)[0]["instruction"] == ""


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"weight": 2}, {}, "datasets: b has no weight and others have one"),
        ({"name": "b"}, {}, "datasets: two are named 'b'"),
        ({"weight": 0}, {}, "a: weight is 0; it must be above 0"),
    ],
)
def test_sources_that_do_not_blend(first, second, words):
    with pytest.raises(ValueError, match=words):
        check_sources([DatasetSource("a", **first), DatasetSource("b", **second)])


def test_files_of_the_kind_that_is_read_are_compared(tmp_path, beir):
    write_jsonl(beir / "train.jsonl", [{"query": "q", "positive": "p", "negatives": ["n"]}])
    assert provenance(DatasetSource(str(beir), kind="triplets"))["files"].keys() == {"train.jsonl"}
    assert provenance(DatasetSource(str(beir)))["files"].keys() == {"corpus.jsonl", "queries.jsonl", "train.tsv"}
    assert provenance(DatasetSource("org/name"))["path"] == "org/name"


def test_a_table_on_another_machines_disk_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"000.arrow is absent on .* must be on a disk that all machines share"):
        read_tables(tmp_path / "triplets", [DatasetSource("x")])
