"""A million tokens in one forward pass, and a training step of a quarter of a million, for every model.

Models: hidden 32 (forward) and 64 (training), 2 layers, vocabulary 1,000, windows and chunks of 128 (blocks of 512), dropout of the defaults, batch 1, float32. SPADE is its encoder;
the others are causal stacks. A training step has gradient checkpointing. Steps take minutes: `--repeats 1 --warm_up 0` runs each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Case
from stacks import ARCHITECTURES, call_options, configuration, stack

VOCABULARY = 1000


def _token_ids(length: int):
    import torch

    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


def _stack(architecture: str, hidden: int):
    return stack(configuration(architecture, hidden, layers=2, vocabulary=VOCABULARY, heads=2, feed_forward=4))


def forward(length: int, architecture: str) -> Callable[[], object]:
    import torch

    model, ids = _stack(architecture, 32).eval(), _token_ids(length)

    def step() -> object:
        with torch.no_grad():
            return model(ids, **call_options(architecture)).last_hidden_state

    return step


def train(length: int, architecture: str) -> Callable[[], object]:
    model, ids = _stack(architecture, 64).train(), _token_ids(length)
    model.activation_checkpointing_enable()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        states = model(ids, **call_options(architecture)).last_hidden_state
        states.pow(2).mean().backward()

    return step


def check(length: int, architecture: str) -> None:
    """Every causal stack gives for a long text what it gives for its pieces with a cache; the encoder what it gives in float64."""
    import torch

    ids = _token_ids(16384)
    for name in ARCHITECTURES:
        model = _stack(name, 32).eval()
        with torch.no_grad():
            found = forward(16384, name)()[:, -256:]
            if name == "spade":
                expected = model.double()(ids).last_hidden_state[:, -256:].float()
            else:
                cache = None
                for piece in ids.split(4096, dim=1):
                    output = model(piece, past_key_values=cache, use_cache=True)
                    cache = output.past_key_values
                expected = output.last_hidden_state[:, -256:]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def tokens(length: int, architecture: str) -> tuple[int, str]:
    return length, "tokens"


def six_kilobytes_a_token(length: int, architecture: str) -> int:
    return 6144 * length


def twenty_four_kilobytes_a_token(length: int, architecture: str) -> int:
    return 24576 * length


def _sizes(length: int) -> tuple[dict[str, Any], ...]:
    return tuple({"length": length, "architecture": name} for name in ARCHITECTURES)


CASES = (
    Case(
        name="million-tokens",
        timed="forward without gradient over 1,048,576 tokens, hidden 32, 2 layers",
        build="forward",
        sizes=_sizes(1 << 20),
        check="check",
        work="tokens",
        memory_at_most="six_kilobytes_a_token",
    ),
    Case(
        name="quarter-million-train",
        timed="train step with gradient checkpointing over 262,144 tokens, hidden 64, 2 layers",
        build="train",
        sizes=_sizes(1 << 18),
        check="check",
        work="tokens",
        memory_at_most="twenty_four_kilobytes_a_token",
    ),
)
