"""Checkpoints under sentence-transformers, mteb, LangChain and LlamaIndex: each gives what `encode` gives."""

import copy
import inspect
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from nvembed import NVEmbedModel
from nvembed.eval.tasks.instructions import task_prompts
from nvembed.modeling_nvembed import NVEmbedTransformer
from nvembed.texts_nvembed import pad, tokenize
from nvembed.train.released import convert_released


sentence_transformers = pytest.importorskip("sentence_transformers")
SentenceTransformer = sentence_transformers.SentenceTransformer
NQ = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "


@pytest.fixture(scope="module")
def st_checkpoint(checkpoint, tmp_path_factory):
    """The tiny checkpoint with trained latents."""
    folder = tmp_path_factory.mktemp("st") / "checkpoint"
    model = NVEmbedModel.from_pretrained(checkpoint)
    torch.manual_seed(1)
    for parameter in model.latent_attention_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def st_model(st_checkpoint):
    return SentenceTransformer(str(st_checkpoint), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def reference(st_checkpoint):
    return NVEmbedModel.from_pretrained(st_checkpoint)


def assert_same(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(np.array(actual)), torch.as_tensor(expected), atol=tolerance, rtol=0)


# --- sentence-transformers


def test_golden_cases(golden_dir, tmp_path):
    """A released checkpoint, converted: no `</s>` added by hand, no patch."""
    convert_released(str(golden_dir / "checkpoint"), str(tmp_path / "converted"))
    model = SentenceTransformer(str(tmp_path / "converted"), trust_remote_code=True, device="cpu")
    assert model.max_seq_length == 32768
    assert type(model[0].auto_model).__module__.startswith("transformers_modules")
    expected = load_file(golden_dir / "expected.safetensors")
    for case in json.loads((golden_dir / "cases.json").read_text()):
        if case["max_length"] != 32768:  # the cases that are cut
            model.max_seq_length = case["max_length"]
        assert_same(model.encode(case["texts"], prompt=case["instruction"]), expected[case["name"]], 1e-5)


@pytest.mark.parametrize("prompt", ["", NQ, "Represent this sentence:", "Two spaces:  "])
def test_prompt_is_the_instruction(st_model, reference, sentences, prompt):
    assert_same(st_model.encode(sentences, prompt=prompt), reference.encode(sentences, prompt))


def test_prompts_of_the_paper(st_model, reference, sentences):
    assert_same(st_model.encode(sentences, prompt_name="NQ"), reference.encode(sentences, NQ))
    assert len(task_prompts()) > 47
    assert task_prompts().items() <= st_model.prompts.items()


def test_length_and_one_text(st_model, reference, sentences):
    st_model.max_seq_length = 8
    long = " ".join(sentences)
    assert_same(st_model.encode(long), reference.encode([long], max_length=8)[0])
    assert st_model.encode(long, output_value="token_embeddings").shape == (8, 32)


def test_folded(st_checkpoint, reference, sentences):
    options = {"fold_latent_attention": True}
    folded = SentenceTransformer(str(st_checkpoint), trust_remote_code=True, device="cpu", model_kwargs=options)
    assert type(folded[0].auto_model.latent_attention_model).__name__ == "FoldedLatentAttention"
    assert_same(folded.encode(sentences, prompt=NQ), reference.encode(sentences, NQ))


def test_saved_again(st_model, reference, sentences, tmp_path):
    st_model.max_seq_length = 64
    st_model.prompts["mine"] = "Instruct: mine\nQuery: "
    st_model.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    assert again.max_seq_length == 64
    assert_same(again.encode(sentences, prompt_name="mine"), reference.encode(sentences, "Instruct: mine\nQuery: "))
    plain = NVEmbedModel.from_pretrained(tmp_path / "again")
    assert_same(plain.encode(sentences), reference.encode(sentences))
    assert plain.config.prompts["mine"] == "Instruct: mine\nQuery: ", "and so it is written again"


def test_what_our_code_saves_again_keeps_the_users_settings(st_model, tmp_path):
    st_model.prompts["mine"] = "Instruct: mine\nQuery: "
    st_model.default_prompt_name, st_model.similarity_fn_name = "mine", "dot"
    st_model.save_pretrained(str(tmp_path / "theirs"))
    NVEmbedModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = SentenceTransformer(str(tmp_path / "ours"), trust_remote_code=True, device="cpu")
    assert (again.default_prompt_name, again.similarity_fn_name) == ("mine", "dot")
    assert again.prompts["mine"] == "Instruct: mine\nQuery: "


@pytest.mark.slow
def test_a_model_put_together_by_hand_opens_without_nvembed(reference, sentences, tmp_path):
    module = NVEmbedTransformer(NVEmbedModel.from_pretrained(reference.config._name_or_path))
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(tmp_path / "saved"))
    (entry,) = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert entry["type"] == "modeling_nvembed.NVEmbedTransformer"
    script = f"""
import sys, numpy
sys.modules["nvembed"] = None
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path / "saved")!r}, trust_remote_code=True, device="cpu")
numpy.save({str(tmp_path / "out.npy")!r}, model.encode({sentences!r}))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert_same(np.load(tmp_path / "out.npy"), reference.encode(sentences))


def test_router(reference, st_checkpoint, sentences, tmp_path):
    """The same module on both sides, and two different ones, with nvembed's class and with the checkpoint's own."""
    from sentence_transformers.models import Router

    ours = NVEmbedTransformer(NVEmbedModel.from_pretrained(st_checkpoint))
    remote = SentenceTransformer(str(st_checkpoint), trust_remote_code=True, device="cpu")[0]
    for name, query, document in (("shared", ours, ours), ("two", ours, remote)):
        model = SentenceTransformer(modules=[Router.for_query_document([query], [document])], device="cpu")
        model.save_pretrained(str(tmp_path / name))
        again = SentenceTransformer(str(tmp_path / name), trust_remote_code=True, device="cpu")
        assert_same(again.encode_query(sentences, prompt=NQ), reference.encode(sentences, NQ))
        assert_same(again.encode_document(sentences), reference.encode(sentences))


def test_module_survives_pickling_and_copies(st_model, reference, sentences):
    for module in (pickle.loads(pickle.dumps(st_model[0])), copy.deepcopy(st_model[0])):
        assert_same(SentenceTransformer(modules=[module], device="cpu").encode(sentences), reference.encode(sentences))


def test_settings_that_have_no_effect_are_refused(st_checkpoint, reference, sentences):
    options = {"trust_remote_code": True, "device": "cpu"}
    with pytest.raises(ValueError, match="backend is 'onnx'; .* only run in torch"):
        SentenceTransformer(str(st_checkpoint), **options, backend="onnx")
    name = (
        "processor_kwargs"
        if "processor_kwargs" in inspect.signature(SentenceTransformer).parameters
        else "tokenizer_kwargs"
    )
    with pytest.raises(ValueError, match="processor_kwargs has padding_side; "):
        SentenceTransformer(str(st_checkpoint), **options, **{name: {"padding_side": "left"}})
    short = SentenceTransformer(str(st_checkpoint), **options, **{name: {"model_max_length": 8}})
    long = " ".join(sentences)
    assert_same(short.encode([long]), reference.encode([long], max_length=8))


def test_positions_are_one_limit_everywhere(st_checkpoint, sentences, tmp_path, caplog):
    """A decoder of 32 positions reads 32 tokens, whatever `max_length` and `max_seq_length` say."""
    few = NVEmbedModel.from_pretrained(st_checkpoint)
    few.config.text_config.max_position_embeddings = 32
    few.save_pretrained(tmp_path / "few")
    few, long = NVEmbedModel.from_pretrained(tmp_path / "few"), " ".join(sentences)
    assert few.encode(sentences[:1], max_length=64).shape == (1, 32)
    assert not caplog.records
    embeddings = few.encode([long, *sentences])
    assert_same(embeddings, few.encode([long, *sentences], max_length=32))
    few.encode([long])
    (message,) = {record.message for record in caplog.records}
    assert "longer than the decoder's 32 positions (max_position_embeddings) and is cut there" in message
    theirs = SentenceTransformer(str(tmp_path / "few"), trust_remote_code=True, device="cpu")
    theirs.max_seq_length = 4096
    assert theirs.max_seq_length == 32
    assert_same(theirs.encode([long, *sentences]), embeddings)
    assert np.abs(embeddings - NVEmbedModel.from_pretrained(st_checkpoint).encode([long, *sentences])).max() > 1e-3


def test_a_second_end_token_is_warned_of(st_model, reference, sentences, caplog):
    st_model.encode(sentences)
    assert not caplog.records
    st_model.encode([sentences[0] + "</s>"])
    (message,) = [record.message for record in caplog.records]
    assert "A text ends in </s>, which is appended to every text already" in message


def test_tokenize_with_a_prompt_length_as_before_5_4(st_model, reference, sentences):
    """Older versions put the prompt in front themselves, and count its tokens by tokenizing it alone, with `<s>`."""
    module = st_model[0]
    features = module.tokenize([NQ + text for text in sentences])
    features["prompt_length"] = module.tokenize([NQ])["input_ids"].shape[-1] - 1  # without `</s>`
    with torch.no_grad():
        assert_same(module(features)["sentence_embedding"], reference.encode(sentences, NQ))


@pytest.mark.parametrize(
    ("text", "prompt", "words"),
    [
        ("a\0b", "", r"text or prompt 'a.x00b' holds a NUL character at position 1"),
        ("a", "x\ud83d", "holds half of a surrogate pair, .* at position 1"),
    ],
)
def test_bad_text_is_named(st_model, sentences, text, prompt, words):
    with pytest.raises(ValueError, match=words):
        st_model.encode([*sentences, text], prompt=prompt)


def test_options_reach_the_model(st_checkpoint, st_model, sentences):
    options = {"config_kwargs": {"is_mask_instruction": False}, "device": "cpu"}
    unmasked = SentenceTransformer(str(st_checkpoint), trust_remote_code=True, **options)
    assert np.abs(unmasked.encode(sentences, prompt=NQ) - st_model.encode(sentences, prompt=NQ)).max() > 1e-3
    assert st_model[0].preprocess(["word " * 50], max_length=7)["input_ids"].shape == (1, 7)


def test_trainer_moves_every_parameter(st_model, sentences, tmp_path):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    st = sentence_transformers
    before = {name: parameter.clone() for name, parameter in st_model.named_parameters()}
    data = Dataset.from_dict({"anchor": sentences, "positive": sentences[1:] + sentences[:1]})
    args = st.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[],
        use_cpu=True, save_strategy="no", prompts={"anchor": NQ},
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(st_model)
    st.SentenceTransformerTrainer(model=st_model, args=args, train_dataset=data, loss=loss).train()
    assert [name for name, parameter in st_model.named_parameters() if torch.equal(parameter, before[name])] == []
    st_model.save_pretrained(str(tmp_path / "trained"))
    assert_same(NVEmbedModel.from_pretrained(tmp_path / "trained").encode(sentences), st_model.encode(sentences))


# --- What stands on sentence-transformers


def test_mteb_gives_the_instruction_to_queries_alone(st_model, reference, sentences, monkeypatch):
    """nDCG@10 of mteb's own NQ task on our texts, against a direct computation from `encode`."""
    mteb = pytest.importorskip("mteb")
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.models import SentenceTransformerEncoderWrapper

    questions = [text[-18:] for text in sentences]
    split = RetrievalSplitData(
        corpus=Dataset.from_list([{"id": f"d{i}", "title": "", "text": text} for i, text in enumerate(sentences)]),
        queries=Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(questions)]),
        relevant_docs={f"q{i}": {f"d{i}": 1} for i in range(len(sentences))},
        top_ranked=None,
    )
    task = mteb.get_task("NQ")
    task.dataset, task.data_loaded = {"default": {"test": split}}, True
    with pytest.warns(UserWarning, match="SUMM is not valid"):  # the released name, beside mteb's "Summarization"
        model = SentenceTransformerEncoderWrapper(st_model)
    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False)

    scores = reference.encode(questions, NQ) @ reference.encode(sentences).T
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    expected = (1 / torch.log2(2.0 + ranks)).mean().item()
    assert 0.3 < expected < 0.99, "the instruction decides nothing in this test"
    assert result[0].scores["test"][0]["ndcg_at_10"] == pytest.approx(expected, abs=1e-5)


def test_langchain(st_checkpoint, reference, sentences):
    langchain = pytest.importorskip("langchain_huggingface")
    embeddings = langchain.HuggingFaceEmbeddings(
        model_name=str(st_checkpoint),
        model_kwargs={"trust_remote_code": True, "device": "cpu"},
        query_encode_kwargs={"prompt_name": "NQ"},
    )
    assert_same(np.float32(embeddings.embed_documents(sentences)), reference.encode(sentences))
    assert_same(np.float32(embeddings.embed_query(sentences[0])), reference.encode(sentences[:1], NQ)[0])


def test_llama_index(st_checkpoint, reference, sentences):
    llama_index = pytest.importorskip("llama_index.embeddings.huggingface")
    embeddings = llama_index.HuggingFaceEmbedding(
        model_name=str(st_checkpoint),
        trust_remote_code=True,
        device="cpu",
        query_instruction=NQ,
        text_instruction="",
    )
    assert_same(np.float32(embeddings.get_text_embedding_batch(sentences)), reference.encode(sentences))
    assert_same(np.float32(embeddings.get_query_embedding(sentences[0])), reference.encode(sentences[:1], NQ)[0])


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_lora_of_peft_around_the_model(st_checkpoint, sentences, task_type):
    """peft's own wrappers, as in sentence-transformers #3072; the adapter is not zero."""
    peft = pytest.importorskip("peft")
    model = SentenceTransformer(str(st_checkpoint), trust_remote_code=True, device="cpu")
    plain = model.encode(sentences)
    config = peft.LoraConfig(task_type=task_type, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model[0].auto_model = peft.get_peft_model(model[0].auto_model, config).eval()
    wrapped = model.encode(sentences)
    assert np.abs(wrapped - plain).max() > 1e-3
    merged = model[0].auto_model.merge_and_unload()
    np.testing.assert_allclose(wrapped, merged.encode(sentences).numpy(), atol=1e-5)


def test_prompt_tuning_of_peft(checkpoint, sentences):
    """Virtual tokens before each text: attended to, not pooled; the gradient reaches them."""
    peft = pytest.importorskip("peft")
    base = NVEmbedModel.from_pretrained(checkpoint)
    config = peft.PromptTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, token_dim=32, num_layers=3, num_attention_heads=4
    )
    model = peft.get_peft_model(base, config)
    rows = tokenize(base.tokenizer, base.config, sentences, [""] * len(sentences), 64)
    features = pad(rows, base.tokenizer.pad_token_id)
    output = model(features["input_ids"], features["attention_mask"], pool_mask=features["pool_mask"])
    output.sentence_embeddings.square().sum().backward()
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    assert prompt.grad is not None and prompt.shape == (3, 32)
    with torch.no_grad():
        for i, row in enumerate(rows):
            tokens = base.get_input_embeddings()(torch.tensor(row.input_ids))
            states = base(inputs_embeds=torch.cat([prompt, tokens]).unsqueeze(0)).last_hidden_state[0, 3:]
            expected = torch.nn.functional.normalize(states.mean(0), dim=-1)
            torch.testing.assert_close(output.sentence_embeddings[i].detach(), expected, atol=1e-5, rtol=0)
    wrapped = SentenceTransformer(str(checkpoint), trust_remote_code=True, device="cpu")
    wrapped[0].auto_model = model.eval()
    np.testing.assert_allclose(wrapped.encode(sentences), output.sentence_embeddings.detach().numpy(), atol=1e-5)


def test_packed_rows_have_the_states_and_gradients_of_padded_ones(st_model, sentences):
    module = st_model[0]
    features = module.preprocess([sentences[0], sentences[1] * 3, "a", "b"], prompt=NQ)
    mask = features["attention_mask"].bool()

    def padded(features):
        output = module.auto_model(features["input_ids"], features["attention_mask"], features["pool_mask"])
        return {"token_embeddings": output.last_hidden_state, "sentence_embedding": output.sentence_embeddings}

    results = []
    for forward in (module.forward, padded):
        module.zero_grad()
        output = forward(features)
        (output["sentence_embedding"] * torch.arange(32)).sum().backward()
        found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found |= {"states": output["token_embeddings"][mask], "embeddings": output["sentence_embedding"]}
        results.append(found)
    assert results[0].keys() == results[1].keys() and len(results[0]) > 30
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-4, rtol=1e-4, msg=name)


def test_forward_refuses_what_it_does_not_have(model):
    ids = torch.arange(4).unsqueeze(0)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(TypeError, match="forward.. has no argument 'output_attentions'"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeddings)
    for extra in ({}, {"lengths": [1, 3]}):
        with pytest.raises(ValueError, match="pool_mask is for 3 tokens, and there are 4"):
            model(ids[0] if extra else ids, pool_mask=torch.ones(3) if extra else torch.ones(1, 3), **extra)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings).last_hidden_state, model(ids).last_hidden_state)
