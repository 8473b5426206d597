import json

import numpy as np
import pytest

from nvembed.eval.vectors import MANIFEST, MadeFrom, VectorShards, embed_shards, write_shard


MADE_FROM = MadeFrom("model", "revision", "prefix", 64, "digest")
TEXTS = [f"text {i}" for i in range(25)]
IDS = [f"d{i}" for i in range(25)]


def all_of(vectors, rows=4):
    return np.concatenate(list(vectors.blocks(rows)))


def test_a_killed_embedding_resumes_after_its_last_complete_shard(embed, tmp_path):
    def killed(part, prefix):
        if "text 20" in part:
            raise KeyboardInterrupt
        return embed(part, prefix)

    with pytest.raises(KeyboardInterrupt):
        embed_shards(killed, IDS, TEXTS, tmp_path / "v", MADE_FROM, shard_rows=10)
    with pytest.raises(ValueError, match="has no manifest.json, so its embeddings are not finished"):
        VectorShards(tmp_path / "v")
    embed.calls.clear()
    vectors = embed_shards(embed, IDS, TEXTS, tmp_path / "v", MADE_FROM, shard_rows=10)
    assert embed.calls == [(TEXTS[20:], "prefix")]
    assert list(vectors.ids()) == IDS
    np.testing.assert_array_equal(all_of(vectors), embed(TEXTS, ""))
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == ["00000", "00001", "00002", MANIFEST]
    embed.calls.clear()
    embed_shards(embed, IDS, TEXTS, tmp_path / "v", MADE_FROM, shard_rows=10)
    assert embed.calls == [], "finished shards are taken as they are"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-3), ("int8", 0.5 / 127)])
def test_types_on_disk_are_as_exact_as_they_can_be(embed, tmp_path, dtype, tolerance):
    vectors = embed_shards(embed, IDS, TEXTS, tmp_path / "v", MADE_FROM, dtype, shard_rows=10)
    expected = embed(TEXTS, "")
    largest = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(all_of(vectors) - expected) <= tolerance * largest + 1e-7).all()
    positions = [24, 0, 9, 10, 24]
    np.testing.assert_array_equal(vectors[positions], all_of(vectors)[positions])


def test_int8_keeps_a_row_of_zeros(tmp_path):
    write_shard(tmp_path / "00000", ["a"], np.zeros((1, 3), dtype=np.float32), "int8")
    assert np.load(tmp_path / "00000" / "vectors.npy").tolist() == [[0, 0, 0]]


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        write_shard(tmp_path / "00000", ["a"], np.array([[np.nan]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"of up to 100000 do not fit float16; use float32"):
        write_shard(tmp_path / "00001", ["a"], np.array([[1e5]], dtype=np.float32), "float16")
    with pytest.raises(ValueError, match=r"embeddings are \(1, 1\) for 2 texts"):
        write_shard(tmp_path / "00002", ["a", "b"], np.ones((1, 1), dtype=np.float32))


def test_damaged_shards_and_those_of_another_model_are_named(embed, tmp_path):
    folder = tmp_path / "v"
    vectors = embed_shards(embed, IDS, TEXTS, folder, MADE_FROM, shard_rows=10)
    other = MadeFrom("model", "revision", "another instruction", 64, "digest")
    with pytest.raises(ValueError, match="made with instruction 'prefix', needed is 'another instruction'"):
        vectors.check(other)
    np.save(folder / "00001" / "vectors.npy", np.ones((10, 5), dtype=np.float32))
    with pytest.raises(ValueError, match=r"00001: float32 vectors of shape \(10, 5\); the manifest says float32 of wi"):
        VectorShards(folder)
    np.save(folder / "00001" / "vectors.npy", np.ones((9, 8), dtype=np.float32))
    with pytest.raises(ValueError, match="its shards hold 24 vectors, the manifest says 25"):
        VectorShards(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match="its shards hold 24 vectors, the manifest says 25"):
        embed_shards(embed, IDS, TEXTS, folder, MADE_FROM, shard_rows=10)
    np.save(folder / "00001" / "vectors.npy", np.ones((10, 8), dtype=np.float32))
    (folder / "00001" / "ids.json").write_text(json.dumps(IDS[:9]))
    with pytest.raises(ValueError, match="00001: 9 ids for 10 vectors"):
        embed_shards(embed, IDS, TEXTS, folder, MADE_FROM, shard_rows=10)
