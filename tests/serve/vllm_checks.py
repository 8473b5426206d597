"""Compares vLLM with `encode`; `make test-vllm` runs the two halves, each in its environment.

    .venv/bin/python tests/serve/vllm_checks.py prepare FOLDER      # checkpoints, and what encode makes of the texts
    .venv-vllm/bin/python tests/serve/vllm_checks.py check FOLDER   # the same through LLM.embed and through HTTP

Prints a line for each check and the throughput of both on the same texts; exits with the number of checks that failed.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from tokenizers import decoders

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.eval.speed.encode import real_texts, train_tokenizer
from nvembed.serve.demo import serve
from nvembed.texts_nvembed import format_instruction, load_tokenizer


GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
POSITIONS, PORT = 512, 8765
CLS = '{"seq_pooling_type": "CLS"}'
PARTS = '{"enable_chunked_processing": true, "max_embed_len": 4096}'
OWN = "Represent this sentence:"
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": POSITIONS, "initializer_range": 0.2,
}  # fmt: skip
LATENTS = {"hidden_dim": 64, "latent_dim": 64, "cross_dim_head": 24, "num_cross_heads": 4, "num_latents_value": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Switches of the decoder and other fields of the config, by the name of a checkpoint.
KINDS = {
    "released": ({}, {}),
    "folded": ({}, {}),
    "llama": ({"rope_parameters": LLAMA3}, {}),
    "qwen3": ({"qk_norm": True}, {}),
    "qwen2-self-attention": ({"qkv_bias": True}, {"pooling_type": "self_attention"}),
    "causal-eos": ({}, {"pooling_type": "eos", "mask_type": "c"}),
    "instruction-pooled": ({}, {"pooling_type": "mean", "is_mask_instruction": False}),
    "centred": ({}, {"latent_attention_config": LATENTS | {"subtract_mean": True}}),
}


# --- In the project's environment


def cases() -> list[tuple[list[str], str, int]]:
    """(texts, instruction, most tokens): the golden cases where they are there, and further ones."""
    question = format_instruction("Given a question, retrieve passages that answer the question")
    sentences, passages = real_texts()
    found = [
        (sentences[:12], question, POSITIONS),
        (passages[:6] + ["a", ""], "", POSITIONS),
        (sentences[12:16], question.rstrip(" "), POSITIONS),
        (sentences[16:20], OWN, POSITIONS),
        ([" ".join(passages[:40])], question, POSITIONS),  # cut
        (["What it says:\nQuery: is no instruction here", "Query: neither"], "", POSITIONS),
        (["A text.\nQuery: within a query"], question, POSITIONS),
    ]
    if (GOLDEN / "cases.json").is_file():
        golden = json.loads((GOLDEN / "cases.json").read_text())
        found += [(case["texts"], case["instruction"], min(case["max_length"], POSITIONS)) for case in golden]
    return found


def prepare(folder: Path) -> None:
    from nvembed.train.export import export
    from nvembed.train.released import append_eos, convert_released

    sentences, passages = real_texts()
    everything = cases()
    for name, (decoder, fields) in KINDS.items():
        if name in ("released", "folded") and GOLDEN.is_dir():
            tokenizer = load_tokenizer(str(GOLDEN / "checkpoint"), True)
        else:
            tokenizer = append_eos(train_tokenizer([*sentences, *passages[:50]]))
            tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
        torch.manual_seed(0)
        options = {"prompts": {"own": OWN}, "add_eos": name == "released", "latent_attention_config": LATENTS} | fields
        text_config = SHAPE | {"vocab_size": len(tokenizer)} | decoder
        model = NVEmbedModel(NVEmbedConfig(text_config=text_config, **options)).eval()
        for part in ("latent_attention_model", "_norm", "_proj.bias"):
            for parameter_name, parameter in model.named_parameters():
                if part in parameter_name:
                    torch.nn.init.normal_(parameter, mean=float(part == "_norm"), std=0.3)
        if name == "centred":
            torch.nn.init.normal_(model.latent_attention_model.mean_embedding)
        model.tokenizer = tokenizer
        if name == "released":
            model.save_pretrained(folder / "adds-eos")
            convert_released(str(folder / "adds-eos"), str(folder / name), tokenizer_adds_eos=True)
            model = NVEmbedModel.from_pretrained(folder / name)
        else:
            if name == "folded":
                model.tokenizer = append_eos(tokenizer)
                model.fold_latent_attention()
            model.save_pretrained(folder / name)
        expected = [
            (texts, instruction, length, model.encode(texts, instruction, length))
            for texts, instruction, length in everything
        ]
        torch.save(expected, folder / name / "expected.pt")
        if name == "instruction-pooled":
            export(model, str(folder / "stock"))
            torch.save(expected, folder / "stock" / "expected.pt")


# --- In vLLM's environment


class Checks:
    """Prints and counts."""

    def __init__(self):
        self.failed = 0

    def add(self, name: str, passed: bool, detail: str) -> None:
        self.failed += not passed
        print(f"{'ok' if passed else 'FAILED'}: {name}: {detail}", flush=True)

    def near(self, name: str, actual: list[list[float]], expected: torch.Tensor, bar: float = 1e-5) -> None:
        difference = (torch.tensor(actual) - expected).abs().max().item()
        self.add(name, difference < bar, f"{len(actual)} texts, largest difference {difference:.1e}")


def check_offline(folder: Path, name: str, checks: Checks) -> None:
    """Every case alone, and all texts of all cases in one batch; `stock` without our plugin."""
    from vllm import LLM, PoolingParams

    llm = LLM(
        model=str(folder / name), runner="pooling", dtype="float32", enforce_eager=True,
        trust_remote_code=name != "stock",
    )  # fmt: skip
    expected = torch.load(folder / name / "expected.pt")

    def embed(prompts: list[str], length: int, **options) -> list[list[float]]:
        cut = {"truncation": True, "max_length": length}
        outputs = llm.embed(prompts, tokenization_kwargs=cut, use_tqdm=False, **options)
        return [output.outputs.embedding for output in outputs]

    bar = 1e-4 if name == "stock" else 1e-5
    for texts, instruction, length, vectors in expected:
        found = embed([instruction + text for text in texts], length)
        checks.near(f"{name}, {instruction[:22]!r}, {length}", found, vectors, bar)
    whole = [case for case in expected if case[2] == POSITIONS]
    prompts = [instruction + text for texts, instruction, _, _ in whole for text in texts]
    checks.near(f"{name}, all at once", embed(prompts, POSITIONS), torch.cat([case[3] for case in whole]), bar)
    if name == "stock":  # vLLM's own models give no part of an embedding unless their config says so
        return
    texts, instruction, length, vectors = expected[0]
    narrow = torch.nn.functional.normalize(vectors[:, :16], dim=-1)
    found = embed([instruction + text for text in texts], length, pooling_params=PoolingParams(dimensions=16))
    checks.near(f"{name}, 16 dimensions", found, narrow)


def check_http(folder: Path, checks: Checks) -> None:
    """200 requests, 16 at a time, by the OpenAI client; and what the server refuses."""
    import openai

    expected = torch.load(folder / "released" / "expected.pt")
    whole = [case for case in expected if case[2] == POSITIONS]
    prompts = [instruction + text for texts, instruction, _, _ in whole for text in texts]
    vectors = torch.cat([case[3] for case in whole])
    order = [(7 * i) % len(prompts) for i in range(200)]
    with serve(folder / "released", PORT, folder / "server.log", "--dtype", "float32") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")

        def ask(prompt, **options):
            extra = {"truncate_prompt_tokens": -1} | options.pop("extra_body", {})
            answer = client.embeddings.create(model="nv-embed", input=prompt, extra_body=extra, **options)
            return [row.embedding for row in answer.data]

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda i: ask(prompts[i])[0], order))
        checks.near("HTTP, 200 requests at 16 at a time", answers, vectors[order])
        checks.near("HTTP, one request of all texts", ask(prompts), vectors)
        narrow = torch.nn.functional.normalize(vectors[:3, :8], dim=-1)
        checks.near("HTTP, 8 dimensions", ask(prompts[:3], dimensions=8), narrow)
        for name, words, options in (
            ("dimensions out of range", "dimension", {"input": "a", "dimensions": 65}),
            ("a text beyond the limit", str(POSITIONS), {"input": "word " * 2000}),
            ("no text", "at least one", {"input": []}),
        ):
            try:
                client.embeddings.create(model="nv-embed", **options)
                checks.add(name, False, "was answered")
            except openai.APIStatusError as error:
                found = error.status_code == 400 and words in str(error)
                checks.add(name, found, f"{error.status_code}, {str(error)[:160]}")


def check_refusals(folder: Path, checks: Checks) -> None:
    for name, model, words, options in (
        ("a tokenizer without </s>", "adds-eos", "--tokenizer_adds_eos", ()),
        ("chunked prefill", "released", "--enable-chunked-prefill: NV-Embed needs", ("--enable-chunked-prefill",)),
        ("prefix caching", "released", "--enable-prefix-caching: NV-Embed needs", ("--enable-prefix-caching",)),
        ("processing in parts", "released", "in --pooler-config: NV-Embed needs", ("--pooler-config", PARTS)),
        ("another pooling", "released", "pools as its config.json says", ("--pooler-config", CLS)),
        ("3 parts of 2 heads", "released", "divisible by", ("--tensor-parallel-size", "3")),
    ):
        log = folder / "refused.log"
        try:
            with serve(folder / model, PORT, log, "--dtype", "float32", *options):
                checks.add(f"refused: {name}", False, "was served")
        except RuntimeError:
            found = next((line for line in log.read_text(errors="replace").splitlines() if words in line), None)
            checks.add(f"refused: {name}", found is not None, (found or f"nothing in {log} says {words!r}")[-160:])


def measure(folder: Path, checks: Checks) -> None:
    """Texts/s of `LLM.embed` and `encode` in turns, on 10 layers of SmolLM2's shape."""
    from vllm import LLM

    llm = LLM(
        model=str(folder / "speed"), runner="pooling", dtype="float32", trust_remote_code=True, max_model_len=512
    )  # fmt: skip
    model = NVEmbedModel.from_pretrained(folder / "speed")
    sentences, passages = real_texts()
    question = format_instruction("Given a question, retrieve passages that answer the question")
    for name, texts, instruction in (("queries", sentences[:256], question), ("passages", passages[:64], "")):
        prompts = [instruction + text for text in texts]
        seconds: dict[str, list[float]] = {"vllm": [], "encode": []}
        for i in range(4):
            start = time.perf_counter()
            theirs = torch.tensor([o.outputs.embedding for o in llm.embed(prompts, use_tqdm=False)])
            middle = time.perf_counter()
            ours = model.encode(texts, instruction, 512)
            if i:  # the first warms up
                seconds["vllm"].append(middle - start)
                seconds["encode"].append(time.perf_counter() - middle)
        speed = {way: len(texts) / median(values) for way, values in seconds.items()}
        difference = (theirs - ours).abs().max().item()
        checks.add(
            f"throughput, {len(texts)} {name}", difference < 1e-4,
            f"vllm {speed['vllm']:.1f}, encode {speed['encode']:.1f} texts/s; largest difference {difference:.1e}",
        )  # fmt: skip


def prepare_speed(folder: Path) -> None:
    from nvembed.eval.speed.encode import random_model
    from nvembed.train.released import append_eos

    model = random_model("smollm2", 10, "cpu", torch.float32)
    sentences, passages = real_texts()
    model.tokenizer = append_eos(train_tokenizer(sentences + passages))
    model.tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    model.config.add_eos = False
    model.fold_latent_attention()
    model.save_pretrained(folder / "speed")


def main() -> int:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "prepare":
        folder.mkdir(parents=True)
        prepare(folder)
        prepare_speed(folder)
        return 0
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    checks = Checks()
    if what == "offline":  # a process each: an engine does not give back its memory
        check_offline(folder, sys.argv[3], checks)
    elif what == "speed":
        measure(folder, checks)
    elif what == "http":
        check_http(folder, checks)
        check_refusals(folder, checks)
    else:
        for name in (*KINDS, "stock"):
            environment = os.environ | ({"VLLM_PLUGINS": ""} if name == "stock" else {})
            command = [sys.executable, __file__, "offline", folder, name]
            checks.failed += subprocess.run(command, env=environment).returncode != 0
        for part in ("http", "speed"):
            checks.failed += subprocess.run([sys.executable, __file__, part, folder]).returncode != 0
        print(f"{checks.failed} failed")
    return checks.failed


if __name__ == "__main__":
    sys.exit(main())
