"""LongVQ: attention against dense attention, training against the same model with dense attention, decoding with constant state.

Attention: one head, queries and keys 64, values 256, 128 codewords, chunks of 128. Models: hidden 512, 4 layers, values 1,024, queries and
keys 128, 16 averages, window 128, 256 codewords, dropout 0, batch 1, float32.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Peer

OPTIONS = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "value_size": 1024,
    "shared_representation_size": 128,
    "intermediate_size": 1024,
    "ssm_state_size": 16,
    "window_size": 128,
    "codebook_size": 256,
    "hidden_dropout": 0.0,
}


def _token_ids(length: int):
    import torch

    return torch.randint(3, OPTIONS["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))


def _model(**options):
    import torch

    from hf_hybrid.configuration.configuration_longvq import LongVQConfig
    from hf_hybrid.modeling.longvq.longvq_heads import LongVQForCausalLM

    torch.manual_seed(0)
    return LongVQForCausalLM(LongVQConfig(**OPTIONS | options))


# --------------------------------------------------------------------------------------------------------- attention


def _inputs(length: int) -> dict:
    import torch

    generator = torch.Generator().manual_seed(0)
    states = {
        name: torch.randn(1, 1, length, width, generator=generator)
        for name, width in (("query", 64), ("key", 64), ("value", 256))
    }
    return states | {
        "codes": torch.randint(128, (1, 1, length), generator=generator),
        "codebook": torch.randn(1, 128, 64, generator=generator),
        "window_bias": torch.randn(1, 128, generator=generator),
    }


def attention(length: int) -> Callable[[], object]:
    import torch

    from hf_hybrid.ops.vq_attention import vq_attention

    inputs = _inputs(length)

    def step() -> object:
        with torch.no_grad():
            return vq_attention(**inputs, chunk_size=128, causal=True)

    return step


def attention_dense(length: int) -> Callable[[], object]:
    """`scaled_dot_product_attention` over the same keys, without the bias."""
    import torch

    inputs = _inputs(length)
    tensors = inputs["query"], inputs["key"], inputs["value"]

    def step() -> object:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, scale=1.0)

    return step


def check_attention(length: int) -> None:
    import torch

    from hf_hybrid.ops.vq_attention import vq_attention, vq_attention_reference

    inputs = {
        name: tensor[:, :, :150] if name in ("query", "key", "value", "codes") else tensor
        for name, tensor in _inputs(150).items()
    }
    inputs["window_bias"] = inputs["window_bias"][:, :20]
    found = vq_attention(**inputs, chunk_size=32, causal=True)
    expected = vq_attention_reference(**inputs, chunk_size=32, causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- training


def _train_step(model, length: int) -> Callable[[], object]:
    stack, token_ids = model.model.train(), _token_ids(length)

    def step() -> None:
        stack.zero_grad(set_to_none=True)
        stack(token_ids, use_cache=False).last_hidden_state.mean().backward()

    return step


def train(length: int) -> Callable[[], object]:
    return _train_step(_model(), length)


def train_dense(length: int) -> Callable[[], object]:
    """The same model, whose attention is dense (over all keys, without the bias)."""
    import torch

    from hf_hybrid.modeling.longvq import longvq_layers

    def dense(query, key, value, *_arguments, **_settings):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)

    longvq_layers.vq_attention = dense  # this process measures nothing else
    return _train_step(_model(), length)


# ---------------------------------------------------------------------------------------------------------- decoding


def decode_step(context: int) -> Callable[[], object]:
    import torch

    model, token = _model().eval(), torch.full((1, 1), 5)
    with torch.no_grad():
        cache = model(_token_ids(context), use_cache=True, logits_to_keep=1).past_key_values

    def step() -> object:
        with torch.no_grad():
            return model(token, past_key_values=cache, use_cache=True).logits

    return step


def check_decode(context: int) -> None:
    import torch

    model, token_ids = _model().eval(), _token_ids(min(context, 600))
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits[:, -1]
        cache = model(token_ids[:, :-1], use_cache=True).past_key_values
        actual = model(token_ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def check_train(length: int) -> None:
    """Token by token, the states are those of one pass."""
    check_decode(length)


def tokens(length: int) -> tuple[int, str]:
    return length, "tokens"


CASES = (
    Case(
        name="longvq-attention",
        timed="attention over 128 codewords, one head, chunks of 128",
        build="attention",
        sizes=({"length": 2048}, {"length": 8192}),
        check="check_attention",
        work="tokens",
        peers=(
            Peer("scaled_dot_product_attention", "attention_dense", at_least=1.0, sizes=(0,)),
            Peer("scaled_dot_product_attention, long", "attention_dense", at_least=8.0, sizes=(1,)),
        ),
    ),
    Case(
        name="longvq-attention-growth",
        timed="attention over 128 codewords, against the half length",
        build="attention",
        sizes=({"length": 32768}, {"length": 65536}),
        check="check_attention",
        work="tokens",
        growth_at_most=2.2,
    ),
    Case(
        name="longvq-train",
        timed="train step of a causal LongVQ",
        build="train",
        sizes=({"length": 2048}, {"length": 16384}),
        check="check_train",
        work="tokens",
        peers=(Peer("the same model with dense attention", "train_dense", at_least=3.0, floor_from=16384),),
    ),
    Case(
        name="longvq-decode",
        timed="one decoding step of a causal LongVQ after a context",
        build="decode_step",
        sizes=({"context": 512}, {"context": 32768}),
        check="check_decode",
        growth_at_most=1.15,
    ),
)
