import json
import math
from types import SimpleNamespace

import pytest
import torch

from nvembed import NVEmbedModel
from nvembed.train.collator import TripletCollator
from nvembed.train.losses import Contrast, contrast
from nvembed.train.watch import LossGuard, Window, flops_per_token
from tests.train.test_gradient_cache import adapted, triplets_of


def rows_of(losses, positive=None, hardest=None):
    zeros = [0.0] * len(losses)
    return Contrast(*(torch.tensor(x) for x in (losses, positive or zeros, hardest or zeros)))


def test_window_adds_up_what_each_set_gave():
    window = Window(torch.nn.Linear(2, 2), torch.device("cpu"))
    batch = {"chunks": [{"lengths": [3, 4]}, {"lengths": [5]}], "datasets": ["a", "b"]}
    window.add(batch, rows_of([1.0, 5.0], [0.5, 0.7], [0.1, -math.inf]))
    window.add(batch | {"datasets": ["a", "a"]}, rows_of([2.0, 3.0], [0.9, 0.9], [0.2, 0.3]))
    window.start -= 10
    window.leave_out(8)
    logs = window.close()
    assert logs.pop("tokens_per_second") == pytest.approx(24 / 2, rel=0.1)
    assert logs == {
        "positive_similarity": 0.75,
        "hardest_negative_similarity": 0.2,  # of the rows that have a negative
        "loss/a": 2.0,
        "samples/a": 3,
        "loss/b": 5.0,
        "samples/b": 1,
    }
    assert window.close() == {"tokens_per_second": 0.0}, "the next window is empty"


def test_similarities_by_a_loop():
    torch.manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(3, 5), dim=-1)
    passages = torch.nn.functional.normalize(torch.randn(3, 2, 5), dim=-1)
    ids = torch.arange(3), torch.arange(10, 16).view(3, 2)
    rows = contrast(queries, passages, *ids, temperature=0.1)
    for i in range(3):
        others = [float(queries[i] @ passages[j, k]) for j in range(3) for k in range(2) if (j, k) != (i, 0)]
        assert rows.hardest_negative[i] == pytest.approx(max(others), abs=1e-6)
        positive = float(queries[i] @ passages[i, 0])
        assert rows.positive[i] == pytest.approx(positive, abs=1e-6)
        total = sum(math.exp(10 * s) for s in [positive, *others])
        assert rows.losses[i] == pytest.approx(math.log(total) - 10 * positive, abs=1e-5)


def test_arithmetic_of_a_token(checkpoint):
    """4 a frozen weight of a linear map, 6 a trained one, nothing for the embeddings and the latents' projection."""
    model = adapted(checkpoint)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "to_kv" not in n}
    by_hand = sum((6 if "lora" in n or "modules_to_save" in n else 4) * m.weight.numel() for n, m in linear.items())
    assert flops_per_token(model) == by_hand
    base = NVEmbedModel.from_pretrained(checkpoint)
    decoder = sum(p.numel() for n, p in base.embedding_model.named_parameters() if "proj" in n)
    assert flops_per_token(base.requires_grad_(False)) > 4 * decoder > 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, 25.0])
def test_guard_stops_and_keeps_the_batch(tmp_path, checkpoint, sentences, loss):
    model = NVEmbedModel.from_pretrained(checkpoint)
    triplets = triplets_of(sentences)[:2]
    batch = TripletCollator(model.tokenizer, model.config, 128, 1, chunk_tokens=60)(triplets)
    guard = LossGuard()
    for usual in (2.0, 3.0, 2.5):
        guard.check(usual, batch, rows_of([usual, usual]), str(tmp_path), model.tokenizer.decode)
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        FloatingPointError, match=r"the loss is .* its batch is in .*bad_batch.jsonl. Lower learning_rate"
    ):
        guard.check(loss, batch, rows_of([loss, 1.0]), str(tmp_path), model.tokenizer.decode)
    rows = [json.loads(line) for line in (tmp_path / "bad_batch.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row, triplet in zip(rows, triplets):
        assert triplet["query"] in row["query"]
        assert triplet["positive"] in row["passages"][0]
        assert row["dataset"] == "test"


def test_peak_is_known_by_the_devices_name(monkeypatch):
    from nvembed.train import watch

    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Odd", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert watch.peak_flops(SimpleNamespace(type="cuda")) == peak
