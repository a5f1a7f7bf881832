"""Causal Mega against the implementation that Transformers 4.x had, its growth with length, and its decoding step.

Models: hidden 512, 4 layers, values and feed-forward 1,024, queries and keys 128, 16 averages, chunks of 128, rotary bias, dropout
0, batch 1, float32; both sides from the same configuration. A train step is forward and backward of the mean of the last states.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Environment, Peer

TRANSFORMERS_4 = Environment("transformers-4.57.6", ("transformers==4.57.6",))
OPTIONS = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "nffn_hidden_size": 1024,
    "shared_representation_size": 128,
    "ema_projection_size": 16,
    "bidirectional": False,
    "is_decoder": True,
    "dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "nffn_activation_dropout_prob": 0.0,
}
CHUNKED = {"use_chunking": True, "chunk_size": 128}


def _token_ids(length: int):
    import torch

    return torch.randint(3, OPTIONS["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))


def _ours(**options):
    import torch

    from hf_hybrid.configuration.configuration_mega import MegaConfig
    from hf_hybrid.modeling.mega.mega_heads import MegaForCausalLM

    torch.manual_seed(0)
    return MegaForCausalLM(MegaConfig(**OPTIONS, **options))


def _theirs(**options):
    import torch
    from transformers.models.deprecated.mega import MegaConfig, MegaForCausalLM

    torch.manual_seed(0)
    return MegaForCausalLM(MegaConfig(**OPTIONS, **options))


def _train_step(model, length: int) -> Callable[[], object]:
    model = model.mega.train()
    token_ids = _token_ids(length)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(token_ids, use_cache=False).last_hidden_state.mean().backward()

    return step


def train(length: int) -> Callable[[], object]:
    return _train_step(_ours(**CHUNKED), length)


def train_transformers_4(length: int) -> Callable[[], object]:
    return _train_step(_theirs(**CHUNKED), length)


def check_train(length: int) -> None:
    """Chunk by chunk with the state of the moving average, the states are those of one pass."""
    import torch

    model, token_ids = _ours(**CHUNKED).eval(), _token_ids(512)
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits
        cache, pieces = None, []
        for piece in token_ids.split(100, dim=1):
            outputs = model(piece, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-3, atol=1e-3)


def _prefill(model, token_ids):
    """Cache after a prompt, read in pieces of bounded size."""
    cache = None
    for piece in token_ids.split(2048, dim=1):
        cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
    return cache


def _step(model, cache, grows: bool) -> Callable[[], object]:
    import copy

    import torch

    token = torch.full((1, 1), 5)

    def step() -> object:
        past = copy.copy(cache) if grows else cache
        with torch.no_grad():
            return model(token, past_key_values=past, use_cache=True).logits

    return step


def decode_step(context: int) -> Callable[[], object]:
    import torch

    model = _ours(**CHUNKED).eval()
    with torch.no_grad():
        cache = _prefill(model, _token_ids(context))
    return _step(model, cache, grows=False)


def decode_step_unchunked(context: int) -> Callable[[], object]:
    import torch

    model = _ours().eval()
    with torch.no_grad():
        cache = _prefill(model, _token_ids(context))
    return _step(model, cache, grows=False)


def decode_step_transformers_4(context: int) -> Callable[[], object]:
    """Its cache is a tuple that a step does not change: every step starts after the same context."""
    import torch

    model = _theirs().eval()
    with torch.no_grad():
        cache = _prefill(model, _token_ids(context))
    return _step(model, cache, grows=True)


def check_decode(context: int) -> None:
    import torch

    for options in (CHUNKED, {}):
        model, token_ids = _ours(**options).eval(), _token_ids(min(context, 600))
        with torch.no_grad():
            expected = model(token_ids, use_cache=False).logits[:, -1]
            cache = _prefill(model, token_ids[:, :-1])
            actual = model(token_ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def tokens(length: int) -> tuple[int, str]:
    return length, "tokens"


CASES = (
    Case(
        name="mega-train",
        timed="train step of a causal Mega, chunks of 128",
        build="train",
        sizes=({"length": 4096}, {"length": 16384}),
        check="check_train",
        work="tokens",
        peers=tuple(
            Peer(
                "Transformers 4.57.6",
                "train_transformers_4",
                at_least=floor,
                environment=TRANSFORMERS_4,
                sizes=(index,),
            )
            for index, floor in enumerate((2.5, 4.0))
        ),
    ),
    Case(
        name="mega-train-growth",
        timed="train step of a causal Mega, chunks of 128, against the half length",
        build="train",
        sizes=({"length": 16384}, {"length": 32768}),
        check="check_train",
        work="tokens",
        growth_at_most=2.2,
    ),
    Case(
        name="mega-decode",
        timed="one decoding step of a causal Mega, chunks of 128, after a context",
        build="decode_step",
        sizes=({"context": 512}, {"context": 32768}),
        check="check_decode",
        growth_at_most=1.15,
    ),
    Case(
        name="mega-decode-unchunked",
        timed="one decoding step of a causal Mega without chunks after a context",
        build="decode_step_unchunked",
        sizes=({"context": 2048},),
        check="check_decode",
        peers=(Peer("Transformers 4.57.6", "decode_step_transformers_4", environment=TRANSFORMERS_4, at_least=10.0),),
    ),
)
