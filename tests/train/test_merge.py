"""The mean of checkpoints' weights."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.certificate import merged_certificate
from nvembed.train.merge import MergeArguments, main


@pytest.fixture
def seeds(tmp_path, model):
    """Three checkpoints of one shape, the second in bf16, and their weights."""
    weights = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        written = model.to(torch.bfloat16) if seed == 1 else model.float()
        weights.append({name: tensor.double() for name, tensor in written.state_dict().items()})
        written.save_pretrained(tmp_path / str(seed))
        model.float()
    return [str(tmp_path / str(seed)) for seed in range(3)], weights


@pytest.mark.parametrize("shares", [None, [3.0, 1.0, 4.0]])
def test_weights_are_averaged(tmp_path, seeds, shares):
    folders, weights = seeds
    certificates = [
        {"complete": True, "base": "b", "stages": [{"stage": stage, "sets": [{"name": stage, "mteb": [task]}]}]}
        for stage, task in (("x", "STS12"), ("y", "STSBenchmark"), ("x", "STS12"))
    ]
    for folder, certificate in zip(folders, certificates):
        (tmp_path / folder / "training_data.json").write_text(json.dumps(certificate))
        (tmp_path / folder / "README.md").write_text(f"---\ndatasets:\n- org/{folder[-1]}\n---\n# A card\n")
    main(MergeArguments(folders, str(tmp_path / "merged"), shares))
    merged = NVEmbedModel.from_pretrained(tmp_path / "merged")
    a, b, c = shares or [1, 1, 1]
    for name, tensor in merged.state_dict().items():
        expected = (a * weights[0][name] + b * weights[1][name] + c * weights[2][name]) / (a + b + c)
        torch.testing.assert_close(tensor, expected.float(), atol=1e-6, rtol=1e-6)
    seen = json.loads((tmp_path / "merged" / "training_data.json").read_text())
    assert [stage["stage"] for stage in seen["stages"]] == ["x", "y"] and seen["complete"]
    (tmp_path / "2" / "training_data.json").write_text(json.dumps(certificates[2] | {"complete": False}))
    assert not merged_certificate(folders)["complete"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert ModelCard(card).data.datasets == ["org/0", "org/1", "org/2"]
    assert "the mean of the weights of" in card
    assert 'training_datasets = {\n    "STS12",\n    "STSBenchmark",\n}' in card, "of all, as a leaderboard reads it"


def test_what_has_no_mean_is_refused(tmp_path, seeds):
    folders, _ = seeds
    file = tmp_path / "1" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_mask_instruction": False}))
    with pytest.raises(ValueError, match="1 has is_mask_instruction False and .*0 True: only checkpoints of one shape"):
        main(MergeArguments(folders[:2], str(tmp_path / "merged")))
    file = tmp_path / "2" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="has another tokenizer than"):
        main(MergeArguments([folders[0], folders[2]], str(tmp_path / "merged")))
    with pytest.raises(ValueError, match=r"weights is \[1.0\] for 2 models"):
        MergeArguments(folders[:2], "x", [1.0])
    with pytest.raises(ValueError, match=r"weights is \[1.0, nan\] for 2 models"):
        MergeArguments(folders[:2], "x", [1.0, float("nan")])
    with pytest.raises(ValueError, match="name two or more"):
        MergeArguments(folders[:1], "x")
    assert not (tmp_path / "merged").exists()
