"""What is measured: checkpoints, baselines of sentence-transformers, and what is neither."""

import json
import shutil

import mteb
import numpy as np
import pytest
from scipy.stats import spearmanr

from nvembed import NVEmbedModel
from nvembed.eval.models import clean, digest_model, load_model
from nvembed.eval.run_mteb import run
from nvembed.eval.tasks.lookup import select_tasks


def test_a_model_is_known_by_its_files(checkpoint, tmp_path):
    first = digest_model(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a card")
    assert digest_model(tmp_path / "copy") == first
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]  # the last without a folder, as often
    (tmp_path / "copy" / "modules.json").write_text(json.dumps(modules))
    before = digest_model(tmp_path / "copy")
    (tmp_path / "copy" / "1_Pooling").mkdir()
    (tmp_path / "copy" / "1_Pooling" / "config.json").write_text("{}")
    assert digest_model(tmp_path / "copy") != before
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{}")
    assert digest_model(tmp_path / "copy") != first


@pytest.mark.slow
def test_a_baseline_keeps_its_own_prompts(baseline, arguments, data):
    from sentence_transformers import SentenceTransformer

    summary = run(arguments(model=str(baseline)))
    model = SentenceTransformer(str(baseline), device="cpu")
    rows = [json.loads(line) for line in (data / "sts" / "test.jsonl").read_text().splitlines()]
    first, second = (model.encode([r[side] for r in rows], prompt="like: ") for side in ("sentence1", "sentence2"))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    expected = spearmanr((first * second).sum(1) / norms, [r["score"] for r in rows])[0]
    assert summary["tasks"]["sts"] == pytest.approx(expected, abs=1e-6)
    instructed = run(arguments("instructed", model=str(baseline), instruct=True))
    assert instructed["tasks"]["sts"] != pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_baselines_own_similarity(baseline, arguments, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(baseline), device="cpu", similarity_fn_name="dot")
    model.save_pretrained(str(tmp_path / "dot"))
    tasks = select_tasks(arguments().tasks)
    expected = mteb.evaluate(model, [t for t in tasks if t.metadata.name == "retrieval"], cache=None)
    by_dot, by_cosine = (
        run(arguments(f"out-{m.name}", model=str(m)))["tasks"]["retrieval"] for m in (tmp_path / "dot", baseline)
    )
    assert by_dot == expected[0].scores["test"][0]["main_score"] != by_cosine
    model.similarity_fn_name = "euclidean"
    model.save_pretrained(str(tmp_path / "euclidean"))
    with pytest.raises(ValueError, match="compares by 'euclidean'; cosine and dot can be measured here"):
        load_model(str(tmp_path / "euclidean"))


def test_a_baseline_is_cut_at_max_length(baseline):
    long = ["word " * 100]
    short, whole = (load_model(str(baseline), max_length=length).embed(long, "") for length in (8, 512))
    assert np.abs(short - whole).max() > 1e-3


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="'no/such' is neither a local folder nor a model found at https"):
        load_model("no/such")
    with pytest.raises(ValueError, match="holds neither config.json nor modules.json"):
        load_model(str(tmp_path))
    for path in (str(tmp_path / "none"), "./none", "tests/none"):
        with pytest.raises(ValueError, match="none': there is no such folder"):
            load_model(path)


def test_embeddings_that_are_not_finite_have_no_score(checkpoint, arguments, tmp_path):
    model = NVEmbedModel.from_pretrained(checkpoint)
    model.embedding_model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "diverged")
    with pytest.raises(ValueError, match="embeddings hold NaN or infinity; if it was trained, lower"):
        run(arguments(model=str(tmp_path / "diverged")))


def test_texts_that_encode_refuses_are_mended(checkpoint):
    texts = ["a\0b", "half \ud83d", "whole \U0001f600"]
    assert [clean(text) for text in texts] == ["a b", "half �", "whole \U0001f600"]
    load_model(str(checkpoint)).embed(texts, "")


def test_no_more_tokens_than_the_decoder_has_positions(checkpoint, tmp_path, sentences, caplog):
    model = NVEmbedModel.from_pretrained(checkpoint)
    model.config.text_config.max_position_embeddings = 16
    model.save_pretrained(tmp_path / "few")
    loaded = load_model(str(tmp_path / "few"), max_length=100)
    assert loaded.max_length == 16, "so results say"
    assert "texts are cut at the decoder's 16 positions" in caplog.text
    expected = NVEmbedModel.from_pretrained(checkpoint).encode([" ".join(sentences)], max_length=16).numpy()
    assert loaded.embed([" ".join(sentences)], "") == pytest.approx(expected, abs=1e-6)
