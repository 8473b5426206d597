"""InfoNCE against loops in float64, alone and across two gloo processes."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss

from nvembed.eval.spread import mean_cosine
from nvembed.train.collator import text_id
from nvembed.train.losses import (
    NO_CLASS,
    NO_TEXT,
    contrast,
    is_negative,
    matryoshka_contrast,
    matryoshka_spread_out,
    spread_out,
)
from tests import preloaded


TEMPERATURE = 0.05


def reference(queries, passages, query_texts, passage_texts, in_batch_negatives, margin=math.inf):
    """Loss, gradient of the queries, gradient of the passages: plain loops over texts, closed-form gradients.

    A candidate of row i is a passage of row k (k = i without in-batch negatives) whose text is neither i's query nor
    the positive of any row whose query is i's, i itself among them, or i's positive; nor, in another row, as similar to
    the query as the positive plus the margin.
    """
    rows, per_row = len(queries), len(passages[0])
    loss, grad_q, grad_p = 0.0, torch.zeros_like(queries), torch.zeros_like(passages)
    for i in range(rows):
        candidates = [(i, 0)]
        near = query_texts[i], passage_texts[i][0]
        positives = [row[0] for query, row in zip(query_texts, passage_texts) if query in near]
        for k in range(rows) if in_batch_negatives else [i]:
            for j in range(per_row):
                text = passage_texts[k][j]
                if text is None or text == query_texts[i] or text in positives:
                    continue
                if k != i and float(queries[i] @ passages[k, j]) >= float(queries[i] @ passages[i, 0]) + margin:
                    continue
                candidates.append((k, j))
        scores = [math.exp(float(queries[i] @ passages[k, j]) / TEMPERATURE) for k, j in candidates]
        loss -= math.log(scores[0] / sum(scores)) / rows
        for position, ((k, j), score) in enumerate(zip(candidates, scores)):
            weight = (score / sum(scores) - (position == 0)) / TEMPERATURE / rows
            grad_q[i] += weight * passages[k, j]
            grad_p[k, j] += weight * queries[i]
    return loss, grad_q, grad_p


def make_batch(duplicates: bool):
    generator = torch.Generator().manual_seed(3)
    queries = torch.nn.functional.normalize(torch.randn(6, 10, generator=generator, dtype=torch.float64), dim=-1)
    passages = torch.nn.functional.normalize(torch.randn(6, 3, 10, generator=generator, dtype=torch.float64), dim=-1)
    query_texts = [f"query {i}" for i in range(6)]
    passage_texts = [[f"passage {i} {j}" for j in range(3)] for i in range(6)]
    if duplicates:
        passage_texts[1][2] = passage_texts[4][0]  # a hard negative that is another row's positive
        passage_texts[2][0] = passage_texts[5][0]  # two rows share their positive
        passage_texts[3][1] = query_texts[0]  # a candidate that is another row's query
        query_texts[5] = query_texts[1]  # one query with two positives
        passage_texts[5][2] = passage_texts[1][0]  # ... of which one is the other row's hard negative
        passage_texts[0][1] = passage_texts[0][0]  # a hard negative that is its own row's positive
        passage_texts[4][2] = None  # a row with one negative fewer
        query_texts[3] = passage_texts[4][0]  # a positive that is another row's query: similar texts, a ~ b and b ~ c
    return queries, passages, query_texts, passage_texts


def mean_loss(*args, **kwargs) -> torch.Tensor:
    return contrast(*args, **kwargs).losses.mean()


def identities(query_texts, passage_texts):
    return (
        torch.tensor([text_id(text) for text in query_texts]),
        torch.tensor([[NO_TEXT if text is None else text_id(text) for text in row] for row in passage_texts]),
    )


@pytest.mark.parametrize("in_batch_negatives", [True, False])
@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("margin", [None, 0.1, -0.2])
def test_loss_and_gradients_equal_the_loop(in_batch_negatives, duplicates, dtype, margin):
    queries, passages, *texts = make_batch(duplicates)
    in_loop = math.inf if margin is None else margin
    expected_loss, expected_q, expected_p = reference(queries, passages, *texts, in_batch_negatives, in_loop)
    queries, passages = (x.to(dtype).requires_grad_() for x in (queries, passages))
    loss = mean_loss(queries, passages, *identities(*texts), TEMPERATURE, in_batch_negatives, margin)
    loss.backward()
    # float32 rounds similarities to 1.2e-7, and the temperature divides that error as it divides them.
    tolerance = {"atol": 1e-6, "rtol": 0}
    if dtype == torch.float32:
        tolerance = {"atol": torch.finfo(dtype).eps / TEMPERATURE, "rtol": 1e-6}
    torch.testing.assert_close(loss.double(), torch.tensor(expected_loss, dtype=torch.float64), **tolerance)
    torch.testing.assert_close(queries.grad.double(), expected_q, **tolerance)
    torch.testing.assert_close(passages.grad.double(), expected_p, **tolerance)


def test_duplicates_change_the_loss():
    """Guards the test above: the texts made equal there matter."""
    queries, passages, *texts = make_batch(duplicates=True)
    _, _, *distinct = make_batch(duplicates=False)
    with_duplicates = mean_loss(queries, passages, *identities(*texts), TEMPERATURE)
    assert abs(with_duplicates - mean_loss(queries, passages, *identities(*distinct), TEMPERATURE)) > 1e-3


def test_false_negatives_are_counted_and_change_the_loss():
    queries, passages, *texts = make_batch(duplicates=True)
    ids = identities(*texts)
    plain = contrast(queries, passages, *ids, TEMPERATURE)
    masked = contrast(queries, passages, *ids, TEMPERATURE, True, 0.1)
    assert not plain.false_negatives.any()
    query_texts, passage_texts = texts
    for i, row in enumerate(masked.false_negatives.tolist()):
        near = query_texts[i], passage_texts[i][0]
        known = {query_texts[i], *(p[0] for q, p in zip(query_texts, passage_texts) if q in near), None}
        limit = float(queries[i] @ passages[i, 0]) + 0.1
        others = ((k, j) for k in range(6) for j in range(3) if k != i and passage_texts[k][j] not in known)
        assert row == sum(float(queries[i] @ passages[k, j]) >= limit for k, j in others)
    assert (masked.losses < plain.losses).any() and (masked.losses <= plain.losses).all()
    assert not contrast(queries, passages, *ids, TEMPERATURE, False, -1.0).false_negatives.any(), "no batch, no guess"


@pytest.mark.parametrize("margin", [None, 0.1])
def test_labels_prove_negatives(margin):
    """Of other rows, only the positives of the same set and another class are candidates: a loop, in float64."""
    queries, passages, query_texts, passage_texts = make_batch(duplicates=True)
    classes = torch.tensor([[0, 1], [0, 2], [0, 1], [7, 2], [0, NO_CLASS], [0, 3]])
    ids = identities(query_texts, passage_texts)
    losses = contrast(queries, passages, *ids, TEMPERATURE, True, margin, classes=classes).losses
    assert not torch.allclose(losses, contrast(queries, passages, *ids, TEMPERATURE, True, margin).losses)
    for i in range(6):
        near = query_texts[i], passage_texts[i][0]
        own = {query_texts[i], *(p[0] for q, p in zip(query_texts, passage_texts) if q in near), None}
        scores = [queries[i] @ passages[i, 0]]
        scores += [queries[i] @ passages[i, j] for j in (1, 2) if passage_texts[i][j] not in own]
        for k in range(6):
            (dataset, name), (other_dataset, other_name) = classes[i].tolist(), classes[k].tolist()
            proven = dataset == other_dataset and name != other_name and NO_CLASS not in (name, other_name)
            score = queries[i] @ passages[k, 0]
            likely = margin is not None and score >= scores[0] + margin
            if proven and passage_texts[k][0] not in own and not likely:
                scores.append(score)
        expected = -torch.stack(scores).div(TEMPERATURE).log_softmax(0)[0]
        torch.testing.assert_close(losses[i], expected)


def test_spread_out_equals_sentence_transformers():
    """Its loss has 1 / hidden less for queries and for positives, a constant."""
    queries, passages, *texts = make_batch(duplicates=False)
    raw = [(x + 0.3).requires_grad_() for x in (queries, passages)]  # a cone; the oracle normalizes, ours takes it so
    queries, passages = (F.normalize(x, dim=-1) for x in raw)
    query_ids, passage_ids = identities(*texts)
    ours = spread_out(queries, passages[:, 0], query_ids, passage_ids[:, 0])
    oracle = GlobalOrthogonalRegularizationLoss(None, mean_weight=0, aggregation="sum")
    theirs = oracle.compute_loss_from_embeddings([queries, passages[:, 0]])["gor_second_moment"]
    torch.testing.assert_close(ours.penalty, theirs + 2 / 10)
    for mine, reference in zip(*(torch.autograd.grad(x, raw, retain_graph=True) for x in (ours.penalty, theirs))):
        torch.testing.assert_close(mine, reference)
    torch.testing.assert_close(ours.mean_cosine.item(), mean_cosine(queries.detach()))


def test_related_texts_are_not_spread_out():
    queries, passages, query_texts, passage_texts = make_batch(duplicates=True)
    query_ids, passage_ids = identities(query_texts, passage_texts)
    classes = torch.tensor([[0, 1], [0, 2], [0, NO_CLASS], [7, NO_CLASS], [0, 1], [7, NO_CLASS]])
    pairs = []
    for i, k in itertools.permutations(range(6), 2):
        one, other = ({query_texts[row], passage_texts[row][0]} for row in (i, k))
        may_agree = classes[i, 0] == classes[k, 0] == 0 and NO_CLASS in (classes[i, 1], classes[k, 1])
        agree = classes[i, 1] == classes[k, 1] != NO_CLASS
        if not (one & other or agree or may_agree):
            pairs.append((i, k))
    assert 0 < len(pairs) < 30 - 2 * 4
    expected = sum((queries[i] @ queries[k]) ** 2 + (passages[i, 0] @ passages[k, 0]) ** 2 for i, k in pairs)
    result = spread_out(queries, passages[:, 0], query_ids, passage_ids[:, 0], classes)
    torch.testing.assert_close(result.penalty, expected / len(pairs))
    torch.testing.assert_close(result.mean_cosine, sum(queries[i] @ queries[k] for i, k in pairs) / len(pairs))
    alone = spread_out(queries[:1], passages[:1, 0], query_ids[:1], passage_ids[:1, 0])
    assert alone.penalty == 0 and alone.mean_cosine.isnan()


def test_prefixes_are_spread_out_too():
    queries, passages, *texts = make_batch(duplicates=False)
    query_ids, passage_ids = identities(*texts)
    ids = query_ids, passage_ids[:, 0]
    whole = spread_out(queries, passages[:, 0], *ids)
    first = spread_out(*(F.normalize(x[..., :4], dim=-1) for x in (queries, passages[:, 0])), *ids)
    result = matryoshka_spread_out(queries, passages[:, 0], {4: 0.5}, *ids)
    torch.testing.assert_close(result.penalty, (whole.penalty + 0.5 * first.penalty) / 1.5)
    assert result.mean_cosine == whole.mean_cosine


@pytest.mark.slow
@pytest.mark.parametrize(("in_batch_negatives", "has_classes"), [(True, False), (False, False), (True, True)])
def test_two_processes_equal_one(tmp_path, in_batch_negatives, has_classes):
    """DDP over two gloo processes: mean loss, and gradients of a shared encoder, of the same global batch."""
    queries, passages, *texts = make_batch(duplicates=True)
    query_ids, passage_ids = identities(*texts)
    classes = torch.tensor([[0, 1], [0, 2], [0, 1], [7, 2], [0, NO_CLASS], [0, 3]])
    encoder = torch.nn.Linear(10, 7, dtype=torch.float64)
    job = {
        "batch": (queries, passages, query_ids, passage_ids, classes),
        "weights": encoder.state_dict(),
        "options": {"temperature": TEMPERATURE, "in_batch_negatives": in_batch_negatives},
        "has_classes": has_classes,
    }
    torch.save(job, tmp_path / "job.pt")
    worker = Path(__file__).with_name("gloo_worker.py")
    done = preloaded.run(worker, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]

    queries, passages = (F.normalize(encoder(x), dim=-1) for x in (queries, passages))
    options = job["options"] | {"classes": classes if has_classes else None}
    loss = mean_loss(queries, passages, query_ids, passage_ids, **options)
    loss = loss + spread_out(queries, passages[:, 0], query_ids, passage_ids[:, 0], classes).penalty
    loss.backward()
    assert abs(sum(result["loss"] for result in results) / 2 - loss.item()) < 1e-6
    for result in results:
        torch.testing.assert_close(result["weight"], encoder.weight.grad, atol=1e-6, rtol=0)
        torch.testing.assert_close(result["bias"], encoder.bias.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
def test_mask_equals_a_loop_over_texts_that_repeat(shared, processes):
    """On random identities with many repeats; with two processes, the first one's rows against everybody's."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        rows, per_row = 9, 4
        passage_ids = torch.randint(NO_TEXT, 12, (rows * processes, per_row), generator=generator)
        passage_ids[:, 0] = passage_ids[:, 0].clamp(min=0)
        all_query_ids = torch.randint(0, 6, (rows * processes,), generator=generator)
        query_ids, all_positive_ids = all_query_ids[:rows], passage_ids[:, 0]
        candidates = passage_ids.flatten()[None] if shared else passage_ids[:rows]
        actual = is_negative(query_ids, candidates, all_query_ids, all_positive_ids)
        expected = [
            [
                text != NO_TEXT
                and text != query
                and not any(q == query and p == text for q, p in zip(all_query_ids.tolist(), all_positive_ids.tolist()))
                for text in (candidates[0] if shared else candidates[i]).tolist()
            ]
            for i, query in enumerate(query_ids.tolist())
        ]
        assert actual.tolist() == expected


@pytest.mark.slow
def test_memory_grows_with_rows_times_candidates(tmp_path):
    """The bars are the issue's: 1 GB for the mask, 2.5 GB for the loss, of 4,096 rows with 7 negatives each."""
    script = """
import resource, sys, torch
from nvembed.train.losses import contrast, is_negative
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
normalize = torch.nn.functional.normalize
queries = normalize(torch.randn(4096, 64, generator=generator), dim=-1).requires_grad_()
passages = normalize(torch.randn(4096, 8, 64, generator=generator), dim=-1).requires_grad_()
query_ids = torch.randint(0, 2**62, (4096,), generator=generator)
passage_ids = torch.randint(0, 2**62, (4096, 8), generator=generator)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
is_negative(query_ids, passage_ids.flatten()[None], query_ids, passage_ids[:, 0])
mask = peak() - before
contrast(queries, passages, query_ids, passage_ids)
print(mask, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True)
    mask, loss = map(int, done.stdout.split())
    assert mask < 1e9
    assert loss < 2.5e9


def test_bad_arguments_are_named():
    queries, passages, *texts = make_batch(duplicates=False)
    with pytest.raises(ValueError, match="temperature is 0"):
        mean_loss(queries, passages, *identities(*texts), temperature=0)
    with pytest.raises(ValueError, match=r"queries \(5, 10\), passages \(6, 3, 10\)"):
        mean_loss(queries[:5], passages, *identities(*texts))


def test_matryoshka_is_the_weighted_mean_over_prefixes():
    torch.manual_seed(0)
    queries, passages = F.normalize(torch.randn(4, 12), dim=-1), F.normalize(torch.randn(4, 3, 12), dim=-1)
    ids = torch.arange(4), torch.arange(10, 22).view(4, 3)
    found = matryoshka_contrast(queries, passages, {4: 0.5, 8: 2.0}, *ids, temperature=0.1)
    expected = torch.zeros(4)
    for width, weight in ((4, 0.5), (8, 2.0), (12, 1.0)):
        q, p = F.normalize(queries[:, :width], dim=-1), F.normalize(passages[..., :width], dim=-1)
        logits = q @ p.flatten(0, 1).T / 0.1
        expected += weight * F.cross_entropy(logits, torch.arange(4) * 3, reduction="none") / 3.5
    assert torch.allclose(found.losses, expected, atol=1e-6)
    whole = contrast(queries, passages, *ids, temperature=0.1)
    assert torch.equal(found.positive, whole.positive) and torch.equal(found.hardest_negative, whole.hardest_negative)
    assert torch.equal(matryoshka_contrast(queries, passages, {}, *ids, temperature=0.1).losses, whole.losses)
