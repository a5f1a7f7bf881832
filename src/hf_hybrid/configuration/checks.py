"""Checks that several configurations share. All raise ValueError with the field, its value and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields

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


# Far above every published model, and far below what no machine holds: a larger value is a typing error or an attack.
_MOST_LAYERS = 10_000
_WIDEST = 2**20
_MOST_ROWS = 2**28
_LONGEST = 2**31 - 1  # what a 32-bit index of a kernel reaches
_LARGEST_TABLE = 2**40  # numbers in one weight: 4 TiB in float32
_LARGEST_NUMBER = 10**18  # of any kind: what single precision and 64-bit integers still compute with
OUTPUTS_OF_LAYERS = ("output_hidden_states", "output_attentions")
_TABLES = (
    "vocab_size",
    "type_vocab_size",
    "max_positions",
    "max_target_positions",
    "distance_table_size",
    "codebook_size",
)
_LENGTHS = ("window_size", "chunk_size", "block_size", "max_length", "filter_length", "max_distance", "init_iters")
_INITIAL = ("initializer_range", "initializer_factor", "init_std", "_range", "temp_scale")


def _largest(name: str) -> int:
    """Largest whole number that a field takes, by the kind of size that its name says."""
    if "layers" in name:
        return _MOST_LAYERS
    if name in _TABLES or name.endswith("token_id"):
        return _MOST_ROWS
    if name.endswith(_LENGTHS):
        return _LONGEST
    return _WIDEST


def _numbers(value: object) -> Iterator[int | float]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def check_numbers(config: PreTrainedConfig) -> None:
    """Refuses numbers that are not finite, sizes that no machine holds, and negative ranges of initial values, in any field."""
    for field in fields(config):  # type: ignore[arg-type]
        name = field.name
        for value in _numbers(getattr(config, name, None)):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number; got {value}.")
            if abs(value) > _LARGEST_NUMBER:
                raise ValueError(f"`{name}` must be at most {_LARGEST_NUMBER:.0e} in size; got {value:.0e}.")
            most = _largest(name)
            if isinstance(value, int) and not isinstance(field.default, float) and abs(value) > most:
                raise ValueError(f"`{name}` must be at most {most:,}; got {value:,}, which no machine holds.")
            if name.endswith(_INITIAL) and value < 0:
                raise ValueError(f"`{name}` sets the spread of initial values and must not be negative; got {value}.")
    width = config.hidden_size
    for name in _TABLES:
        rows = getattr(config, name, None)
        if isinstance(rows, int) and isinstance(width, int) and rows * width > _LARGEST_TABLE:
            raise ValueError(
                f"`{name}` ({rows:,}) times `hidden_size` ({width:,}) must be at most {_LARGEST_TABLE:,}: no machine holds "
                "such a table."
            )


def check_num_labels(num_labels: object) -> None:
    """Refuses numbers of labels for which Transformers would fail, or build tables of names without end; None passes."""
    if num_labels is None:
        return
    if not isinstance(num_labels, int) or isinstance(num_labels, bool):
        raise TypeError(f"`num_labels` must be an int; got {num_labels!r}.")
    if not 1 <= num_labels <= _WIDEST:
        raise ValueError(f"`num_labels` must lie between 1 and {_WIDEST:,}; got {num_labels:,}.")


def check_switch(name: str, value: object) -> None:
    """Refuses anything but a bool or None; for outputs of layers also a list of the layers to return."""
    is_choice = (
        name in OUTPUTS_OF_LAYERS and isinstance(value, (list, tuple)) and all(isinstance(i, int) for i in value)
    )
    if value is not None and not isinstance(value, int) and not is_choice:  # bool is one
        layers = ", or a list of the layers to return" if name in OUTPUTS_OF_LAYERS else ""
        raise TypeError(f"`{name}` must be True, False or None{layers}; got {described(value)}.")


def described(value: object) -> str:
    """Type of a value, and the value itself where it is short."""
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 else type(value).__name__
