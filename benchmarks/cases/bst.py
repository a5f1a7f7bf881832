"""A layer of the Block-State Transformer against one of the Block-Recurrent Transformer and against sliding-window attention
alone, the growth of a model with length, and its decoding step.

Layers: hidden 512, 8 heads of 64, feed-forward 2,048, blocks and windows of 512 tokens, dropout 0, batch 1, float32; state size 64,
and 32 context states in the multi-filter variant. A train step is forward and backward of the mean of the outputs. Models: 4 such
layers, the first and the third with context states.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Environment, Peer

# Without its requirements: it asks for a library of nearest neighbours on GPUs that it does not import.
BLOCK_RECURRENT = Environment(
    "block-recurrent-transformer-0.4.4",
    ("--no-deps", "block-recurrent-transformer-pytorch==0.4.4", "beartype==0.23.1", "einops==0.8.2"),
)
VOCABULARY, BLOCK = 1000, 512
OPTIONS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2048,
    "block_size": BLOCK,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "final_dropout": 0.0,
}


def _config(**options):
    from hf_hybrid.configuration.configuration_bst import BstConfig

    return BstConfig(**OPTIONS | options)


def _model(**options):
    import torch

    from hf_hybrid.modeling.bst.bst_heads import BstForCausalLM

    torch.manual_seed(0)
    return BstForCausalLM(_config(num_hidden_layers=4, bst_layers=[0, 2], **options))


def _states(length: int):
    import torch

    return torch.randn(1, length, OPTIONS["hidden_size"], generator=torch.Generator().manual_seed(0))


def _token_ids(length: int):
    import torch

    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


def _layer_step(length: int, **options) -> Callable[[], object]:
    """Train step of the only layer of a model, with its initial values."""
    from hf_hybrid.modeling.bst.bst_layers import Passage
    from hf_hybrid.modeling.bst.modeling_bst import BstModel

    layer = BstModel(_config(num_hidden_layers=1, **options)).layers[0].train()
    hidden_states = _states(length).requires_grad_()

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        layer(hidden_states, Passage()).mean().backward()

    return step


def layer_mf(length: int) -> Callable[[], object]:
    return _layer_step(length, bst_layers=[0], context_variant="mf")


def layer_sh(length: int) -> Callable[[], object]:
    return _layer_step(length, bst_layers=[0], context_variant="sh")


def layer_mh(length: int) -> Callable[[], object]:
    return _layer_step(length, bst_layers=[0], context_variant="mh")


def layer_window(length: int) -> Callable[[], object]:
    return _layer_step(length, bst_layers=[])


def layer_block_recurrent(length: int) -> Callable[[], object]:
    """One recurrent layer with as many states as a block has tokens, the default; two tokens make its head negligible."""
    import torch
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    torch.manual_seed(0)
    model = BlockRecurrentTransformer(
        num_tokens=2,
        dim=512,
        depth=1,
        dim_head=64,
        heads=8,
        max_seq_len=length,
        block_width=BLOCK,
        recurrent_layers=(1,),
    ).train()
    token_ids = torch.randint(2, (1, length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(token_ids)[0].mean().backward()

    return step


def check_layer(length: int) -> None:
    check_model(length, "mf")
    check_model(length, "sh")


def check_model(length: int, variant: str = "mf") -> None:
    """Pieces with a state give the logits of one pass."""
    import torch

    model, token_ids = _model(context_variant=variant).eval(), _token_ids(1200)
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits
        cache, pieces = None, []
        for piece in token_ids.split(500, dim=1):
            outputs = model(piece, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-3, atol=1e-3)


def _train_step(length: int, **options) -> Callable[[], object]:
    model, token_ids = _model(**options).model.train(), _token_ids(length)
    model.gradient_checkpointing_enable()  # 65,536 tokens would keep 20 GB otherwise

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(token_ids).last_hidden_state.mean().backward()

    return step


def train_mf(length: int) -> Callable[[], object]:
    return _train_step(length, context_variant="mf")


def train_sh(length: int) -> Callable[[], object]:
    return _train_step(length, context_variant="sh")


def _forward(length: int, **options) -> Callable[[], object]:
    import torch

    model, token_ids = _model(**options).model.eval(), _token_ids(length)

    def step() -> object:
        with torch.no_grad():
            return model(token_ids, use_cache=False).last_hidden_state

    return step


def forward_mf(length: int) -> Callable[[], object]:
    return _forward(length, context_variant="mf")


def forward_sh(length: int) -> Callable[[], object]:
    return _forward(length, context_variant="sh")


def forward_explicit(length: int) -> Callable[[], object]:
    return _forward(length, context_variant="sh", ssm_type="unstructured")


def _decode_step(context: int, variant: str) -> Callable[[], object]:
    import torch

    model, cache = _model(context_variant=variant).eval(), None
    token = torch.full((1, 1), 5)
    with torch.no_grad():
        for piece in _token_ids(context).split(2048, dim=1):
            cache = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def step() -> object:
        with torch.no_grad():
            return model(token, past_key_values=cache, use_cache=True).logits

    return step


def decode_step_mf(context: int) -> Callable[[], object]:
    return _decode_step(context, "mf")


def decode_step_sh(context: int) -> Callable[[], object]:
    return _decode_step(context, "sh")


def check_decode(context: int) -> None:
    import torch

    for variant in ("mf", "sh"):
        model, token_ids = _model(context_variant=variant).eval(), _token_ids(600)
        with torch.no_grad():
            expected = model(token_ids, use_cache=False).logits[:, -1]
            cache = model(token_ids[:, :-1], use_cache=True).past_key_values
            actual = model(token_ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def tokens(length: int) -> tuple[int, str]:
    return length, "tokens"


_LENGTHS = ({"length": 4096}, {"length": 16384})
_DOUBLED = tuple({"length": 2**power} for power in range(14, 17))
_PEERS = (Peer("block-recurrent-transformer-pytorch 0.4.4", "layer_block_recurrent", environment=BLOCK_RECURRENT),)
# Name of a case: what is timed, and the function that builds it.
_GROWING = {
    "bst-growth-mf": ("forward without gradient, multi-filter context", "forward_mf"),
    "bst-growth-sh": ("forward without gradient, single-head context", "forward_sh"),
    "bst-growth-explicit": ("forward without gradient, single-head context of explicit filters", "forward_explicit"),
    "bst-train-growth-mf": ("train step with gradient checkpointing, multi-filter context", "train_mf"),
    "bst-train-growth-sh": ("train step with gradient checkpointing, single-head context", "train_sh"),
}
_GROWTH = tuple(
    Case(
        name=name,
        timed=f"{timed}, against the half length",
        build=build,
        sizes=_DOUBLED,
        check="check_layer",
        work="tokens",
        growth_at_most=2.2,
    )
    for name, (timed, build) in _GROWING.items()
)

CASES = (
    Case(
        name="bst-layer-mf",
        timed="train step of one layer, multi-filter context",
        build="layer_mf",
        sizes=_LENGTHS,
        check="check_layer",
        work="tokens",
        peers=(*_PEERS, Peer("sliding window alone", "layer_window", at_least=1 / 1.35)),
    ),
    Case(
        name="bst-layer-sh",
        timed="train step of one layer, single-head context",
        build="layer_sh",
        sizes=_LENGTHS,
        check="check_layer",
        work="tokens",
        peers=(*_PEERS, Peer("sliding window alone", "layer_window")),
    ),
    Case(
        name="bst-layer-mh",
        timed="train step of one layer, multi-head context",
        build="layer_mh",
        sizes=_LENGTHS[:1],
        check="check_layer",
        work="tokens",
        peers=(Peer("sliding window alone", "layer_window"),),
    ),
    *_GROWTH,
    Case(
        name="bst-decode-mf",
        timed="one decoding step, multi-filter context, after a text",
        build="decode_step_mf",
        sizes=({"context": 512}, {"context": 32768}),
        check="check_decode",
        growth_at_most=1.15,
    ),
    Case(
        name="bst-decode-sh",
        timed="one decoding step, single-head context, after a text",
        build="decode_step_sh",
        sizes=({"context": 512}, {"context": 32768}),
        check="check_decode",
        growth_at_most=1.15,
    ),
)
