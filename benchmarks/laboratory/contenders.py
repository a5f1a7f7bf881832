"""Contenders: models of this library and of Transformers, made by configuration, with equal numbers of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import hf_hybrid  # noqa: F401 - registers the architectures

from .settings import NEXT_TOKEN, SPAN_CORRUPTION, Settings

TOLERANCE = 0.03  # of the numbers of parameters
_SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


@dataclass(frozen=True)
class Contender:
    """A model whose number of parameters grows with one inner width.

    Attributes:
        name: in tables; `model_type` is that of the configuration.
        objective: what it is trained for.
        fields: configuration fields for settings and inner width.
        step: the inner width is a multiple of it.
        of_library: whether it is a model of this library, rather than a peer.
    """

    name: str
    model_type: str
    objective: str
    fields: Callable[[Settings, int], dict[str, Any]]
    step: int = 4
    of_library: bool = False

    def build(self, settings: Settings, vocab_size: int, width: int) -> PreTrainedModel:
        """A new model.

        Args:
            settings: sizes and options.
            vocab_size: rows of the embedding matrix.
            width: inner width.
        """
        chosen = {"vocab_size": vocab_size, "tie_word_embeddings": settings.tied} | self.fields(settings, width)
        config = AutoConfig.for_model(self.model_type, **chosen | dict(settings.model))
        auto = AutoModelForSeq2SeqLM if self.objective == SPAN_CORRUPTION else AutoModelForCausalLM
        return auto.from_config(config)

    def count(self, settings: Settings, vocab_size: int, width: int) -> int:
        """Number of trainable parameters, tied ones counted once."""
        with torch.device("meta"):
            return count_parameters(self.build(settings, vocab_size, width))

    def width_for(self, settings: Settings, vocab_size: int, parameters: int) -> int:
        """The inner width with which the number of parameters is closest to `parameters`.

        Raises:
            ValueError: none comes within `TOLERANCE`.
        """
        low, high = 1, 2
        while self.count(settings, vocab_size, high * self.step) < parameters:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.count(settings, vocab_size, middle * self.step) < parameters:
                low = middle
            else:
                high = middle
        counts = {width: self.count(settings, vocab_size, width) for width in (low * self.step, high * self.step)}
        best = min(counts, key=lambda width: abs(counts[width] - parameters))
        if abs(counts[best] / parameters - 1) > TOLERANCE:
            raise ValueError(
                f"{self.name} has {counts[best]:,} parameters at best, more than {TOLERANCE:.0%} off {parameters:,}: change its depth "
                "or width."
            )
        return best


def count_parameters(model: torch.nn.Module) -> int:
    """Number of trainable parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _spade(settings: Settings, width: int) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "head_dim": settings.head_dim,
        "num_attention_heads": settings.heads,
        "intermediate_size": width,
        "num_hidden_layers": settings.layers,
        "decoder_layers": settings.decoder_layers,
        "window_size": settings.window,
        "hidden_dropout": settings.dropout,
    }


def _t5(settings: Settings, width: int) -> dict[str, Any]:
    return {
        "d_model": settings.hidden_size,
        "d_kv": settings.head_dim,
        "num_heads": settings.heads,
        "d_ff": width,
        "num_layers": settings.layers,
        "num_decoder_layers": settings.decoder_layers,
        "dropout_rate": settings.dropout,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    }


def _longt5(settings: Settings, width: int) -> dict[str, Any]:
    return _t5(settings, width) | {"encoder_attention_type": "local", "local_radius": settings.window - 1}


def _bart(settings: Settings, width: int) -> dict[str, Any]:
    return {
        "d_model": settings.hidden_size,
        "encoder_layers": settings.layers,
        "decoder_layers": settings.decoder_layers,
        "encoder_attention_heads": settings.heads,
        "decoder_attention_heads": settings.heads,
        "encoder_ffn_dim": width,
        "decoder_ffn_dim": width,
        "max_position_embeddings": settings.length,
        "dropout": settings.dropout,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
    } | _SPECIAL


def _spade_lm(settings: Settings, width: int) -> dict[str, Any]:
    common = _spade(settings, width)
    return {name: value for name, value in common.items() if name not in ("head_dim", "decoder_layers")}


def _mega(settings: Settings, width: int) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "intermediate_size": 2 * settings.hidden_size,
        "shared_representation_size": settings.hidden_size // 2,
        "nffn_hidden_size": width,
        "use_chunking": True,
        "chunk_size": settings.window,
        "is_decoder": True,
        "bidirectional": False,
        "dropout_prob": settings.dropout,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    } | _SPECIAL


def _seqboat(settings: Settings, width: int) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "qk_dim": settings.hidden_size // 2,
        "value_dim": width,
        "window_size": settings.window,
        "is_decoder": True,
        "hidden_dropout": settings.dropout,
    }


def _longvq(settings: Settings, width: int) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "shared_representation_size": settings.hidden_size // 2,
        "intermediate_size": width,
        "window_size": settings.window,
        "codebook_size": settings.window,
        "hidden_dropout": settings.dropout,
    }


def _bst(settings: Settings, width: int) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "head_dim": settings.head_dim,
        "intermediate_size": width,
        "block_size": settings.window,
        "hidden_dropout": settings.dropout,
        "attention_dropout": 0.0,
        "final_dropout": settings.dropout,
    }


def _llama(settings: Settings, width: int) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "head_dim": settings.head_dim,
        "max_position_embeddings": settings.length,
    } | _SPECIAL


def _mistral(settings: Settings, width: int) -> dict[str, Any]:
    return _llama(settings, width) | {"sliding_window": settings.window}


def _mamba2(settings: Settings, width: int) -> dict[str, Any]:
    """Without feed-forward layers it has twice as many layers, as usual; the size of its state makes up for the rest."""
    return {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": 2 * settings.layers,
        "expand": 2,
        "head_dim": 16,
        "num_heads": settings.hidden_size // 8,
        "state_size": width,
        "n_groups": 1,
        "chunk_size": 64,
    } | _SPECIAL


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("SPADE", "spade", SPAN_CORRUPTION, _spade, of_library=True),
        Contender("T5", "t5", SPAN_CORRUPTION, _t5),
        Contender("LongT5-local", "longt5", SPAN_CORRUPTION, _longt5),
        Contender("BART", "bart", SPAN_CORRUPTION, _bart),
        Contender("SPADE-LM", "spade_lm", NEXT_TOKEN, _spade_lm, of_library=True),
        Contender("Mega", "mega", NEXT_TOKEN, _mega, of_library=True),
        Contender("SeqBoat", "seqboat", NEXT_TOKEN, _seqboat, of_library=True),
        Contender("BST", "bst", NEXT_TOKEN, _bst, of_library=True),
        Contender("LongVQ", "longvq", NEXT_TOKEN, _longvq, of_library=True),
        Contender("Llama", "llama", NEXT_TOKEN, _llama),
        Contender("Mistral", "mistral", NEXT_TOKEN, _mistral),
        Contender("Mamba2", "mamba2", NEXT_TOKEN, _mamba2),
    )
}
REFERENCES = {SPAN_CORRUPTION: "SPADE", NEXT_TOKEN: "SPADE-LM"}


def widths(names: list[str], settings: Settings, vocab_size: int) -> dict[str, int]:
    """Inner widths with which contenders of one objective have as many parameters as the reference of that objective.

    Raises:
        ValueError: one of them cannot.
    """
    found: dict[str, int] = {}
    for name in names:
        contender = CONTENDERS[name]
        reference = CONTENDERS[REFERENCES[contender.objective]]
        if contender is reference:
            found[name] = settings.feed_forward
        else:
            target = reference.count(settings.changed({"model": {}}), vocab_size, settings.feed_forward)
            found[name] = contender.width_for(settings, vocab_size, target)
    return found
