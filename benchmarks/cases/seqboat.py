"""SeqBoat: cost that follows activation, training against our Mega, growth with length, decoding from the working memory.

Models: hidden 512, 4 layers, values 1,024, queries and keys 128, 16 averages, window 128, rotary positions, dropout 0, batch 1, float32.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Peer

OPTIONS = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "value_dim": 1024,
    "qk_dim": 128,
    "ema_dim": 16,
    "window_size": 129,
    "is_decoder": True,
    "hidden_dropout": 0.0,
}


def _token_ids(length: int):
    import torch

    return torch.randint(3, OPTIONS["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))


def _model(**options):
    import torch

    from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
    from hf_hybrid.modeling.seqboat.seqboat_heads import SeqBoatForCausalLM

    torch.manual_seed(0)
    return SeqBoatForCausalLM(SeqBoatConfig(**OPTIONS | options))


def _set_density(model, density: float):
    """Replaces the decisions of all routers by random ones of a density; the gates are 0.75."""
    import torch

    from hf_hybrid.modeling.seqboat.router import Routing

    def decide(_router, inputs, routing):
        generator = torch.Generator().manual_seed(1)
        active = torch.rand(routing.active.shape, generator=generator) < density
        gate = torch.where(active, 0.75, 0.0) + 0 * routing.logits.sum(-1)
        return Routing(active, gate, routing.logits)

    for layer in model.model.layers:
        layer.unit.router.register_forward_hook(decide)
    return model


# ------------------------------------------------------------------------------------------------- cost of activation


def _attention(length: int, density: float) -> Callable[[], object]:
    import torch

    from hf_hybrid.modeling.seqboat.router import Routing
    from hf_hybrid.ops.compaction import rotary_table

    unit = _model().model.layers[0].unit.eval()
    inner = torch.randn(1, length, 512)
    active = torch.rand(1, length, generator=torch.Generator().manual_seed(1)) < density
    routing = Routing(active, torch.where(active, 0.75, 0.0), None)
    rotary = rotary_table(torch.arange(length), 128, torch.float32)

    def step() -> None:
        with torch.no_grad():
            unit._attend(inner, routing, rotary, 0, None)

    return step


def attention_sparse(length: int) -> Callable[[], object]:
    return _attention(length, 0.1)


def attention_full(length: int) -> Callable[[], object]:
    return _attention(length, 1.0)


def check_attention(length: int) -> None:
    """The packed stream gives what the definition gives."""
    import torch

    from hf_hybrid.ops.compaction import (
        active_tokens,
        add_active,
        compacted_attention,
        compacted_attention_reference,
        gather_active,
    )

    torch.manual_seed(0)
    active = torch.rand(1, 700) < 0.5
    states = [torch.randn(1, 700, width) for width in (128, 128, 256)]
    options = {"activation": "softmax", "window": 128, "causal": True}
    expected = compacted_attention_reference(*states, active, **options)
    tokens = active_tokens(active)
    found = compacted_attention(*(gather_active(part, tokens) for part in states), tokens, **options)
    torch.testing.assert_close(add_active(torch.zeros_like(expected), found, tokens), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- training


def _train_step(stack, length: int) -> Callable[[], object]:
    stack, token_ids = stack.train(), _token_ids(length)

    def step() -> None:
        stack.zero_grad(set_to_none=True)
        stack(token_ids, use_cache=False).last_hidden_state.mean().backward()

    return step


def train(length: int) -> Callable[[], object]:
    return _train_step(_set_density(_model(), 0.5).model, length)


def train_mega(length: int) -> Callable[[], object]:
    import torch

    from hf_hybrid.configuration.configuration_mega import MegaConfig
    from hf_hybrid.modeling.mega.mega_heads import MegaForCausalLM

    torch.manual_seed(0)
    config = MegaConfig(
        vocab_size=1000, hidden_size=512, num_hidden_layers=4, intermediate_size=1024, nffn_hidden_size=1024,
        shared_representation_size=128, use_chunking=True, chunk_size=128, bidirectional=False, is_decoder=True,
        dropout_prob=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, nffn_activation_dropout_prob=0.0,
    )  # fmt: skip
    return _train_step(MegaForCausalLM(config).mega, length)


# ---------------------------------------------------------------------------------------------------------- decoding


def _prefill(model, token_ids):
    cache = None
    for piece in token_ids.split(2048, dim=1):
        cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
    return cache


def decode_step(context: int) -> Callable[[], object]:
    import torch

    model = _set_density(_model(), 1.0).eval()
    token = torch.full((1, 1), 5)
    with torch.no_grad():
        cache = _prefill(model, _token_ids(context))

    def step() -> object:
        with torch.no_grad():
            return model(token, past_key_values=cache, use_cache=True).logits

    return step


def recompute(context: int) -> Callable[[], object]:
    """What the published code does for every token: its last 2,048 go through the whole model again."""
    import torch

    model, token_ids = _set_density(_model(), 1.0).eval(), _token_ids(context)[:, -2048:]

    def step() -> object:
        with torch.no_grad():
            return model(token_ids, use_cache=False, logits_to_keep=1).logits

    return step


def check_decode(context: int) -> None:
    import torch

    model, token_ids = _model().eval(), _token_ids(min(context, 600))
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits[:, -1]
        cache = _prefill(model, token_ids[:, :-1])
        actual = model(token_ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def tokens(length: int) -> tuple[int, str]:
    return length, "tokens"


CASES = (
    Case(
        name="seqboat-sparse",
        timed="attention unit of a SeqBoat layer, 10 % of the tokens active",
        build="attention_sparse",
        sizes=({"length": 8192},),
        check="check_attention",
        work="tokens",
        peers=(Peer("all tokens active", "attention_full", at_least=5.0),),
    ),
    Case(
        name="seqboat-train",
        timed="train step of a causal SeqBoat, 50 % of the tokens active",
        build="train",
        sizes=({"length": 4096},),
        check="check_decode_of_train",
        work="tokens",
        peers=(Peer("our Mega, chunks of 128", "train_mega", at_least=1.0),),
    ),
    Case(
        name="seqboat-train-growth",
        timed="train step of a causal SeqBoat, 50 % of the tokens active, against the half length",
        build="train",
        sizes=({"length": 32768}, {"length": 65536}),
        check="check_decode_of_train",
        work="tokens",
        growth_at_most=2.2,
    ),
    Case(
        name="seqboat-decode",
        timed="one decoding step of a causal SeqBoat after a context, every token active",
        build="decode_step",
        sizes=({"context": 512}, {"context": 32768}),
        check="check_decode",
        growth_at_most=1.15,
    ),
    Case(
        name="seqboat-decode-recompute",
        timed="one decoding step of a causal SeqBoat after a context, every token active",
        build="decode_step",
        sizes=({"context": 4096},),
        check="check_decode",
        peers=(Peer("recomputing the last 2,048 tokens", "recompute", at_least=50.0),),
    ),
)


def check_decode_of_train(length: int) -> None:
    """Token by token, the states are those of one pass."""
    check_decode(length)
