"""The benchmark of a training step: every way takes real steps, and takes them on what the others take them on."""

import json
import math
import sys

import pytest
import torch
from transformers import MistralModel

from nvembed import NVEmbedModel
from nvembed.eval.speed import encode
from nvembed.eval.speed import train as benchmark
from nvembed.texts_nvembed import format_instruction
from tests.eval.test_speed import SHAPE


ROWS, NEGATIVES = 4, 2


def arguments(monkeypatch, *options):
    monkeypatch.setitem(encode.SHAPES, "tiny", SHAPE | {"vocab_size": 8000})
    tiny = ["--shape", "tiny", "--layers", "2", "--dtype", "float32", "--rows", ROWS, "--negatives", NEGATIVES]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, tiny), *options])
    return benchmark.parse_args()


def mean_loss(queries, passages):
    """InfoNCE in plain loops; the positives are the first passages, in the order of the queries."""
    scores = [[50 * float(q.double() @ p.double()) for p in passages] for q in queries]
    return sum(math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(scores)) / len(scores)


@pytest.mark.slow
def test_first_losses_are_those_of_the_weights_written(monkeypatch, tmp_path):
    args = arguments(monkeypatch, "--steps", "2", "--max_length", "64", "--chunk_tokens", "128")
    batch = benchmark.read_triplets(None, NEGATIVES)[:ROWS]
    benchmark.write_models(tmp_path, args)
    benchmark.write_job(tmp_path, batch, args)
    runs = {way: benchmark.run(way, tmp_path, args.steps) for way in benchmark.WAYS}

    queries = [row["query"] for row in batch]
    passages = [row["positive"] for row in batch] + [text for row in batch for text in row["negatives"]]
    instruction = format_instruction(args.instruction)
    ours = NVEmbedModel.from_pretrained(tmp_path / "model")
    expected = mean_loss(
        ours.encode(queries, instruction=instruction, max_length=64), ours.encode(passages, max_length=64)
    )
    for way in ("whole", "cached", "padded"):
        assert runs[way].losses[0] == pytest.approx(expected, abs=2e-3), way

    decoder = MistralModel.from_pretrained(tmp_path / "decoder").eval()

    @torch.no_grad()
    def causal_mean(text, prefix=""):
        skip = len(ours.tokenizer(prefix).input_ids) if prefix else 0
        ids = ours.tokenizer(prefix + text, truncation=True, max_length=64, return_tensors="pt").input_ids
        return torch.nn.functional.normalize(decoder(ids).last_hidden_state[0, skip:].mean(0), dim=0)

    expected = mean_loss([causal_mean(q, instruction) for q in queries], [causal_mean(p) for p in passages])
    assert runs["sentence-transformers"].losses[0] == pytest.approx(expected, abs=2e-3)

    for way, run in runs.items():
        assert len(run.seconds) == 1, way
        assert run.seconds[0] > 0, way
        assert run.losses[1] < run.losses[0], way  # the same batch again, after an update
        assert 0.1 < run.peak_gb < 24, way


@pytest.mark.slow
def test_a_way_that_fails_shows_what_it_printed(monkeypatch, tmp_path):
    args = arguments(monkeypatch, "--steps", "2")
    (tmp_path / "model").mkdir()
    benchmark.write_job(tmp_path, benchmark.read_triplets(None, NEGATIVES)[:ROWS], args)
    with pytest.raises(RuntimeError, match=r"(?s)padded: exit code 1, 0 steps of 2\n.*config\.json"):
        benchmark.run("padded", tmp_path, args.steps)


def test_ways_that_compute_different_losses_are_not_timed():
    benchmark.check_agreement({"whole": 4.0, "padded": 4.003, "sentence-transformers": 9.0}, "float32")
    with pytest.raises(AssertionError, match=r"first losses of one batch differ: .*4\.1"):
        benchmark.check_agreement({"whole": 4.0, "padded": 4.1}, "float32")


def test_no_text_stands_twice():
    triplets = benchmark.read_triplets(None, 7)
    texts = [text for row in triplets for text in (row["query"] + row["positive"], *row["negatives"])]
    assert len(texts) == len(set(texts)) == 8 * len(triplets)
    assert len(triplets) > 100
    assert benchmark.read_triplets(None, 7) == triplets


def test_triplets_of_a_file(tmp_path):
    rows = [{"query": str(i), "positive": f"p{i}", "negatives": [f"n{j}" for j in range(i)]} for i in range(4)]
    path = tmp_path / "triplets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sorted((row["query"], row["negatives"]) for row in benchmark.read_triplets(str(path), 2)) == [
        ("2", ["n0", "n1"]),
        ("3", ["n0", "n1"]),
    ]
    with pytest.raises(ValueError, match="no triplet with 5 negatives; lower --negatives"):
        benchmark.read_triplets(str(path), 5)


def test_table_compares_within_a_round():
    def rounds(*seconds):
        return [benchmark.Run([s, s, 99 * s][:2], [1.0], 2.0, None) for s in seconds]

    runs = {"whole": rounds(1, 2, 4), "padded": rounds(3, 3, 20)}
    _, _, whole, padded = benchmark.table(runs, [100, 200, 300], 8)
    # 3 / 1, 3 / 2 and 20 / 4: their median, not the ratio of the medians
    assert whole == "| whole | 2.00 | 4.00 | 100 | 3.00 (1.50-5.00) | - | 2.00 | - |"
    assert padded.startswith("| padded | 3.00 | 2.67 | 33 | 1.00 (1.00-1.00) | - |")


def test_one_step_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        arguments(monkeypatch, "--steps", "1")
    assert "--steps is 1; the first is not counted" in capsys.readouterr().err
