"""Stacks of every architecture at one width, for the cases that compare all of them."""

from __future__ import annotations

from typing import Any

ARCHITECTURES = ("spade", "spade_lm", "mega", "seqboat", "longvq", "bst")


def configuration(
    architecture: str, hidden: int, *, layers: int, vocabulary: int, heads: int, feed_forward: int, **changes: Any
):
    """Windows and chunks of 128 (blocks of BST: `block_size`); values, and feed-forward layers of models with one head, of twice the width.

    Args:
        architecture: one of `ARCHITECTURES`.
        hidden, layers, vocabulary: sizes.
        heads, feed_forward: number of heads, and inner width over width, of models with several heads.
        changes: further fields.
    """
    from transformers import AutoConfig

    import hf_hybrid  # noqa: F401  (registers the architectures)

    several = {"num_attention_heads": heads, "intermediate_size": feed_forward * hidden}
    windowed = several | {"window_size": 128}
    single = {"shared_representation_size": hidden // 2, "intermediate_size": 2 * hidden, "chunk_size": 128}
    options: dict[str, Any] = {
        "spade": windowed | {"head_dim": hidden // heads, "decoder_layers": 1},
        "spade_lm": windowed,
        "mega": single
        | {"nffn_hidden_size": 2 * hidden, "use_chunking": True, "bidirectional": False, "is_decoder": True},
        "seqboat": {"value_dim": 2 * hidden, "qk_dim": hidden // 2, "window_size": 128, "is_decoder": True},
        "longvq": single | {"value_size": 2 * hidden, "is_decoder": True},
        "bst": several | {"head_dim": hidden // heads},
    }[architecture]
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers}
    return AutoConfig.for_model(architecture, **sizes, **(options | changes))


def stack(config):
    """The stack of a configuration with the weights of seed 0: of SPADE the encoder, of the others the causal base model."""
    import torch
    from transformers import AutoModel

    from hf_hybrid.modeling.spade.modeling_spade import SpadeEncoderModel

    torch.manual_seed(0)
    return SpadeEncoderModel(config) if config.model_type == "spade" else AutoModel.from_config(config)


def call_options(architecture: str) -> dict[str, bool]:
    """What a call without a cache takes."""
    return {} if architecture == "spade" else {"use_cache": False}
