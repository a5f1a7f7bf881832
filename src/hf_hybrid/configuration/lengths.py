"""The lengths that a model accepts, read from any configuration: of this library or of Transformers."""

from __future__ import annotations

from transformers import PreTrainedConfig


def source_limits(config: PreTrainedConfig) -> dict[str, int]:
    """The fields that limit an input, each with the number of tokens that it allows; empty without a (known) limit."""
    own = getattr(config, "source_limits", None)
    return _positions(config) if own is None else own()


def target_limits(config: PreTrainedConfig) -> dict[str, int]:
    """The same for the text that a decoder writes, a prompt included."""
    own = getattr(config, "target_limits", None)
    return _positions(config) if own is None else own()


def max_source_length(config: PreTrainedConfig) -> int | None:
    """Largest number of tokens in an input; None: no (known) limit."""
    return min(source_limits(config).values(), default=None)


def max_target_length(config: PreTrainedConfig) -> int | None:
    """Largest number of tokens that a decoder writes, a prompt included; None: no (known) limit."""
    return min(target_limits(config).values(), default=None)


def check_source_length(config: PreTrainedConfig, length: int, what: str, remedy: str) -> None:
    """Refuses inputs that the model cannot read.

    Args:
        config: configuration of the model.
        length: tokens of the longest input.
        what: the inputs, as the subject of a sentence.
        remedy: option that shortens them.

    Raises:
        ValueError: `length` exceeds a limit of the configuration.
    """
    _check(source_limits(config), length, what, remedy)


def check_target_length(config: PreTrainedConfig, length: int, what: str, remedy: str) -> None:
    """Refuses targets that the decoder cannot write; arguments and errors as in `check_source_length`."""
    _check(target_limits(config), length, what, remedy)


def room_for(config: PreTrainedConfig, length: int) -> dict[str, int]:
    """Fields of a new model to raise, so that it accepts inputs of `length` tokens."""
    return {field: length for field, limit in source_limits(config).items() if limit < length}


def _check(limits: dict[str, int], length: int, what: str, remedy: str) -> None:
    for field, limit in limits.items():
        if length > limit:
            raise ValueError(
                f"{what} have up to {length} tokens, but the model accepts {limit}: its table of positions ends there "
                f"(`{field}`). Lower `{remedy}`, or train a new model with a longer table (`config_overrides {field}={length}`)."
            )


def _positions(config: PreTrainedConfig) -> dict[str, int]:
    """The convention of Transformers."""
    rows = getattr(config, "max_position_embeddings", None)
    return {"max_position_embeddings": rows} if isinstance(rows, int) and rows > 0 else {}
