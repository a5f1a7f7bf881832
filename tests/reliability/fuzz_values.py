"""Random and wrong values of single arguments."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

MASKS = ("none", "ones", "left", "right", "both", "gaps", "no_tokens", "one_row_empty")
POSITIONS = ("none", "none", "none", "count", "restart", "real", "negative")

_TENSOR = ("list", "string", "number", "object", "float32", "float64", "float16", "bool", "int8", "int32", "complex64")
_TENSOR += ("scalar", "unbatched", "extra_axis", "short", "long", "fewer_rows", "more_rows", "no_rows", "no_tokens")
_TENSOR += ("negative", "large", "nan", "zeros", "missing")
_SWITCH = ("string", "number", "list", "none", "tensor")
# Kinds of wrong values by argument; all others are tensors.
FAULTS: dict[str, tuple[str, ...]] = {
    "tensor": _TENSOR,
    "use_cache": _SWITCH,
    "output_hidden_states": _SWITCH,
    "output_attentions": _SWITCH,
    "output_activations": _SWITCH,
    "output_quantization": _SWITCH,
    "return_dict": _SWITCH,
    "logits_to_keep": (
        "string",
        "negative_number",
        "fraction",
        "list",
        "none",
        "bool",
        "indices_outside",
        "float_indices",
    ),
    "num_items_in_batch": ("string", "negative_number", "zero", "list", "bool", "nan_number", "vector"),
    "targets_per_source": ("string", "zero", "negative_number", "fraction", "two"),
    "past_key_values": ("string", "tuple", "list", "dynamic", "encoder_decoder", "empty", "other_rows", "other_model"),
    "encoder_outputs": ("string", "tensor", "empty_tuple", "tuple_of_none", "narrow", "more_rows", "ids", "no_tokens"),
}


def random_mask(kind: str, batch: int, length: int) -> torch.Tensor | None:
    """A padding mask (B, L) of int64: 1 at tokens. Of `left`, `right` and `both` every row keeps a token."""
    if kind == "none":
        return None
    places = torch.arange(length)
    first, last = torch.zeros(batch, 1), torch.full((batch, 1), float(length))
    if kind in ("left", "both"):
        first = torch.randint(length, (batch, 1))
    if kind in ("right", "both"):
        last = first + 1 + torch.floor(torch.rand(batch, 1) * (length - first))
    mask = ((places >= first) & (places < last)).long()
    if kind == "gaps":
        mask = torch.randint(2, (batch, length))
        mask[:, int(torch.randint(length, ()))] = 1
    elif kind == "no_tokens":
        mask = torch.zeros_like(mask)
    elif kind == "one_row_empty":
        mask[int(torch.randint(batch, ()))] = 0
    return mask


def random_positions(kind: str, mask: torch.Tensor | None, batch: int, past: int, length: int) -> torch.Tensor | None:
    """`position_ids` (B, L): counted, restarting, of the real tokens alone, or negative."""
    count = torch.arange(past, past + length).expand(batch, length)
    if kind == "count":
        return count[:1] if bool(torch.randint(2, ())) else count
    if kind == "restart":
        return (torch.arange(length) % int(torch.randint(1, length + 1, ()))).expand(batch, length)
    if kind == "real":
        return count if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
    if kind == "negative":
        return count - 3
    return None


def spoil_tensor(tensor: torch.Tensor, kind: str) -> Any:
    """A wrong value in place of a tensor with the batch first."""
    if kind == "float16" and tensor.is_floating_point():
        kind = "bool"  # half and single precision mix under autocast and in sharded models, so torch judges them
    if kind in ("float32", "float64", "float16", "bool", "int8", "int32", "complex64"):
        return tensor.to(getattr(torch, kind))
    rows = tensor if tensor.dim() else tensor[None]
    wrong: dict[str, Any] = {
        "list": tensor.tolist(),
        "string": "a text",
        "number": 3,
        "object": object(),
        "missing": None,
        "scalar": rows.flatten()[0],
        "unbatched": rows[0],
        "extra_axis": rows[None],
        "short": rows[:, :-1] if rows.dim() > 1 else rows[:-1],
        "long": torch.cat([rows, rows[:, :1]], 1) if rows.dim() > 1 else torch.cat([rows, rows[:1]]),
        "fewer_rows": rows[:-1] if len(rows) > 1 else torch.cat([rows, rows]),
        "more_rows": torch.cat([rows, rows[:1]]),
        "no_rows": rows[:0],
        "no_tokens": rows[:, :0] if rows.dim() > 1 else rows[:0],
        "negative": torch.full_like(rows, -7),
        "large": torch.full_like(rows, 10**6),
        "zeros": torch.zeros_like(rows),
    }
    if kind == "nan":
        spoiled = rows.double()
        spoiled[0] = torch.nan
        return spoiled
    return wrong[kind]


def wrong_switch(kind: str) -> Any:
    """Something in place of a bool."""
    return {"string": "no", "number": 7, "list": [], "none": None, "tensor": torch.ones(2)}[kind]


def wrong_number(name: str, kind: str) -> Any:
    """Something in place of `logits_to_keep` or `num_items_in_batch`."""
    values: dict[str, Any] = {
        "string": "1",
        "negative_number": -2,
        "fraction": 1.5,
        "zero": 0,
        "two": 2,
        "list": [1],
        "none": None,
        "bool": True,
        "nan_number": float("nan"),
        "vector": torch.tensor([1, 2, 3]),
        "indices_outside": torch.tensor([0, 10**6]),
        "float_indices": torch.tensor([0.0]),
    }
    return values[kind]


def wrong_cache(kind: str, own: Any, other: Any) -> Any:
    """Something in place of a cache; `own` is an empty one of the model, `other` one of another model or batch."""
    pair = (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    values: dict[str, Any] = {
        "string": "cache",
        "tuple": (pair, pair),
        "list": [1, 2],
        "dynamic": DynamicCache(),
        "encoder_decoder": EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "empty": own,
        "other_rows": other,
        "other_model": other,
    }
    return values[kind]


def wrong_encoder_outputs(kind: str, source: torch.Tensor) -> Any:
    """Something in place of the output (B, L, D) of the encoder."""
    values: dict[str, Any] = {
        "string": "states",
        "tensor": source,
        "empty_tuple": (),
        "tuple_of_none": (None,),
        "narrow": (source[..., :-1],),
        "more_rows": (torch.cat([source, source[:1]]),),
        "ids": (torch.ones(source.shape[:2], dtype=torch.long),),
        "no_tokens": (source[:, :0],),
    }
    return values[kind]
