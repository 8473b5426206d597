"""Tiny fixtures, made on the spot: a decoder of 3 layers, a tokenizer of 400 pieces, a checkpoint from both."""

# ruff: noqa: E402
import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


# Libraries read these when they are imported. No test waits for the Hub, or leaves data sets in the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="nvembed-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
# Beside other workers of pytest-xdist, a test and what it starts use their share of the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nvembed import NVEmbedModel


ROOT = Path(__file__).parents[1]
SENTENCES = [
    "Return a list of all files below a folder.",
    "Open a connection to the server and read its greeting.",
    "Convert the date to a string in the local format.",
    "Raise an error when the key is not found.",
    "Count the words of a text, one line at a time.",
    "Send the message to every address in the list.",
    "Draw a circle of the given radius.",
    "Sort the numbers and return their median.",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several workers, slow tests first: a long one that begins last would keep the others waiting."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def decoder_dir(tmp_path_factory) -> Path:
    """A Llama-layout base with random weights and a byte-level BPE tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, "Instruct: Given a question, retrieve\nQuery: "] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # wide, so that attention is far from uniform
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def init_args(decoder_dir):
    """`InitArguments` for the tiny decoder; keywords override."""
    # Not at the top: `make test-versions` runs in environments without what training needs.
    from nvembed.train.init_checkpoint import InitArguments

    def make(output_dir="unused", **overrides) -> InitArguments:
        options = {"base": str(decoder_dir), "num_latents": 8, "num_cross_heads": 2, "cross_dim_head": 24}
        return InitArguments(output_dir=str(output_dir), **(options | overrides))

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, init_args) -> Path:
    """An untrained checkpoint folder."""
    from nvembed.train.checkpoints import write_checkpoint
    from nvembed.train.init_checkpoint import init_model

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_checkpoint(init_model(init_args()), str(folder))
    return folder


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory, decoder_dir, init_args):
    """An untrained checkpoint with rows of 64, a whole block of NF4's."""
    # Not at the top: `make test-versions` runs in environments without what training needs.
    from nvembed.train.checkpoints import write_checkpoint
    from nvembed.train.init_checkpoint import init_model

    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(decoder_dir, folder / "decoder")
    (folder / "decoder" / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(decoder_dir)
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "decoder")
    write_checkpoint(init_model(init_args(base=str(folder / "decoder"))), str(folder / "checkpoint"))
    return folder / "checkpoint"


@pytest.fixture
def model(checkpoint) -> NVEmbedModel:
    """The tiny checkpoint with every new weight random, as if trained."""
    model = NVEmbedModel.from_pretrained(checkpoint)
    randomize(model.latent_attention_model)
    return model


@torch.no_grad()
def randomize(module: torch.nn.Module, std: float = 0.3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return SENTENCES


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    folder = Path(os.environ.get("NVEMBED_GOLDEN_DIR", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        absent = f"{folder} is absent: nothing shows here that embeddings equal those of the released code"
        if os.environ.get("NVEMBED_REQUIRE_GOLDEN") == "1":
            pytest.fail(absent)
        pytest.skip(absent)
    return folder


@pytest.fixture
def encode_without_nvembed(tmp_path):
    """Encodes by `AutoModel.from_pretrained(folder, trust_remote_code=True)` in a process that cannot import nvembed.

    Returns the embeddings and the folder to which that process saved the model.
    """

    def run(checkpoint: Path, texts: list[str], instruction: str, max_length: int) -> tuple[torch.Tensor, Path]:
        script = f"""
import sys, torch
sys.modules["nvembed"] = None  # any import of it fails
from transformers import AutoModel
model = AutoModel.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
torch.save(model.encode({texts!r}, {instruction!r}, {max_length}), "out.pt")
model.save_pretrained("again")
"""
        folder = tmp_path / f"process-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        environment = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
        subprocess.run([sys.executable, "-c", script], check=True, cwd=folder, env=environment)
        return torch.load(folder / "out.pt"), folder / "again"

    return run
