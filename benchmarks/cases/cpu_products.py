"""Training steps as `HybridTrainer` makes them on a CPU, with products of float32 by oneDNN, against the same steps without.

Models: 4 layers, vocabulary 2,000, windows and chunks of 128, inner widths of three (feed-forward) or two (values) times the hidden
width, 8 texts of 512 tokens, dropout 0, float32. SPADE is its encoder; the others are causal stacks. Only processors whose products MKL
computes with half of their vector units, those of AMD with AVX-512, have something to gain.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Peer
from stacks import ARCHITECTURES, call_options, configuration, stack

VOCABULARY, LENGTH = 2000, 512


def _stack(architecture: str, hidden: int):
    changes = {"block_size": 128} if architecture == "bst" else {}
    config = configuration(
        architecture, hidden, layers=4, vocabulary=VOCABULARY, heads=hidden // 32, feed_forward=3, **changes
    )
    for name, value in list(vars(config).items()):
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return stack(config)


def train_without(hidden: int, architecture: str) -> Callable[[], object]:
    import torch

    model = _stack(architecture, hidden).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8, LENGTH), generator=generator)
    # Weights of the sum of the states; the sum of their squares is fixed by the last norm.
    weights = torch.randn(8, LENGTH, hidden, generator=generator)

    def step() -> object:
        model.zero_grad(set_to_none=True)
        model(ids, **call_options(architecture)).last_hidden_state.mul(weights).mean().backward()
        return model

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
