import numpy as np
import pytest

from nvembed.eval.search import exact_search


def blocks(rows, size):
    return (rows[start : start + size] for start in range(0, len(rows), size))


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("top_k", [1, 10, 99])
def test_search_is_exact(block, top_k):
    rng = np.random.default_rng(0)
    queries, documents = (rng.normal(size=(n, 12)).astype(np.float32) for n in (5, 40))
    scores, positions = exact_search(queries, blocks(documents, block), top_k)
    similarity = queries.astype(np.float64) @ documents.T.astype(np.float64)
    expected = np.argsort(-similarity, axis=1)[:, :top_k]
    assert np.array_equal(positions, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(similarity, expected, 1), atol=1e-5)


def test_equal_scores_stand_by_position():
    documents = np.ones((6, 3), dtype=np.float32)
    scores, positions = exact_search(documents[:1], blocks(documents, 2), 10)
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert scores.tolist() == [[3.0] * 6]


def test_another_width_and_no_documents_are_refused():
    with pytest.raises(ValueError, match="documents have width 4, queries 3"):
        exact_search(np.ones((1, 3)), [np.ones((2, 4))], 1)
    with pytest.raises(ValueError, match="no documents"):
        exact_search(np.ones((1, 3)), [], 1)
