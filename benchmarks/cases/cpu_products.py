"""Training steps as `HybridTrainer` makes them on a CPU, with products of float32 by oneDNN, against the same steps without.

Models: 4 layers, vocabulary 2,000, windows and chunks of 128, inner widths of three (feed-forward) or two (values) times the hidden
width, 8 texts of 512 tokens, dropout 0, float32. SPADE is its encoder; the others are causal stacks. Only processors whose products MKL
computes with half of their vector units, those of AMD with AVX-512, have something to gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Case, Peer

VOCABULARY, LENGTH = 2000, 512
ARCHITECTURES = ("spade", "spade_lm", "mega", "seqboat", "longvq", "bst")


def _stack(architecture: str, hidden: int):
    import torch
    from transformers import AutoConfig, AutoModel

    from hf_hybrid.modeling.spade.modeling_spade import SpadeEncoderModel

    heads = {"num_attention_heads": hidden // 32, "intermediate_size": 3 * hidden}
    single = {"shared_representation_size": hidden // 2, "intermediate_size": 2 * hidden, "chunk_size": 128}
    options: dict[str, Any] = {
        "spade": heads | {"head_dim": 32, "decoder_layers": 1, "window_size": 128},
        "spade_lm": heads | {"window_size": 128},
        "mega": single
        | {"nffn_hidden_size": 2 * hidden, "use_chunking": True, "bidirectional": False, "is_decoder": True},
        "seqboat": {"value_dim": 2 * hidden, "qk_dim": hidden // 2, "window_size": 128, "is_decoder": True},
        "longvq": single | {"value_size": 2 * hidden, "is_decoder": True},
        "bst": heads | {"head_dim": 32, "block_size": 128},
    }[architecture]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=4, **options
    )
    for name, value in list(vars(config).items()):
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return SpadeEncoderModel(config) if architecture == "spade" else AutoModel.from_config(config)


def train_without(hidden: int, architecture: str) -> Callable[[], object]:
    import torch

    stack = _stack(architecture, hidden).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8, LENGTH), generator=generator)
    weights = torch.randn(
        8, LENGTH, hidden, generator=generator
    )  # of the sum: that of squares is fixed by the last norm
    options = {} if architecture == "spade" else {"use_cache": False}

    def step() -> object:
        stack.zero_grad(set_to_none=True)
        stack(ids, **options).last_hidden_state.mul(weights).mean().backward()
        return stack

    return step


def train(hidden: int, architecture: str) -> Callable[[], object]:
    import torch

    from hf_hybrid.training.cpu_products import fast_products, limit_kept_products

    limit_kept_products()
    plain = train_without(hidden, architecture)

    def step() -> object:
        with fast_products(torch.device("cpu")):
            return plain()

    return step


def check(hidden: int, architecture: str) -> None:
    """Both have the same gradients, but for the rounding of float32, which now and then moves a state across the kink of a ReLU."""
    ours, theirs = train(hidden, architecture)(), train_without(hidden, architecture)()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    for name, parameter in ours.named_parameters():
        if name in expected:
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error < 5e-3, f"{name}: {error:.1e}"  # each of them is 1e-3 from the gradient in float64


def tokens(hidden: int, architecture: str) -> tuple[int, str]:
    return 8 * LENGTH, "tokens"


CASES = (
    Case(
        name="narrow-train",
        timed="train step of narrow models, 8 texts of 512 tokens, as in training on a CPU",
        build="train",
        sizes=tuple({"hidden": hidden, "architecture": name} for hidden in (128, 256) for name in ARCHITECTURES),
        check="check",
        work="tokens",
        peers=(Peer("without oneDNN", "train_without", at_least=1.3),),
    ),
)
