import json
import shutil

import gguf
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    MinistralConfig,
    MistralConfig,
    Phi3Config,
    Phi3Model,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
    ViTModel,
)

from nvembed import NVEmbedModel
from nvembed.texts_nvembed import tokenize
from nvembed.train.checkpoints import check_output_dir, write_checkpoint
from nvembed.train.init_checkpoint import InitArguments, init_model, main
from nvembed.train.released import convert_released
from tests import preloaded
from tests.conftest import ROOT


@pytest.mark.parametrize("num_layers", [None, 2])
def test_weights_are_the_base_s(init_args, decoder_dir, num_layers):
    model = init_model(init_args(num_layers=num_layers))
    base = AutoModel.from_pretrained(decoder_dir).state_dict()
    weights = model.embedding_model.state_dict()
    assert {int(name.split(".")[1]) for name in weights if name.startswith("layers.")} == set(range(num_layers or 3))
    assert all(torch.equal(weight, base[name]) for name, weight in weights.items())


@pytest.mark.parametrize("pooling_type", ["latent_attention", "self_attention"])
def test_untrained_embedding_is_the_mean_of_the_states(init_args, sentences, pooling_type):
    model = init_model(init_args(pooling_type=pooling_type))
    mean = init_model(init_args(pooling_type="mean"))
    cosine = torch.cosine_similarity(model.encode(sentences), mean.encode(sentences))
    assert cosine.min() >= 0.99
    assert cosine.min() > 0.999999, "exactly the mean, not near it"


def test_tokenizer_writes_both_ends_for_every_user(checkpoint):
    for tokenizer in (NVEmbedModel.from_pretrained(checkpoint).tokenizer, AutoTokenizer.from_pretrained(checkpoint)):
        row = tokenizer("Return a list")["input_ids"]
        assert (row[0], row[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        cut = tokenizer("Return a list" * 50, truncation=True, max_length=8)["input_ids"]
        assert len(cut) == 8
        assert cut[-1] == tokenizer.eos_token_id
        assert tokenizer.pad_token is not None
        assert tokenizer.padding_side == "right"
    assert json.loads((checkpoint / "config.json").read_text())["add_eos"] is False


def test_config_carries_no_path_of_this_machine(checkpoint, decoder_dir):
    assert str(decoder_dir) not in (checkpoint / "config.json").read_text()


def test_other_layouts_are_refused(tmp_path, init_args, decoder_dir):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "vocab_size": 400}
    Gemma2Model(Gemma2Config(**small)).save_pretrained(tmp_path / "gemma2")
    with pytest.raises(ValueError, match="gemma2 is a 'gemma2' model, .*norms with 1 [+] weight.* one of 'mistral'"):
        init_model(init_args(base=str(tmp_path / "gemma2")))
    Phi3Model(Phi3Config(**small, pad_token_id=0)).save_pretrained(tmp_path / "phi3")
    words = "phi3 is a 'phi3' model, which differs .* it has layers.0.mlp.gate_up_proj.weight, .*; it lacks layers.0"
    with pytest.raises(ValueError, match=words):
        init_model(init_args(base=str(tmp_path / "phi3")))
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="vit is a 'vit' model, which differs from Mistral's layers"):
        init_model(init_args(base=str(tmp_path / "vit")))

    LlamaModel(LlamaConfig(**small, attention_bias=True)).save_pretrained(tmp_path / "biased")
    AutoTokenizer.from_pretrained(decoder_dir).save_pretrained(tmp_path / "biased")
    with pytest.raises(ValueError, match="biased has attention_bias: biases that Mistral's layers do not have"):
        init_model(init_args(base=str(tmp_path / "biased")))

    with pytest.raises(ValueError, match="num_layers is 9; .* has layers 1 to 3"):
        init_model(init_args(num_layers=9))


def with_added_tokens(decoder_dir, folder, **tokens) -> str:
    shutil.copytree(decoder_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({name: token for name, token in tokens.items() if name == "pad_token"})
    tokenizer.add_tokens([token for name, token in tokens.items() if name != "pad_token"])
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_pad_token_outside_the_embedding_gives_way(tmp_path, init_args, decoder_dir, sentences):
    from sentence_transformers import SentenceTransformer

    base = with_added_tokens(decoder_dir, tmp_path / "padded", pad_token="[PAD]")
    assert AutoTokenizer.from_pretrained(base).pad_token_id == 400, "no row of the table"
    main(init_args(tmp_path / "out", base=base))
    theirs = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    assert theirs.tokenizer.pad_token == "</s>"
    texts = [*sentences, "a text with [PAD] in it"]
    main(init_args(tmp_path / "plain"))
    expected = NVEmbedModel.from_pretrained(tmp_path / "plain").encode(texts)
    torch.testing.assert_close(torch.as_tensor(theirs.encode(texts)), expected, atol=1e-6, rtol=0)


def test_other_tokens_outside_the_embedding_are_refused(tmp_path, init_args, decoder_dir):
    base = with_added_tokens(decoder_dir, tmp_path / "more", pad_token="[PAD]", other="<tool>")
    with pytest.raises(ValueError, match="more: 1 tokens of the tokenizer .* 400: the first is '<tool>', 400"):
        main(init_args(tmp_path / "out", base=base))


def test_a_base_with_a_scaled_rope(tmp_path, init_args, decoder_dir):
    """Every Llama 3.1: made, loaded, saved, converted and loaded again, it computes what transformers computes."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    rope |= {"original_max_position_embeddings": 64}
    reference = AutoModel.from_pretrained(decoder_dir, rope_parameters=rope)
    reference.save_pretrained(tmp_path / "scaled")
    AutoTokenizer.from_pretrained(decoder_dir).save_pretrained(tmp_path / "scaled")
    main(init_args(tmp_path / "out", base=str(tmp_path / "scaled"), mask_type="c", num_layers=3))
    convert_released(str(tmp_path / "out"), str(tmp_path / "converted"))
    input_ids = torch.randint(2, 300, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(input_ids).last_hidden_state
        unscaled = AutoModel.from_pretrained(decoder_dir)(input_ids).last_hidden_state
        assert (expected - unscaled).abs().max() > 0.1
        for folder in ("out", "converted"):
            model = NVEmbedModel.from_pretrained(tmp_path / folder)
            torch.testing.assert_close(model.embedding_model(input_ids), expected, atol=1e-5, rtol=1e-5)


def test_an_existing_checkpoint_is_left_alone(tmp_path, init_args):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds a checkpoint .config.json.; name another --output_dir"):
        main(init_args(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_failed_save_leaves_nothing(tmp_path, model, monkeypatch):
    def fail(model, folder, *args, **kwargs):
        (folder / "model.safetensors").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(model, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_output_dir_is_checked_before_work(tmp_path, model):
    (tmp_path / "old").mkdir()
    for name in ("loss_stage1.png", "training_data.json", "pruning.json"):
        (tmp_path / "old" / name).write_text("of an earlier run")
        with pytest.raises(FileExistsError, match=rf"already holds a checkpoint \({name}\)"):
            check_output_dir(str(tmp_path / "old"))
        (tmp_path / "old" / name).unlink()
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(FileExistsError, match="tokenizer.json"):
        check_output_dir(str(tmp_path))
    with pytest.raises(NotADirectoryError, match="tokenizer.json is a file"):
        check_output_dir(str(tmp_path / "tokenizer.json"))
    torch.nn.init.constant_(model.embedding_model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="embedding_model.norm.weight holds NaN"):
        write_checkpoint(model, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"base": "a.gguf", "gguf_file": "b.gguf"},
            "base is a.gguf, a file, and gguf_file b.gguf another: leave one out",
        ),
        ({"base": "no/such"}, "no/such is neither a local decoder folder or .gguf file nor a Hub model"),
        ({"num_latents": 0}, "num_latents is 0; it must be 1 or more"),
        ({"cross_dim_head": -3}, "cross_dim_head is -3; it must be 1 or more"),
    ],
)
def test_bad_arguments_are_named(init_args, options, words):
    with pytest.raises(ValueError, match=words):
        init_model(init_args(**options))


def test_a_base_is_no_checkpoint(decoder_dir):
    with pytest.raises(ValueError, match="is a 'llama' model, not an NV-Embed checkpoint; train/init_checkpoint.py"):
        NVEmbedModel.from_pretrained(decoder_dir)


def write_gguf(decoder_dir, path):
    """The tiny decoder as llama.cpp's converter writes it: other names, rotary halves interleaved, byte-level BPE."""
    weights = AutoModel.from_pretrained(decoder_dir).state_dict()
    tokenizer = json.loads((decoder_dir / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer["vocab"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_types([3 if i < 2 else 1 for i in range(len(tokenizer["vocab"]))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"layers.": "blk.", "embed_tokens": "token_embd", "norm.weight": "norm.weight"}
    for name, weight in weights.items():
        if name == "norm.weight":
            name = "output_norm.weight"
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "attn_q" in name or "attn_k" in name:
            weight = weight.view(-1, 2, 4, 32).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_base_equals_the_folder(tmp_path, init_args, decoder_dir, sentences):
    write_gguf(decoder_dir, tmp_path / "tiny.gguf")
    from_file = init_model(init_args(base=str(tmp_path / "tiny.gguf")))
    from_folder = init_model(init_args())
    assert from_file.tokenizer(sentences)["input_ids"] == from_folder.tokenizer(sentences)["input_ids"]
    torch.testing.assert_close(from_file.encode(sentences), from_folder.encode(sentences), atol=1e-5, rtol=0)


def family(kind, folder, decoder_dir, **fields):
    """A random decoder of the family, in a folder with the tiny tokenizer."""
    shutil.copytree(decoder_dir, folder)
    (folder / "model.safetensors").unlink()
    shape = LlamaConfig.from_pretrained(decoder_dir).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {name: shape[name] for name in (*names, "num_key_value_heads", "bos_token_id", "eos_token_id")}
    shape["vocab_size"] += 8  # Qwen's tokenizers add tokens of their own
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(shape | {"initializer_range": 0.2} | fields))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    return model.model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Qwen2Config, {"tie_word_embeddings": True}),
        (Qwen3Config, {"head_dim": 16}),
        (MinistralConfig, {"head_dim": 8, "sliding_window": 400}),
    ],
)
def test_another_family_becomes_a_checkpoint_that_loads_anywhere(
    kind, fields, tmp_path, init_args, decoder_dir, sentences, encode_without_nvembed
):
    from sentence_transformers import SentenceTransformer

    decoder = family(kind, tmp_path / "base", decoder_dir, **fields)
    model = init_model(init_args(base=str(tmp_path / "base"), mask_type="c")).eval()
    write_checkpoint(model, str(tmp_path / "checkpoint"))
    rows = tokenize(model.tokenizer, model.config, sentences, [""] * len(sentences), 64)
    with torch.no_grad():
        states = [decoder(torch.tensor([row.input_ids])).last_hidden_state[0].mean(0) for row in rows]
    expected = torch.nn.functional.normalize(torch.stack(states), dim=-1)
    torch.testing.assert_close(model.encode(sentences), expected, atol=1e-5, rtol=0)
    elsewhere, _ = encode_without_nvembed(tmp_path / "checkpoint", sentences, "", 64)
    torch.testing.assert_close(elsewhere, expected, atol=1e-5, rtol=0)
    theirs = SentenceTransformer(str(tmp_path / "checkpoint"), trust_remote_code=True, device="cpu").encode(sentences)
    torch.testing.assert_close(torch.tensor(theirs), expected, atol=1e-5, rtol=0)


def test_layers_with_sliding_windows_are_announced(tmp_path, init_args, decoder_dir, caplog):
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    family(MinistralConfig, tmp_path / "some", decoder_dir, head_dim=8, **windows)
    init_model(init_args(base=str(tmp_path / "some")))
    assert "2 of 3 layers attend within a window of 8 tokens; here they attend to the whole text" in caplog.text
    caplog.clear()
    family(MistralConfig, tmp_path / "all", decoder_dir, sliding_window=8)
    init_model(init_args(base=str(tmp_path / "all")))
    assert "3 of 3 layers attend within a window of 8 tokens" in caplog.text
    caplog.clear()
    family(Qwen2Config, tmp_path / "none", decoder_dir, sliding_window=8, use_sliding_window=False)
    init_model(init_args(base=str(tmp_path / "none")))
    assert "window" not in caplog.text


@pytest.mark.slow
def test_both_stages_from_a_qwen3(tmp_path, init_args, decoder_dir, sentences, encode_without_nvembed):
    """LoRA, gradient checkpointing and gradient caching by the scripts, to a checkpoint that needs no nvembed."""
    family(Qwen3Config, tmp_path / "decoder", decoder_dir, head_dim=16)
    write_checkpoint(init_model(init_args(base=str(tmp_path / "decoder"))), str(tmp_path / "base"))
    rows = [{"query": s[:20], "positive": s, "instruction": "Complete"} for s in sentences]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for script, before, after in (("stage1.py", "base", "one"), ("stage2.py", "one", "two")):
        command = [
            ROOT / "train" / script, "--model_name_or_path", tmp_path / before, "--datasets",
            tmp_path / "pairs.jsonl", "--output_dir", tmp_path / after, "--max_steps=3", "--warmup_steps=0",
            "--use_cpu", "--num_negatives=1", "--per_device_train_batch_size=4", "--learning_rate=1e-2",
            "--gradient_checkpointing", "--chunk_tokens=64",
        ]  # fmt: skip
        result = preloaded.run(*command)
        assert result.returncode == 0, result.stderr[-3000:]
    ours = NVEmbedModel.from_pretrained(tmp_path / "two").encode(sentences, "Instruct: Complete\nQuery: ")
    elsewhere, _ = encode_without_nvembed(tmp_path / "two", sentences, "Instruct: Complete\nQuery: ", 64)
    torch.testing.assert_close(elsewhere, ours, atol=1e-5, rtol=0)
    untrained = NVEmbedModel.from_pretrained(tmp_path / "base").encode(sentences, "Instruct: Complete\nQuery: ")
    assert (ours - untrained).abs().max() > 0.05


@pytest.mark.parametrize("is_folded", [False, True])
def test_a_released_tokenizer_that_appends_its_end(golden_dir, tmp_path, is_folded):
    """Token for token what `encode` reads, but in cut texts, which keep their `</s>`."""
    main(
        InitArguments(
            str(tmp_path / "out"), from_released=str(golden_dir / "checkpoint"), tokenizer_adds_eos=True,
            fold_latent_attention=is_folded,
        )
    )  # fmt: skip
    before, after = (NVEmbedModel.from_pretrained(path) for path in (golden_dir / "checkpoint", tmp_path / "out"))
    assert (before.config.add_eos, after.config.add_eos) == (True, False)
    instruction = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
    texts = ["what is it?", "", " a space ", "with </s> inside", "two\nlines\n", "x" * 400, "é 漢字 🙂"]
    for prefix in ("", instruction):
        theirs, ours = (tokenize(m.tokenizer, m.config, texts, [prefix] * len(texts), 512) for m in (before, after))
        assert ours == theirs
        cut = tokenize(after.tokenizer, after.config, ["word " * 400], [prefix], 64)[0].input_ids
        assert len(cut) == 64 and cut[-1] == after.tokenizer.eos_token_id
    direct = after.tokenizer(instruction + "what is it?")["input_ids"]
    assert direct == tokenize(before.tokenizer, before.config, texts[:1], [instruction], 512)[0].input_ids


def test_options_of_a_base_are_refused_for_a_released_checkpoint(tmp_path, golden_dir):
    released = str(golden_dir / "checkpoint")
    options = {"is_mask_instruction": False, "num_layers": 2, "dtype": "bfloat16", "pooling_type": "mean", "seed": 1}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"--{name} is for --base: a released NV-Embed keeps what it has"):
            main(InitArguments(str(tmp_path / "out"), from_released=released, **{name: value}))
    with pytest.raises(ValueError, match="--tokenizer_adds_eos is for --from_released"):
        main(InitArguments(str(tmp_path / "out"), base="x", tokenizer_adds_eos=True))
