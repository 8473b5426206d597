import json

import pytest

from nvembed.eval.data.beir import read_beir
from nvembed.train.quickstart import docs
from nvembed.train.quickstart.docs import is_held_out, split_docstring, standard_library


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
def test_nothing_held_out_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "installed_packages", lambda limit: standard_library())  # a package that copies it
    counts = docs.write_datasets(tmp_path)
    test = read_beir(str(tmp_path / "held_out"), "test")
    assert counts["held_out"] == len(test.queries) == len(test.corpus) > 300
    assert all(is_held_out(name.split(".")[0]) for name in test.queries)
    for name in ("library", "packages"):
        train = read_beir(str(tmp_path / name), "train")
        assert counts[name] == len(train.queries)
        assert not {*train.queries.values(), *train.corpus.values()} & {*test.queries.values(), *test.corpus.values()}
    rows = [json.loads(line) for line in (tmp_path / "modules" / "held_out.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} <= {name.split(".")[0] for name in test.queries}
