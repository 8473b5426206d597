"""Shrunk vectors against their definitions, and the script on a small task."""

import json

import numpy as np
import pytest

from nvembed.eval.models import scaled_to_1
from nvembed.eval.vector_size import Variant, VectorSizeArguments, run
from tests.triplets import write_jsonl


@pytest.fixture
def vectors() -> np.ndarray:
    generator = np.random.default_rng(0)
    return scaled_to_1(generator.normal(size=(300, 32)).astype(np.float32) + 0.5)


def test_variants_are_what_they_say(vectors):
    calibration, texts = vectors[:200], vectors[200:]
    assert np.allclose(Variant(16, "float32", False).apply(texts, None), scaled_to_1(texts[:, :16]))
    centred = scaled_to_1((texts - calibration.mean(0))[:, :16])
    assert np.allclose(Variant(16, "float32", True).apply(texts, calibration), centred, atol=1e-6)
    assert np.array_equal(Variant(16, "binary", True).apply(texts, calibration), np.where(centred > 0, 1, -1))
    assert Variant(16, "binary", False).bytes == 2 and Variant(16, "int8", False).bytes == 16
    known = scaled_to_1((calibration - calibration.mean(0))[:, :16])
    low, high = known.min(0), known.max(0)
    codes = Variant(16, "int8", True).apply(texts, calibration)
    expected = (centred.clip(low, high) - low) / ((high - low) / 255) - 128
    assert codes.min() >= -128 and codes.max() <= 127 and np.abs(codes - expected).max() <= 1.0
    inside = Variant(16, "int8", False).apply(calibration, calibration)
    assert np.corrcoef(inside[:, 3], scaled_to_1(calibration[:, :16])[:, 3])[0, 1] > 0.999


@pytest.fixture
def asked(checkpoint, tmp_path, sentences):
    rows = [
        {"sentence1": a, "sentence2": b, "score": i % 5} for i, (a, b) in enumerate(zip(sentences, sentences[::-1]))
    ]
    write_jsonl(tmp_path / "task" / "test.jsonl", rows)
    (tmp_path / "tasks.yaml").write_text("tasks:\n- {type: STS, path: task, instruction: 'Find similar text'}\n")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text.upper()} for text in sentences])

    def make(**overrides) -> VectorSizeArguments:
        options = {"tasks": [str(tmp_path / "tasks.yaml")], "calibration": corpus, "dims": [32, 16]}
        options |= {"output_dir": str(tmp_path / "out"), "max_length": 64}
        return VectorSizeArguments(str(checkpoint), **(options | overrides))

    return make


def test_every_variant_is_measured_and_kept(asked, tmp_path, capsys):
    entries = run(asked())
    assert len(entries) == 2 * 3 * 2 and all(-100 <= entry["scores"]["task"] <= 100 for entry in entries)
    assert (
        "| 16 | binary | 2 |" in capsys.readouterr().out.replace("  ", " ")
        and (tmp_path / "out/vector_size.png").is_file()
    )
    file = tmp_path / "out" / "vector_size.json"
    content = json.loads(file.read_text())
    content["variants"]["32 float32"]["scores"]["task"] = 12.5  # is taken from the file
    file.write_text(json.dumps(content))
    assert run(asked())[0]["average"] == 12.5
    with pytest.raises(ValueError, match="calibration_texts"):
        run(asked(calibration_texts=4))
    rows = [json.loads(line) for line in (tmp_path / "task" / "test.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "other" / "test.jsonl", rows[::-1])
    other = (tmp_path / "tasks.yaml").read_text().replace("path: task", "path: other")
    (tmp_path / "other.yaml").write_text(other)
    again = run(asked(tasks=[str(tmp_path / "other.yaml")]))
    assert [*again[0]["scores"]] == ["other"] and again[0]["average"] == again[0]["scores"]["other"]
    kept = json.loads(file.read_text())["variants"]["32 float32"]["scores"]
    assert kept == {"task": 12.5, "other": again[0]["average"]}, "another task's scores stay"
    write_jsonl(tmp_path / "task" / "test.jsonl", [row | {"score": -row["score"]} for row in rows])
    assert run(asked())[0]["average"] != 12.5, "other data"
    with (tmp_path / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match="vector_size.json is of other texts of"):
        run(asked())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dims": [64]}, "1 to 32"),
        ({"dims": [12]}, "a multiple of 8"),
        ({"calibration": None}, "int8 needs calibration texts"),
        ({"precisions": ["int4"]}, "float32, int8, binary"),
        ({"tasks": []}, "tasks is empty"),
    ],
)
def test_bad_settings_are_refused(asked, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(asked(**overrides))
