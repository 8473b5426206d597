import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nvembed.eval import peak_memory
from nvembed.train import log
from nvembed.train.collator import TripletCollator
from nvembed.train.log import LogWindow, flops_per_token, peak_flops
from nvembed.train.losses import Contrast, Spread, contrast
from tests.train.test_gradient_cache import adapted, triplets_of


SPREAD = Spread(torch.tensor(0.5), torch.tensor(0.25))
EMBEDDINGS = torch.eye(4)


def rows_of(losses, positive=None, hardest=None):
    zeros = [0.0] * len(losses)
    return Contrast(*(torch.tensor(x) for x in (losses, positive or zeros, hardest or zeros, [2, *zeros[1:]])))


def test_window_adds_up_what_each_set_gave():
    window = LogWindow(torch.nn.Linear(2, 2), torch.device("cpu"))
    batch = {
        "chunks": [{"lengths": [3, 4]}, {"lengths": [5]}],
        "datasets": ["a", "b"],
        "false_negatives": torch.tensor([1, 0]),
    }
    window.add(batch, rows_of([1.0, 5.0], [0.5, 0.7], [0.1, -math.inf]), SPREAD, EMBEDDINGS)
    window.add(batch | {"datasets": ["a", "a"]}, rows_of([2.0, 3.0], [0.9, 0.9], [0.2, 0.3]), SPREAD, EMBEDDINGS)
    window.start -= 10
    window.leave_out(8)
    logs = window.close()
    assert logs.pop("tokens_per_second") == pytest.approx(24 / 2, rel=0.1)
    logs.pop("peak_memory_gb", None)
    assert logs == {
        "positive_similarity": 0.75,
        "hardest_negative_similarity": 0.2,  # of the rows that have a negative
        "loss/a": 2.0,
        "samples/a": 3,
        "loss/b": 5.0,
        "samples/b": 1,
        "spread_out": 0.5,
        "mean_cosine": 0.25,
        "effective_rank": 4.0,
    }
    assert window.close().keys() - {"peak_memory_gb"} == {"tokens_per_second"}, "the next window is empty"
    counting = LogWindow(torch.nn.Linear(2, 2), torch.device("cpu"), count_false_negatives=True)
    counting.add(batch, rows_of([1.0, 5.0]), SPREAD, EMBEDDINGS)
    assert counting.close()["false_negatives"] == 3, "two of the batch, one of the teacher"


def test_the_largest_process_tells_the_peak_of_memory(monkeypatch, tmp_path):
    """Until the system tells none: then the log is silent."""
    status = tmp_path / "status"
    monkeypatch.setattr(peak_memory, "STATUS", status)
    monkeypatch.setattr(log, "gather_object", lambda own: [(*own[0][:6], 0.5), *own, (*own[0][:6], 1.5)])
    window = LogWindow(torch.nn.Linear(2, 2), torch.device("cpu"))
    status.write_text("Name:\tpython\nVmPeak:\t  9000000 kB\nVmHWM:\t  2000000 kB\nVmRSS:\t  1000000 kB\n")
    assert window.close()["peak_memory_gb"] == 2.05
    status.write_text("VmHWM:\t  1000000 kB\n")
    assert window.close()["peak_memory_gb"] == 1.5, "another process has held more"
    monkeypatch.setattr(log, "gather_object", lambda own: own)
    for told in ("VmRSS:\t  1000000 kB\n", None):
        status.unlink() if told is None else status.write_text(told)
        assert "peak_memory_gb" not in window.close()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_peak_of_memory_stays_until_it_is_reset():
    cpu = torch.device("cpu")
    peak_memory.reset_peak_memory(cpu)
    before = peak_memory.peak_memory(cpu)
    block = torch.ones(75_000_000)  # 0.3 GB
    del block
    assert peak_memory.peak_memory(cpu) == pytest.approx(before + 0.3, abs=0.05)
    peak_memory.reset_peak_memory(cpu)
    assert peak_memory.peak_memory(cpu) == pytest.approx(before, abs=0.05)


def test_a_window_without_any_negative_stops_the_run():
    window = LogWindow(torch.nn.Linear(2, 2), torch.device("cpu"))
    batch = {"chunks": [{"lengths": [3, 4]}], "datasets": ["a", "a"], "false_negatives": torch.zeros(2)}
    window.add(batch, rows_of([0.0, 0.0], [0.5, 0.7], [-math.inf] * 2), SPREAD, EMBEDDINGS)
    window.add(batch, rows_of([0.0, 0.1], [0.5, 0.7], [-math.inf, 0.2]), SPREAD, EMBEDDINGS)
    window.close()  # one batch without any is sound
    for _ in range(2):
        window.add(batch, rows_of([0.0, 0.0], [0.5, 0.7], [-math.inf] * 2), SPREAD, EMBEDDINGS)
    with pytest.raises(ValueError, match="none of the last 4 rows had a negative, so nothing was learned"):
        window.close()


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


def test_arithmetic_of_a_token(checkpoint, sentences):
    """Twice what PyTorch counts for the matrix products of a forward pass, and once more where weights are trained."""
    model = adapted(checkpoint)
    batch = TripletCollator(model.tokenizer, model.config, 128, 1)(triplets_of(sentences)[:4])
    (chunk,) = batch["chunks"]
    with FlopCounterMode(display=False) as counter:
        model(**chunk)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    pooling = model.get_base_model().latent_attention_model.modules_to_save["default"]
    (latents,) = [p for n, p in pooling.named_parameters() if n.endswith("latents")]
    (to_kv,) = [p for n, p in pooling.named_parameters() if n.endswith("to_kv.weight")]
    linear = counts["aten.mm"] + counts.get("aten.addmm", 0) - 2 * latents.shape[0] * to_kv.numel()
    tokens = sum(chunk["lengths"])
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2)
    trained -= to_kv.numel() + latents.numel()
    assert flops_per_token(model) == 2 * linear / tokens + 2 * trained


def test_peak_is_known_by_the_devices_name(monkeypatch):
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Odd", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(SimpleNamespace(type="cuda")) == peak
