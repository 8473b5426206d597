"""Pictures of latents and of embeddings: what they are drawn from, against other computations."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import silhouette_score

from nvembed.eval import latents, show_embeddings, show_latents
from nvembed.eval.data.labelled import LabelledArguments
from nvembed.eval.plots import names_of
from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.texts_nvembed import format_instruction, pack, tokenize
from tests import preloaded
from tests.triplets import write_jsonl


ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path, sentences):
    """Two classes of eight texts each."""
    rows = [{"text": f"{text} {word}", "label": word} for word in ("never", "always") for text in sentences]
    write_jsonl(tmp_path / "data" / "test.jsonl", rows)
    return tmp_path / "data"


def test_attention_is_that_of_the_unfolded_block(model, sentences):
    """By the block's own projections, one text at a time; and the folded block attends alike."""
    torch.manual_seed(1)
    for parameter in model.latent_attention_model.parameters():
        parameter.data.normal_(std=0.5)
    seen = latents.attention(model, sentences, "Find it", 64)
    attend = model.latent_attention_model.cross_attend_blocks[0]
    heads, width = model.config.latent_attention_config.num_cross_heads, attend.fn.head_dim
    keys = attend.fn.to_kv(attend.norm_context(model.latent_attention_model.latents)).chunk(2, dim=-1)[0]
    prefix, occurrences = format_instruction("Find it"), 0
    for text, of_text in zip(sentences, seen.of_texts):
        chunk = pack(tokenize(model.tokenizer, model.config, [text], [prefix], 64))
        states = model.embedding_model(chunk["input_ids"][None])[0]
        queries = attend.fn.to_q(attend.norm(states)).unflatten(-1, (heads, width)).transpose(0, 1)
        scores = queries @ keys.unflatten(-1, (heads, width)).permute(1, 2, 0) / width**0.5
        expected = scores.softmax(-1).transpose(0, 1)[chunk["pool_mask"].bool()]
        torch.testing.assert_close(of_text, expected.mean(0), atol=1e-5, rtol=1e-4)
        occurrences += len(expected)
    assert sum(count for count, _ in seen.tokens.values()) == occurrences
    folded = latents.attention(model.fold_latent_attention(), sentences, "Find it", 64)
    torch.testing.assert_close(folded.of_texts, seen.of_texts, atol=1e-5, rtol=1e-4)
    total = sum(total for _, total in seen.tokens.values())
    torch.testing.assert_close(total.sum(-1), torch.full((heads,), float(occurrences)), atol=1e-2, rtol=0)


def test_separation_is_a_t_statistic_without_the_counts():
    torch.manual_seed(0)
    of_texts, labels = torch.rand(30, 2, 5), ["a"] * 12 + ["b"] * 18
    of_texts[:12, 1, 3] += 2
    t = stats.ttest_ind(of_texts[:12].numpy(), of_texts[12:].numpy()).statistic
    expected = torch.from_numpy(t * np.sqrt(1 / 12 + 1 / 18)).float()
    result = latents.separation(of_texts, labels, ("a", "b"))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert result.abs().max() > 3 * latents.by_chance(of_texts, labels, 0)
    even = torch.full((4, 1, 8), 1 / 8)
    torch.testing.assert_close(latents.used_latents(even), torch.tensor([8.0]))


def test_maps_of_latents_are_sorted_by_head():
    torch.manual_seed(0)
    of_texts, labels = torch.rand(12, 2, 5), ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    attention, apart = latents.maps(of_texts, labels, ["a", "c"], ("b", "c"))
    for head in range(2):
        order = sorted(range(5), key=lambda latent: -of_texts[:, head, latent].mean().item())
        for place, latent in enumerate(order):
            torch.testing.assert_close(attention[0, head, place], of_texts[:4, head, latent].mean())
            torch.testing.assert_close(attention[1, head, place], of_texts[8:, head, latent].mean())
        t = stats.ttest_ind(of_texts[4:8, head].numpy(), of_texts[8:, head].numpy()).statistic * np.sqrt(1 / 4 + 1 / 4)
        np.testing.assert_allclose(apart[head], sorted(t, reverse=True), rtol=1e-4, atol=1e-4)


def test_of_many_latents_both_ends_are_drawn():
    scores = torch.arange(60.0, 0, -1).view(2, 30)
    expected = torch.cat([scores[:, :12], scores[:, 18:]], dim=1)
    torch.testing.assert_close(latents.ends(scores, 24), expected)
    assert latents.ends(scores, 30) is scores


def test_models_with_other_heads_and_many_latents_are_drawn_beside_each_other(tmp_path):
    """A share of 0, which has no logarithm, among them."""
    torch.manual_seed(0)
    labels = ["a"] * 5 + ["b"] * 5
    shares = [torch.rand(10, heads, count).softmax(-1) for heads, count in ((2, 40), (1, 3))]
    shares[1][:, 0, 0] = 0
    seen = {name: latents.Attention(share, {}) for name, share in zip(("many", "few"), shares)}
    show_latents.draw(seen, labels, ("a", "b"), tmp_path / "latents.png")
    assert (tmp_path / "latents.png").stat().st_size > 10000


def test_latents_are_shown(tmp_path, checkpoint, data):
    options = {"data": str(data), "output_dir": str(tmp_path / "out"), "beside": str(checkpoint), "top": 3}
    options["names"] = ["trained", "before"]
    show_latents.main(show_latents.LatentsArguments(model=str(checkpoint), **options))
    found = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert [one["checkpoint"] for one in found["models"]] == [str(checkpoint)] * 2
    assert found["texts"] == 16 and [len(one["pairs"][0]["latents"]) for one in found["models"]] == [3, 3]
    page = (tmp_path / "out" / "LATENTS.md").read_text()
    assert page.count("| head | latent | always | never | separation |") == 2 and "## before: always / never" in page
    assert (tmp_path / "out" / "latents.png").stat().st_size > 10000
    model = NVEmbedModel.from_pretrained(checkpoint)
    model.config.pooling_type = "mean"
    with pytest.raises(ValueError, match="the model has pooling_type 'mean'; only latent_attention has latents"):
        latents.attention(model, ["a"], "", 64)
    model.config.save_pretrained(tmp_path / "mean")
    options["beside"] = str(tmp_path / "mean")
    with pytest.raises(ValueError, match="mean has pooling_type 'mean'; only latent_attention has latents"):
        show_latents.main(show_latents.LatentsArguments(model=str(checkpoint), **options))
    with pytest.raises(ValueError, match="top is 0; it must be 1 or more"):
        show_latents.LatentsArguments(model="m", data="d", output_dir="o", top=0)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_maps_lie_on_the_first(method):
    """A model whose embeddings are the first's, turned, has the same map."""
    generator = np.random.default_rng(0)
    vectors = np.concatenate([generator.normal(place, 0.3, (20, 6)) for place in ([1] * 6, [-1, 1, 1, -1, 1, -1])])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    turn = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    options = {"data": "x", "models": ["a", "b"], "output_dir": "y", "method": method, "perplexity": 5}
    labels = ["a"] * 20 + ["b"] * 20
    args = show_embeddings.EmbeddingsArguments(**options)
    pair = [x.astype(np.float32) for x in (vectors, vectors @ turn)]
    first, second = show_embeddings.make_maps(pair, labels, args)
    if method == "pca":
        np.testing.assert_allclose(first.points, second.points, atol=1e-3)
    for one in (first, second):
        assert np.abs(one.points).max() == pytest.approx(1)
        assert silhouette_score(one.points, labels) > 0.2, "classes that are apart lie apart"
    assert first.figures == pytest.approx(second.figures, abs=1e-3)
    assert first.figures["silhouette"] > 0.5


def test_embeddings_are_shown_in_one_page_that_needs_nothing_else(tmp_path, checkpoint, data):
    rows = [{"text": f"</script><b>{i} {word}", "label": word} for word in ("x", "y") for i in range(5)]
    write_jsonl(data / "odd.jsonl", rows)
    options = {"data": str(data), "split": "odd", "output_dir": str(tmp_path / "out"), "perplexity": 3}
    models = [str(checkpoint)] * 2
    args = show_embeddings.EmbeddingsArguments(models=models, names=["before", "after"], **options)
    show_embeddings.main(args)
    page = (tmp_path / "out" / "embeddings.html").read_text()
    assert not re.search(r"""(src|href)=|@import|url\(|https?://""", page), "nothing is loaded"
    assert page.count("</script>") == 2, "no text ends the script"
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert data["texts"][0] == rows[0]["text"] and data["classes"] == ["x", "y"] and data["labels"] == [0] * 5 + [1] * 5
    assert [len(one["points"]) for one in data["maps"]] == [10, 10]
    assert data["maps"][0]["caption"].startswith("before: silhouette ")
    assert (tmp_path / "out" / "embeddings.png").stat().st_size > 10000
    if shutil.which("node"):
        script = tmp_path / "page.js"
        script.write_text(re.findall(r"<script>(.*?)</script>", page, re.S)[0])
        subprocess.run(["node", "--check", script], check=True)
    with pytest.raises(ValueError, match="perplexity is 30 for 10 texts"):
        show_embeddings.project(np.eye(10, dtype=np.float32), show_embeddings.EmbeddingsArguments(
            data="x", models=["m"], output_dir="y"
        ))  # fmt: skip


def test_names_tell_models_apart():
    assert names_of(["runs/a/stage2", "runs/base"], None) == ["stage2", "base"]
    assert names_of(["runs/a/stage2", "runs/b/stage2"], None) == ["a/stage2", "b/stage2"]
    assert names_of(["m", "m"], ["before", "after"]) == ["before", "after"]
    with pytest.raises(ValueError, match=r"names is \['x'\] for 2 models; give one for each"):
        names_of(["a", "b"], ["x"])
    with pytest.raises(ValueError, match="two models have one name"):
        show_embeddings.EmbeddingsArguments(data="x", models=["m", "m"], output_dir="y")


def test_texts_that_cannot_be_shown_are_named(data):
    write_jsonl(data / "one.jsonl", [{"text": text, "label": "once" if text == "a" else "often"} for text in "abc"])
    for options, words in (
        ({"classes": ["never", "often"]}, "classes has 'often', which no text has; labels are always, never"),
        ({"classes": ["never"]}, "classes names one class, never; there is nothing"),
        ({"classes": ["never", "never"]}, "classes names one class, never; there is nothing"),
        ({"split": "dev"}, "there is no dev.jsonl"),
        ({"samples": 1}, "samples is 1"),
        ({"split": "one"}, "has 1 text of class 'once'; each class needs two"),
    ):
        with pytest.raises(ValueError, match=words):
            LabelledArguments(str(data), **options).read()
    chosen = LabelledArguments(str(data), samples=3).read()
    assert [label for _, label in chosen] == ["always"] * 3 + ["never"] * 3


@pytest.mark.slow
def test_errors_of_the_script_are_one_line(tmp_path, checkpoint):
    options = ["--model", checkpoint, "--data", "none", "--output_dir", tmp_path]
    done = preloaded.run(ROOT / "eval/show_latents.py", *options)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("show_latents: data 'none': there is no")
