"""Every layout becomes triplets that mean what the paper says; every bad file is named with its line."""

import json
import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
from datasets import Dataset

from nvembed.train.arguments import Stage1Arguments, Stage2Arguments
from nvembed.train.data.registry import (
    DatasetSource,
    account,
    after_main_process,
    check_sources,
    load_blend,
    load_triplets,
    read_triplets,
)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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


def test_retrieval(beir):
    triplets = load_triplets([DatasetSource(str(beir), instruction="Find it")], num_negatives=2)
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
    triplets = load_triplets([DatasetSource(path)], num_negatives=2)
    assert [(row["query"], row["positive"]) for row in triplets] == [
        ("a cat sleeps", "a cat is asleep"), ("a cat is asleep", "a cat sleeps"),
        ("rain falls", "it rains"), ("it rains", "rain falls"),
    ]  # fmt: skip
    assert all(row["symmetric"] for row in triplets)
    assert all(not {row["query"], row["positive"]} & set(row["negatives"]) for row in triplets)
    assert all(len(row["negatives"]) == 2 for row in triplets)


@pytest.fixture
def labelled(tmp_path):
    rows = [
        {"text": f"{label} text {i}", "label": label} for label in ("card_lost", "card_new", "rate") for i in range(4)
    ]
    write_jsonl(tmp_path / "train.jsonl", [*rows, {"text": "alone", "label": "single"}])
    return tmp_path


def test_example_based_classification(labelled):
    triplets = load_triplets([DatasetSource(str(labelled))], num_negatives=3)
    assert len(triplets) == 12, "a class of one text has no positive"
    for row in triplets:
        label = row["query"].split(" ")[0]
        assert row["positive"].startswith(label)
        assert row["positive"] != row["query"]
        assert len(row["negatives"]) == 3
        assert not any(negative.startswith(label) for negative in row["negatives"])
        assert row["symmetric"]


def test_label_based_classification(labelled):
    triplets = load_triplets([DatasetSource(str(labelled), "label_classification")], num_negatives=7)
    assert triplets[0]["query"] == "card_lost text 0"
    assert triplets[0]["positive"] == "card lost"
    assert sorted(triplets[0]["negatives"]) == ["card new", "rate", "single"]
    assert not triplets[0]["symmetric"]


def test_ready_triplets_keep_their_negatives_and_instruction(tmp_path):
    row = {"query": "q", "positive": "p", "negatives": ["n1", "n2"], "instruction": "Own", "symmetric": True}
    path = write_jsonl(tmp_path / "mine.jsonl", [row, {"query": "r", "positive": "s", "negatives": ["n"]}])
    first, second = load_triplets([DatasetSource(path)], num_negatives=1)
    assert (first["negatives"], first["instruction"], first["symmetric"]) == (["n1", "n2"], "Own", True)
    assert (second["negatives"], second["instruction"], second["symmetric"]) == (["n"], "", False)
    first, _ = load_triplets([DatasetSource(path, instruction="Recipe's", symmetric=False)], num_negatives=1)
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
    triplets = load_triplets([DatasetSource(path)], num_negatives=1).to_list()
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
    triplets = load_triplets([DatasetSource(write_jsonl(tmp_path / "t.jsonl", rows), samples=5)], 1)
    assert len(triplets) == 5
    (message,) = [record.message for record in caplog.records]
    assert '"hard_neg" hold texts that are not read' in message
    assert '"id"' not in message


def test_triplets_without_negatives_get_mined_ones(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"query": f"word{i} up", "positive": f"word{i} down"} for i in range(5)])
    for row in load_triplets([DatasetSource(path)], num_negatives=2):
        assert len(set(row["negatives"]) - {row["positive"]}) == 2


def test_parquet_and_csv(tmp_path, labelled):
    from datasets import load_dataset

    table = load_dataset("json", data_files=str(labelled / "train.jsonl"), split="train")
    table.to_parquet(tmp_path / "train.parquet")
    table.to_csv(tmp_path / "table.csv")
    expected = load_triplets([DatasetSource(str(labelled), name="t")], 3)
    for path in (tmp_path / "train.parquet", tmp_path / "table.csv"):
        assert load_triplets([DatasetSource(str(path), name="t")], 3).to_list() == expected.to_list()


def test_sts_samples_whole_pairs_and_knows_the_others(tmp_path):
    rows = [{"sentence1": "a cat sleeps", "sentence2": f"a cat naps {i}", "score": 5} for i in range(3)]
    rows.append({"sentence1": "a cat", "sentence2": "cat food", "score": 1})
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    first, second = load_triplets([DatasetSource(path, samples=1)], num_negatives=4)
    assert (first["query"], first["positive"]) == (second["positive"], second["query"])
    (from_the_shared,) = (row for row in (first, second) if row["query"] == "a cat sleeps")
    assert not any("naps" in negative for negative in from_the_shared["negatives"]), "close in pairs not sampled"


def test_positives_of_one_query_are_never_its_negatives(tmp_path):
    rows = [{"query": "reset password", "positive": f"reset password way {i}"} for i in range(3)]
    rows += [{"query": "other", "positive": f"password text {i}"} for i in range(4)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    for row in load_triplets([DatasetSource(path)], num_negatives=3)[:3]["negatives"]:
        assert len(row) == 3
        assert all(negative.startswith("password text") for negative in row)


def test_the_global_instruction_fills_only_gaps(tmp_path):
    rows = [{"query": "q", "positive": "p", "instruction": "own"}, {"query": "r", "positive": "s"}]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert load_triplets([DatasetSource(path)], 0, instruction="all")["instruction"] == ["own", "all"]


def test_labels_that_are_numbers_have_no_words(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(4)])
    with pytest.raises(ValueError, match="labels are the numbers"):
        load_triplets([DatasetSource(path, "label_classification")], 1)
    assert len(load_triplets([DatasetSource(path, "classification")], 1)) == 4


def test_label_text_outranks_the_number(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2, "label_text": ["no_way", "yes"][i % 2]} for i in range(4)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert load_triplets([DatasetSource(path, "label_classification")], 1)["positive"][:2] == ["no way", "yes"]


def test_samples_are_a_fixed_choice(labelled):
    source = DatasetSource(str(labelled), samples=5)
    first, second = (load_triplets([source], 1, seed=3)["query"] for _ in range(2))
    assert len(first) == 5
    assert first == second
    assert first != load_triplets([source], 1, seed=4)["query"]


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
        load_triplets([DatasetSource(str(path))], num_negatives=1)


def test_bad_sources_are_named(tmp_path, beir):
    with pytest.raises(ValueError, match="kind is 'retrieve'; known kinds are classification, clustering"):
        DatasetSource("x", "retrieve")
    with pytest.raises(ValueError, match="datasets: instruction of x holds a NUL character"):
        DatasetSource("x", instruction="a\0b")
    with pytest.raises(ValueError, match="samples is 0"):
        DatasetSource("x", samples=0)
    with pytest.raises(ValueError, match="datasets is empty"):
        load_triplets([], 1)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "data.txt").write_text("x")
    with pytest.raises(ValueError, match=r"odd: unknown dataset layout: no train.jsonl.*found \['data.txt'\]"):
        load_triplets([DatasetSource(str(tmp_path / "odd"))], 1)
    with pytest.raises(ValueError, match=r"qrels/dev.tsv is missing; found"):
        load_triplets([DatasetSource(str(beir), split="dev")], 1)
    with pytest.raises(ValueError, match="neither a local file or folder nor a dataset that the Hub gives"):
        load_triplets([DatasetSource(str(tmp_path / "absent"))], 1)
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "t", "label": "only"}] * 3)
    with pytest.raises(ValueError, match=r"one label only, \['only'\]"):
        load_triplets([DatasetSource(one)], 1)


def test_ragged_rows_train_and_what_is_missing_is_said_once(tmp_path, caplog):
    rows = [{"query": "q", "positive": "p", "negatives": ["n", "m"]}, {"query": "r", "positive": "s"}] * 3
    source = DatasetSource(write_jsonl(tmp_path / "mine.jsonl", rows))
    triplets = load_triplets([source], num_negatives=2)
    assert [len(row) for row in triplets["negatives"]] == [2, 0] * 3
    (message,) = [record.message for record in caplog.records]
    assert "3 of 6 triplets have fewer than num_negatives = 2 negatives; 6 of 12 places stay empty" in message


def test_no_instruction_is_an_error(tmp_path):
    rows = [{"query": "q", "positive": "p", "negatives": ["n", "m"]}, {"query": "r", "positive": "s"}]
    source = DatasetSource(write_jsonl(tmp_path / "mine.jsonl", rows))
    with pytest.raises(ValueError, match=r"mine.jsonl has no instruction, .*set `instruction:` in its entry"):
        load_triplets([source], num_negatives=0, instruction=None)
    assert load_triplets([DatasetSource(source.path, instruction="")], 0, instruction=None)[0]["instruction"] == ""


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


def blend_of(tmp_path, sources, **options):
    arguments = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "use_cpu": True}
    arguments = Stage1Arguments(**(arguments | options))
    return load_blend(arguments, sources, num_negatives=1, instruction="all"), arguments


def test_checkpoints_keep_the_data_that_they_were_trained_on(tmp_path, labelled, monkeypatch):
    sources = [DatasetSource(str(labelled), name="labels")]
    table = tmp_path / "out" / "triplets" / "000.arrow"
    blend_of(tmp_path, sources)
    made = table.read_bytes()
    (tmp_path / "out" / "checkpoint-1").mkdir()
    os.utime(labelled / "train.jsonl", (0, 0))  # copied or touched, it is the same data
    monkeypatch.chdir(labelled)
    blend_of(tmp_path, [DatasetSource(".", name="labels")])
    for arguments, words in (
        ({"name": "others"}, "datasets were labels and are others"),
        ({"name": "labels", "samples": 5}, "labels: samples was None and is 5"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-1 was trained on other data: {words}; give what"):
            blend_of(tmp_path, [DatasetSource(str(labelled), **arguments)])
    with pytest.raises(ValueError, match="seed was 42 and is 1;"):
        blend_of(tmp_path, sources, data_seed=1)
    with (labelled / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a text of today", "label": "rate"}) + "\n")
    with pytest.raises(ValueError, match="labels: train.jsonl has changed; .* or name another --output_dir"):
        blend_of(tmp_path, sources)
    assert table.read_bytes() == made
    (tmp_path / "out" / "checkpoint-1").rmdir()
    blend_of(tmp_path, sources)
    assert b"a text of today" in table.read_bytes(), "edited, made anew"


def test_files_of_the_kind_that_is_read_are_compared(tmp_path, beir):
    write_jsonl(beir / "train.jsonl", [{"query": "q", "positive": "p", "negatives": ["n"]}])
    assert account(DatasetSource(str(beir), kind="triplets"))["files"].keys() == {"train.jsonl"}
    assert account(DatasetSource(str(beir)))["files"].keys() == {"corpus.jsonl", "queries.jsonl", "train.tsv"}
    assert account(DatasetSource("org/name"))["path"] == "org/name"


def test_a_set_from_which_nothing_could_be_learned_is_refused(tmp_path):
    same = write_jsonl(tmp_path / "same.jsonl", [{"query": "q", "positive": "p"}] * 8)  # nothing to mine
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "per_device_train_batch_size": 4}
    sources = [DatasetSource(same, instruction="")]
    words = r"same.jsonl: none of its 8 triplets has a negative, .* nothing would be learned"
    with pytest.raises(ValueError, match=words):
        load_blend(Stage2Arguments(**options), sources, 2)
    with pytest.raises(ValueError, match=words):
        load_blend(Stage1Arguments(**(options | {"per_device_train_batch_size": 1})), sources, 2)
    assert len(load_blend(Stage1Arguments(**(options | {"max_steps": 2})), sources, 2)) == 8, "in-batch negatives"


def test_a_table_on_another_machines_disk_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"000.arrow is absent on .* must be on a disk that all machines share"):
        read_triplets(tmp_path / "triplets" / "000.arrow")


def test_processes_that_wait_too_long_say_what_for(tmp_path, caplog):
    """By a stand-in for the timeout of the process group, which transformers sets on GPUs alone."""

    @contextmanager
    def main_process_first(local, desc):
        raise RuntimeError("Timed out waiting 3000ms for recv operation to complete")
        yield

    arguments = SimpleNamespace(ddp_timeout=3, world_size=2, process_index=0, main_process_first=main_process_first)
    with (
        pytest.raises(TimeoutError, match=r"did not finish the triplets .* raise --ddp_timeout"),
        after_main_process(arguments),
    ):
        pass
    (message,) = [record.message for record in caplog.records]
    assert "The other processes wait ddp_timeout = 3 s for the triplets" in message, "said before the wait"
    arguments.main_process_first = lambda local, desc: nullcontext()
    with pytest.raises(RuntimeError, match="of its own"), after_main_process(arguments):
        raise RuntimeError("of its own")


def by_texts(triplet: dict) -> list:
    return [triplet[column] for column in ("dataset", "query", "positive", "negatives", "instruction", "symmetric")]


def test_a_blend_lasts_the_run_and_is_made_once(tmp_path, labelled, beir):
    sources = [DatasetSource(str(labelled), name="labels"), DatasetSource(str(beir), name="papers")]
    triplets = load_triplets(sources, 1, seed=42, instruction="all").to_list()
    blend, arguments = blend_of(tmp_path, sources, num_train_epochs=2)
    assert arguments.num_train_epochs == 1, "the Trainer passes over it once"
    for epoch in (blend[i] for i in range(len(triplets))), (blend[len(triplets) + i] for i in range(len(triplets))):
        assert sorted(map(by_texts, epoch)) == sorted(map(by_texts, triplets))
    assert len(blend_of(tmp_path, sources, max_steps=7)[0]) == 28

    made = (tmp_path / "out" / "triplets" / "000.arrow").stat().st_mtime_ns
    blend_of(tmp_path, sources)
    assert (tmp_path / "out" / "triplets" / "000.arrow").stat().st_mtime_ns == made, "mining is not done twice"
    sources[0].samples = 1
    assert len(blend_of(tmp_path, sources, num_train_epochs=1)[0]) < len(triplets), "other settings, other tables"
    with pytest.raises(ValueError, match="triplets do not fill one batch of 400"):
        blend_of(tmp_path, sources, per_device_train_batch_size=100, gradient_accumulation_steps=4)
