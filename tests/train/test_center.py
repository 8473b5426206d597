"""The mean embedding as a constant of the checkpoint, by every way that embeds."""

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.texts_nvembed import format_instruction
from nvembed.train.center import CenterArguments, main
from nvembed.train.compress.prune import drop_latent_attention
from nvembed.train.distillation import add_projection
from nvembed.train.export import check_exportable
from nvembed.train.merge import merge
from tests.triplets import write_jsonl


@pytest.fixture
def centred(tmp_path, checkpoint, sentences):
    """A checkpoint centred on eight triplets without instructions, each text once."""
    rows = [{"query": a, "positive": f"{a} {b}"} for a, b in zip(sentences, sentences[1:] + sentences[:1])]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    options = {"datasets": [path], "num_negatives": 0, "instruction": "", "calibration_samples": 8, "max_length": 250}
    main(CenterArguments(model_name_or_path=str(checkpoint), output_dir=str(tmp_path / "centred"), **options))
    return tmp_path / "centred", [text for row in rows for text in row.values()]


def raw(model: NVEmbedModel, texts: list[str], instruction: str = "") -> torch.Tensor:
    return model.encode(texts, instruction=instruction, normalize=False)


def test_every_way_subtracts_the_mean(centred, checkpoint, sentences):
    folder, texts = centred
    plain = NVEmbedModel.from_pretrained(checkpoint)
    mean = raw(plain, texts).mean(0)
    instruction = format_instruction("Find it")
    expected = F.normalize(raw(plain, sentences, instruction) - mean, dim=-1)
    model = NVEmbedModel.from_pretrained(folder)
    torch.testing.assert_close(model.latent_attention_model.mean_embedding, mean, atol=1e-5, rtol=1e-4)
    assert raw(model, texts).mean(0).norm() < 1e-4 * mean.norm()
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(model.encode(sentences, instruction=instruction), expected, **close)
    assert not torch.allclose(plain.encode(sentences, instruction=instruction), expected, atol=1e-2)
    one_by_one = torch.cat([model.encode([text], instruction=instruction) for text in sentences])
    torch.testing.assert_close(one_by_one, expected, **close)
    under_st = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(
        under_st.encode(sentences, prompt=instruction, convert_to_tensor=True), expected, **close
    )
    folded = NVEmbedModel.from_pretrained(folder, fold_latent_attention=True)
    torch.testing.assert_close(folded.encode(sentences, instruction=instruction), expected, **close)
    assert "mean cosine" in (folder / "README.md").read_text()


def test_what_would_lose_the_mean_is_refused(centred, tmp_path):
    folder, _ = centred
    model = NVEmbedModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="subtracts the mean of what comes behind the latent attention"):
        drop_latent_attention(model)
    with pytest.raises(ValueError, match="embeddings are centred .* start from the checkpoint before train/center.py"):
        add_projection(model, 12)
    with pytest.raises(ValueError, match="subtracts a mean .* export the checkpoint that train/center.py"):
        check_exportable(model.config, str(folder), pool_instructions=True)
    with pytest.raises(ValueError, match="subtracts the mean of its own embeddings.*merge the checkpoints before"):
        merge([str(folder), str(folder)], [1.0, 1.0])
    again = CenterArguments(model_name_or_path=str(folder), output_dir=str(tmp_path / "again"), datasets=[])
    with pytest.raises(ValueError, match="is centred already; center the checkpoint that it was made from"):
        main(again)
    assert not (tmp_path / "again").exists()
