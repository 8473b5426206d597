"""`encode` and what it is made of, against the model's own states and one text at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

from nvembed import modeling_nvembed, texts_nvembed
from nvembed.texts_nvembed import PackedLayout, format_instruction, length_sorted_batches, pack, pad, tokenize


INSTRUCTION = format_instruction("Given a question, retrieve")


def test_instruction_is_attended_to_but_not_pooled(model, sentences):
    rows = tokenize(model.tokenizer, model.config, sentences[:1], [INSTRUCTION], 512)
    features = pad(rows, model.tokenizer.pad_token_id)
    with torch.no_grad():
        states = model(features["input_ids"]).last_hidden_state[0]
    offsets = model.tokenizer(INSTRUCTION + sentences[0], return_offsets_mapping=True)["offset_mapping"]
    # The text's first token: the space behind "Query:" counts to its first word, as in the released code.
    first = next(i for i, (_, end) in enumerate(offsets) if end >= len(INSTRUCTION))
    mean = states[first:].mean(0)
    torch.testing.assert_close(
        model.encode(sentences[:1], instruction=INSTRUCTION)[0], mean / mean.norm(), atol=1e-6, rtol=0
    )
    assert (model.encode(sentences[:1]) - model.encode(sentences[:1], instruction=INSTRUCTION)).abs().max() > 1e-3


def test_encode_keeps_the_order_whatever_the_batches(model, sentences):
    texts = [*sentences, "", "x", sentences[0] * 9]
    alone = torch.cat([model.encode([text]) for text in texts])
    for options in ({"batch_tokens": 1}, {"batch_tokens": 60}, {"batch_size": 3}, {}):
        torch.testing.assert_close(model.encode(texts, **options), alone, atol=1e-6, rtol=0)


def test_batches_hold_their_budget_and_every_text():
    lengths = [3, 90, 5, 5, 40, 1, 200]
    batches = list(length_sorted_batches(lengths, 100))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= 100 for b in batches)
    assert len(batches) == 3, "and no more batches than that takes"
    assert [len(b) for b in length_sorted_batches([1] * 7, 100, batch_size=3)] == [3, 3, 1]


def test_empty_and_long_texts(model):
    embeddings = model.encode(["", "word " * 3000], instruction=INSTRUCTION, max_length=64)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    row = tokenize(model.tokenizer, model.config, ["word " * 3000], [""], 64)[0].input_ids
    assert len(row) == 64
    assert row[-1] == model.tokenizer.eos_token_id, "truncation keeps the end token"


def test_no_length_pools_the_end_token_alone(model):
    """Every max_length either pools something of the text, or is an error: never `</s>` by itself."""
    outcomes = set()
    for max_length in range(1, 40):
        try:
            one, two = model.encode(["Return it.", "Sort all."], INSTRUCTION, max_length)
        except ValueError as error:
            assert "no token of the text is left to pool" in str(error)
            outcomes.add("error")
        else:
            assert (one - two).abs().max() > 1e-3, max_length
            outcomes.add("embedding")
    assert outcomes == {"error", "embedding"}


def test_latents_are_projected_once_whatever_the_batch(model, sentences):
    shapes = []
    to_kv = model.latent_attention_model.cross_attend_blocks[0].fn.to_kv
    to_kv.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    model.encode(sentences, batch_tokens=100_000)
    assert shapes == [(1, 8, 32)]


def test_unmasked_instruction_may_fill_the_text(model):
    model.config.is_mask_instruction = False
    assert model.encode(["a"], INSTRUCTION, max_length=5).shape == (1, 32)


def test_encode_leaves_a_frozen_part_frozen(model, sentences):
    model.train()
    model.latent_attention_model.eval()
    model.encode(sentences)
    assert model.embedding_model.training
    assert not model.latent_attention_model.training


def test_encode_leaves_the_mode_as_it_was(model, sentences):
    model.train()
    assert not model.encode(sentences).requires_grad
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        ([], {}, ValueError, "empty list"),
        ("one text", {}, TypeError, r"the string 'one text'.*encode\(\[text\]\)"),
        (["a", None], {}, TypeError, r"prompts\[1\] is None of type NoneType"),
        (["a", 3.5], {}, TypeError, r"prompts\[1\] is 3.5"),
        (5, {}, TypeError, "prompts is of type int; encode takes a list"),
        (["a"], {"instruction": None}, TypeError, "instruction is None, not a string"),
        (["a"], {"max_length": 0}, ValueError, "max_length is 0; it must be a whole number"),
        (["a"], {"batch_tokens": 0}, ValueError, "batch_tokens is 0; it must be a whole number, 1 or more"),
        (["a"], {"batch_size": -1}, ValueError, "batch_size is -1; it must be a whole number, 1 or more"),
        (["a"], {"truncate_dim": 33}, ValueError, "truncate_dim is 33; it must be a whole number, 1 to 32"),
        (["a"], {"truncate_dim": 5.0}, ValueError, "truncate_dim is 5.0; it must be a whole number"),
        (["a"], {"batch_tokens": "9"}, ValueError, "batch_tokens is '9'; it must be a whole number"),
        (["a"], {"truncate_dim": 0}, ValueError, "truncate_dim is 0; it must be a whole number, 1 to 32"),
        (["a", "b\0c"], {}, ValueError, r"prompts\[1\] holds a NUL character at position 1.*take it out"),
        (["a", "bc\ud83d"], {}, ValueError, r"prompts\[1\] holds half of a surrogate pair, .* at position 2; mend it"),
        (["a"], {"instruction": "x\0"}, ValueError, r"instruction holds a NUL"),
        (["a"], {"instruction": INSTRUCTION, "max_length": 5}, ValueError, "max_length is 5: no token of the text"),
    ],
)
def test_encode_names_bad_input(model, prompts, options, error, words):
    with pytest.raises(error, match=words):
        model.encode(prompts, **options)


def test_the_advice_against_broken_text_works(model):
    broken = "bc\ud83d"
    model.encode([broken.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "a\0b".replace("\0", "")])


def test_a_generator_that_raises_is_named_with_its_position(model):
    def texts():
        yield "one"
        yield "two"
        raise OSError("disk gone")

    with pytest.raises(RuntimeError, match=r"prompts\[2\] could not be read: .* OSError\('disk gone'\)"):
        model.encode(texts())


# --- Packed texts


@pytest.mark.parametrize("mask_type", ["b", "c"])
@pytest.mark.parametrize("pooling_type", ["latent_attention", "self_attention", "mean", "eos"])
def test_packed_equals_padded(model, sentences, pooling_type, mask_type):
    fields = {"pooling_type": pooling_type, "mask_type": mask_type}
    other = type(model)(type(model.config).from_dict({**model.config.to_dict(), **fields})).eval()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rows = tokenize(model.tokenizer, model.config, [*sentences, "", sentences[0]], [INSTRUCTION] * 10, 512)
    with torch.no_grad():
        padded = other(**pad(rows, model.tokenizer.pad_token_id)).sentence_embeddings
        packed = other(**pack(rows)).sentence_embeddings
        states = other(**{k: v for k, v in pack(rows).items() if k != "pool_mask"}).last_hidden_state
    torch.testing.assert_close(packed, padded, atol=2e-6, rtol=0)
    assert states.shape == (sum(len(row.input_ids) for row in rows), 32)


def test_packed_training_gives_the_padded_gradients(model, sentences):
    rows = tokenize(model.tokenizer, model.config, sentences, [""] * 8, 512)

    def gradients(features):
        model.zero_grad()
        model(**features).sentence_embeddings[:, 0].sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    for expected, actual in zip(gradients(pad(rows, 1)), gradients(pack(rows))):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "parameters",
    [
        frozenset({"is_causal"}),  # torch 2.10
        frozenset({"window_size", "enable_gqa"}),  # torch 2.13
        frozenset({"causal", "window_size", "dropout_p"}),  # flash-attn
        frozenset(),
    ],
)
def test_variable_length_kernel_gets_what_it_needs(monkeypatch, parameters):
    """The CUDA kernel's arguments, by a stand-in that computes from them alone, one text at a time."""
    calls = []

    def kernel(q, k, v, ends_q, ends_k, longest_q, longest_k, **options):
        calls.append(ends_q)
        assert options.keys() <= parameters
        assert ends_q.dtype == torch.int32
        assert ends_q.equal(ends_k)
        assert longest_q == longest_k == int(ends_q.diff().max())
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "as flash-attn wants"
        is_grouped = options.get("enable_gqa", "causal" in parameters)
        assert is_grouped or k.shape == q.shape
        is_causal = bool(options.get("causal") or options.get("is_causal") or options.get("window_size") == (-1, 0))
        texts = zip(*(x.split(ends_q.diff().tolist()) for x in (q, k, v)))
        rows = [
            F.scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in text), is_causal=is_causal, enable_gqa=k.shape != q.shape
            )
            for text in texts
        ]
        return torch.cat([row.transpose(0, 1) for row in rows])

    q, k, v = torch.randn(14, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    layout = PackedLayout([6, 4, 4])
    expected, causal = layout.attend(q, k, v), layout.attend(q, k, v, is_causal=True)
    monkeypatch.setattr(texts_nvembed, "varlen_attn", kernel)
    monkeypatch.setattr(texts_nvembed, "VARLEN_OPTIONS", parameters)
    monkeypatch.setattr(
        texts_nvembed, "has_varlen_kernel", lambda q, is_causal: not is_causal or bool(parameters - {"enable_gqa"})
    )
    torch.testing.assert_close(layout.attend(q, k, v), expected)
    torch.testing.assert_close(layout.attend(q, k, v), expected)
    assert len(calls) == 2
    assert calls[0] is calls[1], "the ends are made once for all layers"
    column_major = [x.flatten(1).T.contiguous().T.view(x.shape) for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in column_major)
    torch.testing.assert_close(layout.attend(*column_major), expected)
    torch.testing.assert_close(layout.attend(q, k, v, is_causal=True), causal)
    assert len(calls) == 3 + bool(parameters - {"enable_gqa"}), "a kernel that has a causal mask is told of it"


def test_the_multi_gpu_lines_of_the_released_cards_name_the_way(model, sentences):
    for name, module in model._modules.items():
        model._modules[name] = torch.nn.DataParallel(module)
    for call in (
        lambda: model._do_encode(sentences, batch_size=2),
        lambda: model.encode(sentences),
        lambda: model(torch.ones(1, 3, dtype=torch.long)),
    ):
        words = r"embedding_model is wrapped in torch.nn.DataParallel, .*device=\[.*embed_corpus.py"
        with pytest.raises(RuntimeError, match=words):
            call()


def test_one_long_text_among_short_ones_costs_its_own_tokens(model):
    """Nothing is as large as the batch padded to its longest text would be, the pooling included."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    lengths = [200] + [2] * 100
    tokens, hidden, widest = sum(lengths), 32, 8 * 32  # the MLP behind the latents widens 8 times
    assert len(lengths) * max(lengths) * hidden > tokens * widest
    with torch.no_grad(), Largest() as largest:
        model(torch.full((tokens,), 5), pool_mask=torch.ones(tokens), lengths=lengths)
    assert largest.elements <= tokens * widest


# --- Options


def test_normalize_truncate_and_numpy(model, sentences):
    full = model.encode(sentences)
    raw = model.encode(sentences, normalize=False)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.1
    torch.testing.assert_close(F.normalize(raw, dim=1), full, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        model.encode(sentences, truncate_dim=5), F.normalize(raw[:, :5], dim=1), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(model.encode(sentences, truncate_dim=5, normalize=False), raw[:, :5], atol=0, rtol=0)
    array = model.encode(sentences, convert_to_numpy=True)
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, full.numpy())


def test_inputs_of_the_ecosystem(model, sentences):
    expected = model.encode(sentences)
    for texts in (
        iter(sentences),
        tuple(sentences),
        np.array(sentences),
        Dataset.from_dict({"text": sentences})["text"],
    ):
        assert torch.equal(model.encode(texts), expected), type(texts)


def test_released_keywords(model, sentences):
    expected = model.encode(sentences, instruction=INSTRUCTION, max_length=64)
    released = model.encode(prompts=sentences, instruction=INSTRUCTION, max_length=64, batch_size=2, num_workers=4)
    torch.testing.assert_close(released, expected, atol=1e-6, rtol=0)
    array = model._do_encode(sentences, 2, INSTRUCTION, 64, num_workers=32, return_numpy=True)
    assert isinstance(array, np.ndarray)
    torch.testing.assert_close(torch.from_numpy(array), expected, atol=1e-6, rtol=0)


def test_windows_keep_the_order(model, sentences, monkeypatch):
    expected = model.encode(sentences)
    monkeypatch.setattr(modeling_nvembed, "WINDOW_TEXTS", 3)
    torch.testing.assert_close(model.encode(sentences), expected, atol=1e-6, rtol=0)
    # As next to an accelerator: a thread tokenizes ahead. The meta device stands for one, nothing is computed there.
    monkeypatch.setattr(type(model), "_batch_device", lambda self: torch.device("meta"))
    ahead = [row.input_ids for window in model._tokenize_ahead(sentences, "", 64) for row in window]
    assert ahead == [row.input_ids for row in tokenize(model.tokenizer, model.config, sentences, [""] * 8, 64)]


# --- Memory


@pytest.fixture
def small_memory(model, monkeypatch):
    """The model on a device that holds `limit` tokens a batch; the sizes of the batches that it was given."""

    def limit(tokens, error):
        sizes, forward = [], type(model).forward

        def limited(self, input_ids, **features):
            sizes.append(len(input_ids))
            if len(input_ids) > tokens:
                raise error
            return forward(self, input_ids, **features)

        monkeypatch.setattr(type(model), "forward", limited)
        return sizes

    return limit


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_halves_the_budget_and_goes_on(model, sentences, small_memory, monkeypatch, error):
    texts = sentences * 6
    expected = model.encode(texts)
    monkeypatch.setattr(modeling_nvembed, "WINDOW_TEXTS", 24)
    sizes = small_memory(150, error)
    torch.testing.assert_close(model.encode(texts, batch_tokens=100_000), expected, atol=1e-6, rtol=0)
    assert sizes[0] > 150
    tried = sum(size > 150 for size in sizes)
    assert tried <= 3, "the smaller budget is kept for later batches and windows"


def test_one_text_that_never_fits_is_named(model, sentences, small_memory):
    small_memory(60, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError, match=r"prompts\[3\] alone, 1\d\d tokens, does not fit into memory"):
        model.encode([*sentences[:3], sentences[0] * 9])


def test_other_errors_are_not_taken_for_memory(model, sentences, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        model.encode(sentences)
