import json

import pytest

from nvembed.eval.data.beir import read_beir
from nvembed.train.quickstart import docs
from nvembed.train.quickstart.docs import TEST, VALIDATION, is_in, split_docstring, standard_library


def test_split_docstring():
    assert split_docstring("Open a file. Then read\n    it.") == ("Open a file.", "Then read it.")
    assert split_docstring("Summary without a stop\n\n    The rest, indented.") == (
        "Summary without a stop",
        "The rest, indented.",
    )
    assert split_docstring("Version 3.11 is read. Next.") == ("Version 3.11 is read.", "Next.")
    assert split_docstring("One sentence only") == ("One sentence only", "")


@pytest.mark.slow
def test_standard_library_gives_enough_distinct_pairs():
    pairs = standard_library()
    assert len(pairs) > 2000
    assert len({pair.summary for pair in pairs}) == len({pair.name for pair in pairs}) == len(pairs)
    by_name = {pair.name: pair for pair in pairs}
    assert by_name["textwrap.dedent"].summary == "Remove any common leading whitespace from every line in `text`."
    assert by_name["textwrap.dedent"].module == "textwrap"


@pytest.mark.slow
@pytest.mark.parametrize("validate", [False, True])
def test_nothing_held_out_is_trained_on(tmp_path, monkeypatch, validate):
    pairs = standard_library()
    monkeypatch.setattr(docs, "installed_packages", lambda limit: pairs)  # a package that copies it
    counts = docs.write_datasets(tmp_path, validate)
    never_trained_on = {text for pair in pairs if is_in(pair.module, TEST) for text in (pair.summary, pair.body)}
    test = read_beir(str(tmp_path / "held_out"), "test")
    assert counts["held_out"] == len(test.queries) == len(test.corpus) > 300
    share = VALIDATION if validate else TEST
    assert all(is_in(name.split(".")[0], share) for name in test.queries)
    for name in ("library", "packages"):
        train = read_beir(str(tmp_path / name), "train")
        assert counts[name] == len(train.queries)
        texts = {*train.queries.values(), *train.corpus.values()}
        assert not texts & {*test.queries.values(), *test.corpus.values()}
        assert not texts & never_trained_on
    rows = [json.loads(line) for line in (tmp_path / "modules" / "held_out.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} <= {name.split(".")[0] for name in test.queries}
