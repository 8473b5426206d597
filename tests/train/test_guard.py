import json
import math

import pytest

from nvembed import NVEmbedModel
from nvembed.train.collator import TripletCollator
from nvembed.train.guard import LossGuard
from tests.train.test_gradient_cache import triplets_of
from tests.train.test_log import rows_of


@pytest.mark.parametrize("loss", [math.nan, math.inf, 5000.0])
def test_guard_stops_and_keeps_the_batch(tmp_path, checkpoint, sentences, loss):
    model = NVEmbedModel.from_pretrained(checkpoint)
    triplets = triplets_of(sentences)[:2]
    batch = TripletCollator(model.tokenizer, model.config, 128, 1, chunk_tokens=60)(triplets)
    guard = LossGuard()
    path = tmp_path / "run" / "bad_batch-0.jsonl"
    for usual in (2.0, 3.0, 2.5) * guard.ROWS:
        guard.check(usual, batch, rows_of([usual, usual]), path, model.tokenizer.decode)
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        FloatingPointError, match=r"the loss is .* the worst batch is in .*bad_batch-0.jsonl. Lower learning_rate"
    ):
        guard.check(loss, batch, rows_of([loss, 1.0]), path, model.tokenizer.decode)
        for _ in range(guard.ROWS // 2 - 1):  # innocent ones come after it
            guard.check(20.0, {}, rows_of([20.0, 20.0]), path, model.tokenizer.decode)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2
    for row, triplet in zip(rows, triplets):
        assert triplet["query"] in row["query"]
        assert triplet["positive"] in row["passages"][0]
        assert row["dataset"] == "test"


def test_guard_lets_a_single_hard_row_pass(tmp_path):
    guard = LossGuard()
    for loss in ([0.5] * 20 + [60.0]) * 5:
        guard.check(loss, {}, rows_of([loss]), tmp_path / "bad_batch-0.jsonl", None)
    assert guard.mean < 5
