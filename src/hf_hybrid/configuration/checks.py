"""Checks that several configurations share. All raise ValueError with the field, its value and what is accepted."""

from __future__ import annotations

from collections.abc import Iterable

from transformers.configuration_utils import PreTrainedConfig


def check_at_least(
    config: PreTrainedConfig, least: int, names: Iterable[str], remedies: dict[str, str] | None = None
) -> None:
    """Refuses smaller values of the fields `names`; None passes. `remedies` maps a field to advice for its message."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            remedy = f"; {remedies[name]}" if remedies and name in remedies else ""
            raise ValueError(f"`{name}` must be at least {least}{remedy}; got {value}.")


def check_positive(config: PreTrainedConfig, names: Iterable[str]) -> None:
    """Refuses zero and negative numbers; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` must be greater than 0; got {value}.")


def check_probabilities(config: PreTrainedConfig, names: Iterable[str]) -> None:
    """Refuses what is not in [0, 1); None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"`{name}` is a probability and must lie in [0, 1); got {value}.")


def check_step_sizes(config: PreTrainedConfig) -> None:
    """Refuses initial step sizes that are not positive, or whose range is empty."""
    if not 0 < config.ssm_dt_min <= config.ssm_dt_max:
        raise ValueError(
            "`ssm_dt_min` and `ssm_dt_max` must satisfy 0 < ssm_dt_min <= ssm_dt_max; got "
            f"{config.ssm_dt_min} and {config.ssm_dt_max}."
        )


def check_special_tokens(config: PreTrainedConfig) -> None:
    """Refuses special tokens outside the vocabulary."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        tokens = getattr(config, name, None)
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if token is not None and not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"`{name}` is {tokens}, outside the vocabulary of {config.vocab_size} tokens (0 to {config.vocab_size - 1})."
                )


def check_bands(config: PreTrainedConfig) -> None:
    """Refuses bands of an adaptive softmax that do not rise within the vocabulary, or whose last one has no width."""
    limits = [0, *config.adaptive_cutoffs, config.vocab_size]
    if len(limits) < 3 or any(low >= high for low, high in zip(limits, limits[1:])):
        raise ValueError(
            f"`adaptive_cutoffs` must be a rising list of token ids between 0 and `vocab_size` ({config.vocab_size}); got "
            f"{config.adaptive_cutoffs}."
        )
    tails = len(config.adaptive_cutoffs)
    if config.adaptive_factor < 1 or config.hidden_size // config.adaptive_factor**tails < 1:
        raise ValueError(
            f"`adaptive_factor` ({config.adaptive_factor}) leaves no width for the last of {tails + 1} bands at `hidden_size` "
            f"{config.hidden_size}."
        )
