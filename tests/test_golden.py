"""The golden cases: what the released code computes. Needs torch, transformers and pytest alone; `make test-versions`
runs this file in one environment for each supported version."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.texts_nvembed import pad, tokenize
from nvembed.train.released import convert_released


CASES = ["queries", "passages", "symmetric", "truncated", "truncated_passages", "no_trailing_space"]


@pytest.fixture(scope="module")
def golden(golden_dir):
    cases = {case["name"]: case for case in json.loads((golden_dir / "cases.json").read_text())}
    return (
        NVEmbedModel.from_pretrained(golden_dir / "checkpoint"),
        NVEmbedModel.from_pretrained(golden_dir / "checkpoint", fold_latent_attention=True),
        cases,
        load_file(golden_dir / "expected.safetensors"),
    )


def encode_case(model, case, **options):
    return model.encode(case["texts"], instruction=case["instruction"], max_length=case["max_length"], **options)


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_encode_equals_released_code(golden, name, is_folded):
    model, case, expected = golden[is_folded], golden[2][name], golden[3]
    assert model.config.latent_attention_is_folded == is_folded
    torch.testing.assert_close(encode_case(model, case), expected[name], atol=1e-5, rtol=0)
    alone = torch.cat([encode_case(model, case | {"texts": [text]}) for text in case["texts"]])
    torch.testing.assert_close(alone, expected[f"{name}.single"], atol=1e-5, rtol=0)


def test_every_golden_case_is_tested(golden):
    assert sorted(golden[2]) == sorted(CASES)


@pytest.mark.parametrize("name", ["queries", "symmetric"])
def test_tokens_equal_released_code(golden, name):
    model, _, cases, expected = golden
    case = cases[name]
    instructions = [case["instruction"]] * len(case["texts"])
    rows = tokenize(model.tokenizer, model.config, case["texts"], instructions, case["max_length"])
    features = pad(rows, model.tokenizer.pad_token_id)
    assert features["input_ids"].equal(expected[f"{name}.input_ids"])
    assert features["attention_mask"].equal(expected[f"{name}.attention_mask"])
    with torch.no_grad():
        states = model(features["input_ids"], features["attention_mask"]).last_hidden_state
    valid = features["attention_mask"].bool()
    # States are not normalized: their size is about 10, so 1e-5 is taken relative to it.
    torch.testing.assert_close(states[valid], expected[f"{name}.tokens"][valid], atol=1e-5, rtol=1e-5)


def test_full_size_model_has_the_released_tensors(golden_dir):
    index = json.loads((golden_dir / "official" / "model.safetensors.index.json").read_text())
    config = NVEmbedConfig.from_pretrained(golden_dir / "official")
    with torch.device("meta"):
        model = NVEmbedModel(config)
    weights = model.state_dict()
    assert sorted(weights) == sorted(index["weight_map"])
    assert sum(2 * tensor.numel() for tensor in weights.values()) == index["metadata"]["total_size"]


# --- Remote code


@pytest.mark.slow
def test_converted_checkpoint_equals_released_code(golden, golden_dir, encode_without_nvembed, tmp_path):
    convert_released(str(golden_dir / "checkpoint"), str(tmp_path / "converted"))
    case, expected = golden[2]["queries"], golden[3]["queries"]
    inputs = (case["texts"], case["instruction"], case["max_length"])
    actual, again = encode_without_nvembed(tmp_path / "converted", *inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (again / "modeling_nvembed.py").is_file()
    actual, _ = encode_without_nvembed(again, *inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.skipif("NVEMBED_SAVED_ELSEWHERE" not in os.environ, reason="`make test-versions` names the folder")
@pytest.mark.parametrize("name", ["queries", "truncated_passages"])
def test_checkpoint_saved_by_another_version_loads(golden, encode_without_nvembed, name):
    case, expected = golden[2][name], golden[3][name]
    folder = Path(os.environ["NVEMBED_SAVED_ELSEWHERE"], "converted")
    actual, _ = encode_without_nvembed(folder, case["texts"], case["instruction"], case["max_length"])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
