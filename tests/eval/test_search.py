import json

import numpy as np
import pytest

from nvembed.eval.search import embed_to_file, exact_search


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("top_k", [1, 10, 99])
def test_search_is_exact(block, top_k):
    rng = np.random.default_rng(0)
    queries, documents = (rng.normal(size=(n, 12)).astype(np.float32) for n in (5, 40))
    scores, positions = exact_search(queries, documents, top_k, block)
    similarity = queries.astype(np.float64) @ documents.T.astype(np.float64)
    expected = np.argsort(-similarity, axis=1)[:, :top_k]
    assert np.array_equal(positions, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(similarity, expected, 1), atol=1e-5)


def test_a_killed_embedding_goes_on(embed, tmp_path):
    texts = [f"text {i}" for i in range(25)]
    path = tmp_path / "corpus.npy"

    def killed(part, prefix):
        if "text 20" in part:
            raise KeyboardInterrupt
        return embed(part, prefix)

    with pytest.raises(KeyboardInterrupt):
        embed_to_file(killed, texts, "p", path, block=10)
    assert not path.exists()
    embed.calls.clear()
    embeddings = embed_to_file(embed, texts, "p", path, block=10)
    assert embed.calls == [(texts[20:], "p")]
    assert isinstance(embeddings, np.memmap)
    np.testing.assert_array_equal(embeddings, embed(texts, "p"))
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.npy"]
    embed.calls.clear()
    embed_to_file(embed, texts, "p", path)
    assert embed.calls == [], "a whole file is taken as it is"


def test_progress_without_its_embeddings_is_not_believed(embed, tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps({"done": 5}))
    embeddings = embed_to_file(embed, ["a", "b"], "", tmp_path / "corpus.npy")
    np.testing.assert_array_equal(embeddings, embed(["a", "b"], ""))
