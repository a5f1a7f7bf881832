"""Types of the arguments of forward passes, checked before anything is computed with them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ..configuration.checks import check_switch, described
from .cache import is_cache

ForwardMethod = TypeVar("ForwardMethod", bound=Callable[..., Any])

_IDS = ("input_ids", "decoder_input_ids", "pair_input_ids")  # their integers are checked with the vocabulary
_INTEGERS = ("position_ids", "token_type_ids", "start_positions", "end_positions", "shift_labels")
_MASKS = ("attention_mask", "decoder_attention_mask", "pair_attention_mask", "encoder_attention_mask")
_VALUES = ("input_values", "pixel_values")
_NUMBERS = ("inputs_embeds", "decoder_inputs_embeds", "pair_inputs_embeds", "encoder_hidden_states", *_VALUES)
_TENSORS = (*_IDS, *_INTEGERS, *_MASKS, *_NUMBERS, "labels")
_SWITCHES = ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_activations")
_SWITCHES += ("output_quantization", "skip_logits")
_CHECKED = frozenset((*_TENSORS, *_SWITCHES, "past_key_values", "targets_per_source"))


def checks_types(forward: ForwardMethod) -> ForwardMethod:
    """Checks the types of the arguments of a forward pass, those in `**kwargs` included; outside compiled graphs.

    Raises:
        TypeError: a list, an array or a text instead of a tensor, anything but a cache as `past_key_values`, anything but a bool
            as a switch.
        ValueError: a tensor of another kind of numbers than the argument holds, or of float64 for a model of another precision.
    """
    names = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            check_types(self, {**dict(zip(names, args)), **kwargs})
        return forward(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


def check_types(model: Any, arguments: Mapping[str, Any]) -> None:
    """Checks the types of arguments of the forward pass of a model, by their names; raises what `checks_types` does."""
    for name, value in arguments.items():
        if value is not None and name in _CHECKED:
            _check_type(name, value, model)


def _check_type(name: str, value: Any, model: Any) -> None:
    if name == "targets_per_source":
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a number of rows, at least 1; got {described(value)}.")
    elif name in _SWITCHES:
        check_switch(name, value)
    elif name == "past_key_values":
        if not is_cache(value):
            raise TypeError(
                f"`past_key_values` must be a cache that an earlier call returned, or None; got {described(value)}."
            )
    elif not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor; got {described(value)}. Convert it (`torch.as_tensor`).")
    elif name in _INTEGERS and value.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`{name}` must hold integers of type int64 or int32; got {value.dtype}.")
    elif name in _NUMBERS:
        _check_precision(name, value, model)
    elif value.is_complex():
        raise ValueError(f"`{name}` must hold real numbers; got {value.dtype}.")


def _check_precision(name: str, value: torch.Tensor, model: Any) -> None:
    """Half and single precision mix under autocast and in sharded models; float64 comes from arrays that nobody converted."""
    if not value.is_floating_point():
        raise ValueError(f"`{name}` must hold floating-point numbers; got {value.dtype}.")
    is_double, in_double = value.dtype == torch.float64, model.dtype == torch.float64
    # Pixels and samples come in float32 from their processors, and a model of higher precision takes them.
    if value.is_meta or is_double == in_double or (in_double and name in _VALUES):
        return
    raise ValueError(
        f"`{name}` is of type {value.dtype}, but the model computes in {model.dtype}: convert one of them "
        f"(`{name}.to(model.dtype)`)."
    )
