"""The loss of a long text over a large vocabulary: in pieces, against all logits at once.

A train step (forward and backward) of a SPADE language model: hidden 256, 2 layers, vocabulary 32,000, batch 1, float32.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Peer

VOCABULARY = 32000


def _step(length: int, pieces: bool, **options) -> Callable[[], object]:
    import torch

    from hf_hybrid.configuration.configuration_spade import SpadeLMConfig
    from hf_hybrid.modeling import vocabulary_loss
    from hf_hybrid.modeling.spade.spade_lm_heads import SpadeLMForCausalLM

    vocabulary_loss.WHOLE_ELEMENTS = 0 if pieces else 1 << 60
    torch.manual_seed(0)
    config = SpadeLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        window_size=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    model = SpadeLMForCausalLM(config).train()
    ids = torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids, **options).loss
        loss.backward()
        return loss.detach(), model.lm_head.weight.grad

    return step


def in_pieces(length: int) -> Callable[[], object]:
    """As `HybridTrainer` runs it."""
    return _step(length, True, skip_logits=True)


def in_pieces_with_logits(length: int) -> Callable[[], object]:
    """As other trainers run it."""
    return _step(length, True)


def at_once(length: int) -> Callable[[], object]:
    return _step(length, False)


def check(length: int) -> None:
    """Loss and gradient of the head are equal."""
    import torch

    for found, expected in zip(in_pieces(2048)(), at_once(2048)()):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def tokens(length: int) -> tuple[int, str]:
    return length, "tokens"


def half_of_all_logits(length: int) -> int:
    """Half of what logits, log-probabilities and their gradient take."""
    return length * VOCABULARY * 4 * 3 // 2


CASES = (
    Case(
        name="long-text-loss",
        timed="train step with the loss in pieces, SPADE-LM of 2 layers, vocabulary 32,000",
        build="in_pieces",
        sizes=({"length": 16384},),
        check="check",
        work="tokens",
        memory_at_most="half_of_all_logits",
        peers=(Peer("logits returned", "in_pieces_with_logits"), Peer("all logits at once", "at_once", at_least=0.7)),
    ),
)
