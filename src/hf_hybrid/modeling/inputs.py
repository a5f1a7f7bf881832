"""Checks and small computations on model inputs that several architectures share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, logging

from ..ops.branches import can_read_values
from .cache import StateCache

logger = logging.get_logger(__name__)


def check_inputs(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    vocab_size: int | None,
    *,
    hidden_size: int | None = None,
    cache: Cache | None = None,
    allows_gaps: bool = False,
    prefix: str = "",
) -> torch.Tensor | None:
    """Checks the inputs of a forward pass and returns the padding mask as booleans.

    Args:
        input_ids: (B, L) int, or None with `inputs_embeds` (B, L, D).
        attention_mask: (B, past + L), nonzero at real tokens, or None.
        vocab_size: ids must be smaller; checked on the CPU only, where it costs no synchronisation. None: not checked.
        hidden_size: width that `inputs_embeds` must have. None: not checked.
        cache: cache that the call continues, of `past` tokens.
        allows_gaps: whether cached padding may follow real tokens, because it changes nothing there.
        prefix: prepended to the argument names in messages ("decoder_").

    Returns:
        The mask as bool, or None; with a cache in which rows begin later (`reset_rows`), False before that place.

    Raises:
        ValueError: both or neither input, an empty one, ids outside the vocabulary or of a wrong type, embeddings of the wrong
            width, a mask of the wrong shape, a cache of other rows, or of rows that were padded on the right.
    """
    if (input_ids is None) == (inputs_embeds is None):
        remedy = " `model.get_encoder()` gives the states of the source alone." if prefix else ""
        raise ValueError(f"Pass exactly one of `{prefix}input_ids` and `{prefix}inputs_embeds`.{remedy}")
    inputs = input_ids if input_ids is not None else inputs_embeds
    name = f"{prefix}input_ids" if input_ids is not None else f"{prefix}inputs_embeds"
    expected_dims = 2 if input_ids is not None else 3
    if inputs.dim() != expected_dims:
        raise ValueError(
            f"`{name}` must have {expected_dims} dimensions (batch first); got shape {tuple(inputs.shape)}."
        )
    batch, length = inputs.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"`{name}` is empty (shape {tuple(inputs.shape)}): pass at least one row of one token.")
    if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`{name}` must hold token ids of type int64 or int32; got {input_ids.dtype}.")
    if input_ids is not None and vocab_size is not None:
        _check_ids(input_ids, vocab_size, name)
    if inputs_embeds is not None and hidden_size is not None and inputs_embeds.shape[2] != hidden_size:
        raise ValueError(f"`{name}` must be {hidden_size} wide, as the model is; got shape {tuple(inputs.shape)}.")
    past = 0 if cache is None else cache.get_seq_length()
    begins = None
    if isinstance(cache, StateCache):
        cache.check_rows(batch)
        begins = cache.begins
    own = None
    if begins is not None and (cache.masks_past or attention_mask is not None):
        own = torch.arange(past + length, device=inputs.device) >= begins.to(inputs.device).unsqueeze(-1)
    if attention_mask is None:
        return own
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] != past + length:
        cached = f" ({past} of them cached)" if past else ""
        raise ValueError(
            f"`{prefix}attention_mask` has shape {tuple(attention_mask.shape)}, but `{name}` needs {(batch, past + length)}: "
            f"one entry per token{cached}, 1 for real tokens and 0 for padding."
        )
    mask = attention_mask.to(device=inputs.device, dtype=torch.bool)
    mask = mask if own is None else mask & own
    if not allows_gaps:
        _check_gaps(mask, past, f"{prefix}attention_mask")
    return mask


def check_values(
    input_values: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    *,
    hidden_size: int,
    cache: Cache | None = None,
) -> torch.Tensor | None:
    """Checks a sequence of real numbers (B, L), or its embeddings, and returns the padding mask as booleans.

    Raises:
        ValueError: both or neither input, another number of dimensions, an empty one, numbers that are not floats, a
            mask of the wrong shape.
    """
    if (input_values is None) == (inputs_embeds is None):
        raise ValueError(
            "Pass exactly one of `input_values` and `inputs_embeds`: this model reads real numbers (`input_type='values'`)."
        )
    if input_values is not None and (input_values.dim() != 2 or not input_values.is_floating_point()):
        raise ValueError(
            f"`input_values` must be real numbers (batch, length); got {input_values.dtype} of shape "
            f"{tuple(input_values.shape)}. Scale and flatten the data first."
        )
    if input_values is not None and input_values.numel() == 0:
        raise ValueError(
            f"`input_values` is empty (shape {tuple(input_values.shape)}): pass at least one row of one number."
        )
    values = input_values.unsqueeze(-1) if input_values is not None else inputs_embeds
    width = hidden_size if input_values is None else None
    return check_inputs(None, values, attention_mask, None, hidden_size=width, cache=cache)


class SequenceInputs(NamedTuple):
    """Checked inputs of a stack.

    Attributes:
        values: (B, L) ids, or real numbers, or None with embeddings.
        mask: (B, past + L) bool, True at real tokens; None without padding.
        leading: (B,) padding in front of each row; None without any.
        batch, length: B and L.
    """

    values: torch.Tensor | None
    mask: torch.Tensor | None
    leading: torch.Tensor | None
    batch: int
    length: int


def read_inputs(
    config: PreTrainedConfig,
    input_ids: torch.Tensor | None,
    input_values: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    *,
    width: int,
    cache: Cache | None = None,
) -> SequenceInputs:
    """Checks the inputs of a stack that reads token ids, or real numbers with `config.input_type` "values".

    Args:
        config: configuration with `input_type` and `vocab_size`.
        input_ids, input_values: (B, L); or `inputs_embeds` (B, L, width).
        attention_mask: (B, past + L), nonzero at real tokens, or None.
        width: width of embeddings.
        cache: cache that the call continues.

    Raises:
        ValueError: see `check_inputs` and `check_values`.
    """
    if config.input_type == "values":
        values = input_values
        mask = check_values(input_values, inputs_embeds, attention_mask, hidden_size=width, cache=cache)
    else:
        values = input_ids
        mask = check_inputs(
            input_ids, inputs_embeds, attention_mask, config.vocab_size, hidden_size=width, cache=cache
        )
    batch, length = (values if inputs_embeds is None else inputs_embeds).shape[:2]
    return SequenceInputs(values, *simplify_mask(mask), batch, length)


def check_source_rows(targets: int, sources: int, targets_per_source: int) -> None:
    """Raises ValueError unless the target has `targets_per_source` rows for each row of the encoder output."""
    if targets == sources * targets_per_source:
        return
    if targets_per_source == 1:
        raise ValueError(
            f"`decoder_input_ids` (or `decoder_inputs_embeds`) has {targets} rows but the encoder output has {sources}; both must share the batch dimension. "
            "(Several targets of each source in succession: `targets_per_source`.)"
        )
    raise ValueError(
        f"`decoder_input_ids` (or `decoder_inputs_embeds`) has {targets} rows but the encoder output has {sources}, and `targets_per_source` is "
        f"{targets_per_source}: pass {sources * targets_per_source} rows, or another `targets_per_source`."
    )


def kept_positions(logits_to_keep: int | torch.Tensor, length: int) -> slice | torch.Tensor:
    """Index of the positions of a text of `length` tokens whose logits are wanted: the last k (0: all), or the given ones.

    Raises:
        TypeError: neither an int nor a tensor.
        ValueError: a negative number, or indices of another type or outside of the text.
    """
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be a number of last tokens, or 0 for all; got {logits_to_keep}.")
        return slice(-logits_to_keep, None)
    if not isinstance(logits_to_keep, torch.Tensor):
        raise TypeError(
            f"`logits_to_keep` must be an int or a tensor of indices; got {type(logits_to_keep).__name__}."
        )
    indices = logits_to_keep
    if indices.dim() != 1 or indices.is_floating_point() or indices.is_complex():
        raise ValueError(
            f"`logits_to_keep` must be one axis of integer indices; got {indices.dtype} of shape {tuple(indices.shape)}."
        )
    if can_read_values(indices) and indices.numel() and (int(indices.max()) >= length or int(indices.min()) < -length):
        raise ValueError(
            f"`logits_to_keep` names positions outside of the {length} tokens of the input: {indices.tolist()}."
        )
    return indices


def read_encoder_outputs(encoder_outputs: Any, hidden_size: int) -> BaseModelOutput:
    """The output of an encoder that the caller has run, or a tuple that begins with its states (B, L, `hidden_size`).

    Raises:
        TypeError: anything else.
        ValueError: states of another shape.
    """
    is_read = isinstance(encoder_outputs, (ModelOutput, tuple, list)) and len(encoder_outputs) > 0
    states = encoder_outputs[0] if is_read else None
    if not isinstance(states, torch.Tensor):
        raise TypeError(
            "`encoder_outputs` must be what the encoder returned, or a tuple that begins with its states; got "
            f"{type(encoder_outputs).__name__}."
        )
    if states.dim() != 3 or states.shape[2] != hidden_size or not states.is_floating_point():
        raise ValueError(
            f"`encoder_outputs` must begin with states (batch, length, {hidden_size}); got {states.dtype} of shape "
            f"{tuple(states.shape)}."
        )
    if isinstance(encoder_outputs, BaseModelOutput):
        return encoder_outputs
    if isinstance(encoder_outputs, ModelOutput):
        return BaseModelOutput(last_hidden_state=states)
    return BaseModelOutput(*encoder_outputs[:3])


def check_pair(has_pair: bool, dual_encoder: bool) -> None:
    """Raises ValueError for a pair of texts where a classifier reads single texts, or the reverse."""
    if has_pair != dual_encoder:
        raise ValueError(
            "This model classifies pairs (`dual_encoder=True`): pass `pair_input_ids`, and `pair_attention_mask` if padded."
            if dual_encoder
            else "This model classifies single texts (`dual_encoder=False`): leave `pair_input_ids` unset."
        )


def check_pair_rows(first: torch.Tensor, second: torch.Tensor) -> None:
    """Raises ValueError unless both texts of the pairs have the same number of rows."""
    if second.shape[0] != first.shape[0]:
        raise ValueError(
            f"`pair_input_ids` has {second.shape[0]} rows but `input_ids` has {first.shape[0]}; both must share the "
            "batch dimension."
        )


def flatten_choices(
    texts: dict[str, torch.Tensor | None], shape: tuple[int, int, int]
) -> dict[str, torch.Tensor | None]:
    """Tensors (batch, choices, length, ...) by argument as rows (batch * choices, length, ...).

    Raises:
        ValueError: a tensor of another shape than `shape` (batch, choices, length).
    """
    for name, text in texts.items():
        if text is not None and tuple(text.shape[:3]) != shape:
            raise ValueError(
                f"`{name}` must have the shape {shape} (batch, choices, length); got {tuple(text.shape)}."
            )
    return {name: None if text is None else text.flatten(0, 1) for name, text in texts.items()}


def value_outside(values: torch.Tensor, count: int) -> int | None:
    """A value below 0 or not below `count`, or None; reads the values."""
    if not values.numel():
        return None
    lowest, highest = (int(value) for value in torch.aminmax(values))
    return lowest if lowest < 0 else highest if highest >= count else None


def check_token_types(token_type_ids: torch.Tensor, shape: tuple[int, int], num_types: int) -> None:
    """Raises ValueError for token types of another shape than the tokens, or outside the types; values are read on the CPU only."""
    if tuple(token_type_ids.shape) != shape:
        raise ValueError(
            f"`token_type_ids` must have the shape {shape} of the tokens; got {tuple(token_type_ids.shape)}."
        )
    if can_read_values(token_type_ids) and (wrong := value_outside(token_type_ids, num_types)) is not None:
        raise ValueError(
            f"`token_type_ids` contain {wrong}; accepted are 0 to {num_types - 1} (`type_vocab_size` = {num_types})."
        )


def flatten_pixels(pixel_values: torch.Tensor, size: int | None) -> torch.Tensor:
    """Grey images (B, 1, H, W), (B, H, W) or (B, H * W) as (B, H * W), row by row.

    Raises:
        ValueError: another number of dimensions, several channels, or images that are not `size` by `size` (None: any).
    """
    shape = tuple(pixel_values.shape)
    is_image = len(shape) == 3 or (len(shape) == 4 and shape[1] == 1)
    if not (is_image or len(shape) == 2):
        raise ValueError(
            f"`pixel_values` must be grey images (batch, 1, height, width) or their pixels (batch, height * width); got "
            f"{shape}."
        )
    if size is not None and (shape[-2:] != (size, size) if is_image else shape[1] != size * size):
        raise ValueError(
            f"`pixel_values` must be images of {size} by {size} pixels (`image_size`); got shape {shape}. Resize them, as "
            "PixelSequenceImageProcessor does."
        )
    return pixel_values.flatten(1)


def note_missing_attentions(stack: Any, options: Any) -> None:
    """Warns once if the call or the configuration requests `output_attentions` and the stack has none to return.

    Args:
        stack: the model; if `_can_record_outputs` names attentions, it returns those of eager attention.
        options: keywords of the call.
    """
    wanted = options.get("output_attentions")
    if not (getattr(stack.config, "output_attentions", False) if wanted is None else wanted):
        return
    if "attentions" not in stack._can_record_outputs:
        logger.warning_once(
            f"{type(stack).__name__} returns no attention weights: it computes attention block by block, without them."
        )
    elif stack.config._attn_implementation != "eager":
        logger.warning_once(
            f"{type(stack).__name__} returns attention weights only after `model.set_attn_implementation('eager')`; now it uses "
            f"{stack.config._attn_implementation!r}."
        )


def _check_gaps(mask: torch.Tensor, past: int, name: str) -> None:
    """Raises ValueError for padding after a real token among the first `past` ones; not checked on accelerators."""
    if can_read_values(mask) and past > 1 and bool((mask[:, : past - 1] & ~mask[:, 1:past]).any()):
        raise ValueError(
            f"`{name}` has padding behind real tokens of earlier calls: the state went on through it, so the cache of a text that was "
            "padded on the right cannot be continued. Pad on the left, or run the rows on their own. (Without an attention mask "
            "`generate` masks every padding token of the prompt: pass one of ones where the text itself has that token.)"
        )


def _check_ids(input_ids: torch.Tensor, vocab_size: int, name: str) -> None:
    if can_read_values(input_ids) and (wrong := value_outside(input_ids, vocab_size)) is not None:
        raise ValueError(
            f"`{name}` contains the id {wrong}, outside the vocabulary of {vocab_size} tokens (0 to {vocab_size - 1}). "
            "Tokenizer and model must belong together; a larger tokenizer needs `model.resize_token_embeddings`."
        )


def logical_positions(mask: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor:
    """Position of each token among the real tokens of its row: (B, length), or (1, length) without mask.

    Padding before the first real token has position -1.
    """
    if mask is None:
        return torch.arange(length, device=device).unsqueeze(0)
    return mask.long().cumsum(-1) - 1


def leading_padding(mask: torch.Tensor) -> torch.Tensor:
    """Padded positions in front of the first real token of each row: (B, L) bool to (B,); 0 for a row without any."""
    return (mask.long().cumsum(-1) == 0).sum(-1) % mask.shape[-1]


def simplify_mask(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A padding mask and the leading padding of its rows, each None where there is no such padding.

    Where values may be read (`can_read_values`), a mask without padding becomes None, and without leading padding the
    second result does. On accelerators the host does not wait for them: without a mask everything is simplest.

    Args:
        mask: (B, L) bool, True at real tokens, or None.

    Returns:
        (B, L) bool or None, and (B,) int or None.
    """
    if mask is None:
        return None, None
    if can_read_values(mask):
        if bool(mask.all()):
            return None, None
        if bool(mask[:, 0].all()):
            return mask, None
    return mask, leading_padding(mask)


def pool_tokens(hidden_states: torch.Tensor, mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """One vector per row from its real tokens: their mean, the first or the last of them.

    Args:
        hidden_states: (B, L, D).
        mask: (B, L), nonzero at real tokens, or None. A row without real tokens gives zeros ("mean") or its first token.
        pooling: "mean", "first" or "last".

    Returns:
        (B, D).
    """
    batch, length, _ = hidden_states.shape
    if mask is None:
        mask = hidden_states.new_ones(batch, length, dtype=torch.bool)
    mask = mask.to(hidden_states.device)  # the last layer may lie on another device than the inputs
    if pooling == "mean":
        weights = mask.bool().to(hidden_states.dtype).unsqueeze(-1)
        return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
    places = torch.arange(length, device=hidden_states.device)
    if pooling == "first":
        rows = torch.where(mask.bool(), places, length - 1).amin(-1)
    elif pooling == "last":
        rows = torch.where(mask.bool(), places, 0).amax(-1)
    else:
        raise ValueError(f"`pooling` must be 'mean', 'first' or 'last'; got {pooling!r}.")
    return hidden_states[torch.arange(batch, device=hidden_states.device), rows]


def pool_last_tokens(
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pad_token_id: int | None,
) -> torch.Tensor:
    """The last real token of each row, as classifiers of causal models read it.

    Args:
        hidden_states: (B, L, D).
        input_ids: (B, L) or None; without mask, `pad_token_id` among them is padding.
        attention_mask: (B, past + L) or None.
        pad_token_id: None for no padding token.

    Returns:
        (B, D).
    """
    mask = None
    if attention_mask is not None:
        mask = attention_mask[:, -hidden_states.shape[1] :]
    elif input_ids is not None and pad_token_id is not None:
        mask = input_ids != pad_token_id
    return pool_tokens(hidden_states, mask, "last")
