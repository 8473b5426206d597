"""Small data sets of every type of task in one folder, vectors for their texts, an evaluation, a grid of trainings."""

import json
import random
import shutil
import zlib

import numpy as np
import pytest
import yaml
from transformers import BertConfig, BertModel

from nvembed.eval.run_mteb import MtebArguments
from tests.triplets import write_jsonl, write_similarity_task


def vector(text: str, width: int = 8) -> np.ndarray:
    """A fixed random vector per text, drawn towards its first letter's, so that scores are neither 0 nor 1."""
    centre, own = (np.random.default_rng(zlib.crc32(t.encode())).normal(size=width) for t in (text[:1], text))
    return (0.7 * centre + own).astype(np.float32)


@pytest.fixture
def embed():
    """An `Embed` that looks texts up; `embed.calls` are its (texts, prefix)."""

    def look_up(texts, prefix):
        look_up.calls.append((list(texts), prefix))
        return np.stack([vector(text) for text in texts])

    look_up.calls = []
    return look_up


@pytest.fixture
def data(tmp_path):
    """Folders `retrieval`, `reranking`, `classification`, `clustering`, `sets`, `sts`, `pairs`, and `tasks.yaml`."""
    rng = random.Random(0)
    letters = "abc"
    texts = [f"{rng.choice(letters)} text {i}" for i in range(90)]
    labelled = [{"text": text, "label": f"class {text[0]}"} for text in texts]
    root = tmp_path / "data"
    write_jsonl(root / "classification" / "train.jsonl", labelled[:60])
    write_jsonl(root / "classification" / "test.jsonl", labelled[60:])
    write_jsonl(root / "clustering" / "test.jsonl", labelled)
    halves = [labelled[:50], labelled[50:]]
    sets = [{"sentences": [r["text"] for r in half], "labels": [r["label"] for r in half]} for half in halves]
    write_jsonl(root / "sets" / "test.jsonl", sets)
    pairs = [{"sentence1": texts[i], "sentence2": texts[-1 - i]} for i in range(45)]
    same = [int(pair["sentence1"][0] == pair["sentence2"][0]) for pair in pairs]
    write_jsonl(root / "sts" / "test.jsonl", [{**p, "score": 4 * s + rng.random()} for p, s in zip(pairs, same)])
    write_jsonl(root / "pairs" / "test.jsonl", [{**p, "label": s} for p, s in zip(pairs, same)])
    write_jsonl(root / "retrieval" / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    queries = [f"{letters[i % 3]} query {i}" for i in range(12)]
    write_jsonl(root / "retrieval" / "queries.jsonl", [{"_id": f"q{i}", "text": q} for i, q in enumerate(queries)])
    (root / "retrieval" / "qrels").mkdir()
    judgements = [(f"q{i}", f"d{d}", 1 + d % 2) for i in range(12) for d in rng.sample(range(90), 1 + i % 5)]
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, judgement)) for judgement in judgements)]
    (root / "retrieval" / "qrels" / "test.tsv").write_text("\n".join(lines))
    ranked = [
        {"query": f"{q}?", "positive": rng.sample(texts[:45], 2), "negative": rng.sample(texts[45:], 6)}
        for q in queries
    ]
    write_jsonl(root / "reranking" / "test.jsonl", ranked)
    kinds = {"retrieval": "Retrieval", "reranking": "Reranking", "classification": "Classification"}
    kinds |= {"clustering": "Clustering", "sets": "Clustering", "sts": "STS", "pairs": "PairClassification"}
    entries = [f"  - {{type: {kind}, path: {name}, instruction: Do {name}}}" for name, kind in kinds.items()]
    (root / "tasks.yaml").write_text("tasks:\n" + "\n".join(entries) + "\n")
    return root


@pytest.fixture
def arguments(checkpoint, data, tmp_path):
    """Makes the arguments of an evaluation of the tiny checkpoint on `data`, or of what is named instead."""

    def make(output_dir="out", **options):
        defaults = {"model": str(checkpoint), "tasks": [str(data / "tasks.yaml")], "max_length": 64}
        return MtebArguments(output_dir=str(tmp_path / output_dir), **(defaults | options))

    return make


@pytest.fixture(scope="session")
def baseline(decoder_dir, tmp_path_factory):
    """A sentence-transformers model with prompts of its own."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("baseline")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=400, max_position_embeddings=128, **shape)).save_pretrained(folder / "bert")
    for file in decoder_dir.glob("tokenizer*"):
        shutil.copy(file, folder / "bert")
    tokenizer = json.loads((folder / "bert" / "tokenizer_config.json").read_text())
    (folder / "bert" / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"pad_token": "</s>"}))
    model = sentence_transformers.SentenceTransformer(str(folder / "bert"), device="cpu")
    model.prompts = {"query": "find: ", "document": "", "STS": "like: "}
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture
def write_grid(decoder_dir, tmp_path, sentences):
    """Writes a grid of the tiny decoder with two poolings, trained on eight pairs, measured by eight similarities."""
    write_similarity_task(tmp_path, "scored", sentences)
    pairs = [{"query": a, "positive": b} for a, b in zip(sentences, sentences[::-1])]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    recipe = {
        "datasets": [{"path": "pairs.jsonl", "instruction": "Find it"}], "num_negatives": 1, "max_length": 64,
        "batch_size": 4, "max_steps": 2, "use_cpu": True, "warmup_steps": 0, "stage1": {}, "stage2": {},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def write(**changes) -> str:
        content = {
            "title": "Poolings", "recipe": "recipe.yaml", "steps": ["init", "stage1"], "tasks": "tasks.yaml",
            "seeds": [1], "max_length": 64,
            "options": {"init": {"base": str(decoder_dir), "num_latents": 8, "num_cross_heads": 2}},
            "axes": {"pooling": {"mean": {"init": {"pooling_type": "mean"}}, "eos": {"init": {"pooling_type": "eos"}}}},
            "paper": {"mean": 71.5, "eos": 71.0},
            "claims": [{"text": "The mean wins", "better": {"pooling": "mean"}, "worse": {"pooling": "eos"}}],
        }  # fmt: skip
        if "axes" in changes:  # what names the usual cells goes with them
            del content["paper"], content["claims"]
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return str(tmp_path / "grid.yaml")

    return write
