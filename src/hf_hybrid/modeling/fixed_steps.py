"""Decoding steps of fixed shapes at fixed addresses, as graphs of a device need them: `generate` compiles them when asked.

A graph of CUDA replays the same kernels on the same memory. So the state of a generation, its mask and the keys of its
source lie in tensors that every step changes in place, and no shape depends on the number of tokens. A text is held by
its end: token n of N stands in the last of M slots, and slots in front of the first token are padding, which changes no
result. Keys of all tokens (full attention) move on by a slot in each step; states of constant size stay as they are.

Shapes: B rows, M slots, S slots of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import CompileConfig
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithCrossAttentions, Seq2SeqLMOutput
from transformers.utils import ModelOutput

from ..ops.branches import uses_cpu_form
from .cache import StateCache

LEAST_SLOTS = 64  # texts and sources have room in powers of two, so that few graphs serve texts of all lengths

_OPEN: ContextVar[list[FixedState] | None] = ContextVar("open_states", default=None)


class FixedTensors(NamedTuple):
    """What a step reads and, apart from the source, changes in place.

    Attributes:
        state: tensors of the cache by name, with room for M tokens where they keep all.
        mask: (B, M) bool, True at real tokens.
        moved: (1,) int64, slots by which a token stands further right than in a text that begins in the first slot.
        source: keys and values of the source by name, S tokens each; empty without an encoder.
        source_mask: (sources, S) bool, or None.
    """

    state: dict[str, torch.Tensor]
    mask: torch.Tensor
    moved: torch.Tensor
    source: dict[str, torch.Tensor]
    source_mask: torch.Tensor | None

    def all(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        named = {"mask": self.mask, "moved": self.moved, **self.state, **self.source}
        return named if self.source_mask is None else named | {"source_mask": self.source_mask}


def _own(cache: Any) -> StateCache:
    """The part of a cache that the steps change."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _stack(model: Any) -> Any:
    return model.get_decoder() if model.config.is_encoder_decoder else model.base_model


def next_step(
    model: Any, tokens: torch.Tensor, fixed: FixedTensors, targets_per_source: int = 1, **options: Any
) -> dict[str, Any]:
    """Reads the next token of every row, (B, 1), and writes the state after it into `fixed`.

    Returns:
        The outputs of the model by name, without its cache.
    """
    slots = fixed.mask.shape[1]
    fixed.mask.copy_(F.pad(fixed.mask[:, 1:], (0, 1), value=True))
    cache = _stack(model).build_cache()
    cache.fill({**fixed.state, **fixed.source}, slots - 1)
    own = _own(cache)
    own.hold_by_end(fixed.moved)
    prefix, arguments = "", options
    if model.config.is_encoder_decoder:
        # The encoder has run: keys and values are in the cache, and only the shape of its output is read.
        keys = next(iter(fixed.source.values()))
        states = torch.zeros((), dtype=model.dtype, device=tokens.device)
        states = states.expand(keys.shape[0], keys.shape[-2], model.config.hidden_size)
        prefix, arguments = "decoder_", {**options, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
        arguments |= {"attention_mask": fixed.source_mask, "targets_per_source": targets_per_source}
    arguments |= {f"{prefix}input_ids": tokens, f"{prefix}attention_mask": fixed.mask}
    outputs = model(**arguments, past_key_values=cache, use_cache=True, return_dict=True)
    for name, tensor in own.fitted(slots).items():
        fixed.state[name].copy_(tensor)
    fixed.moved.sub_(1)
    left_out = ("past_key_values", "encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions")
    return {name: value for name, value in outputs.items() if name not in left_out}


class FixedState:
    """Stands for the cache of a generation while its state lies in fixed tensors; `release` puts it back.

    Attributes:
        cache: the cache, with the state before the steps; None once it is released.
        fixed: the tensors.
        length: tokens so far, padding included.
    """

    is_compileable = True

    def __init__(self, cache: Any, fixed: FixedTensors, length: int) -> None:
        self.cache, self.fixed, self.length = cache, fixed, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the rows, of beams of the same source."""
        for tensor in (*self.fixed.state.values(), self.fixed.mask):
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def release(self) -> Any:
        """Gives away the cache, with the state after the last step, once; the fixed tensors are free for another text."""
        cache, self.cache = self.cache, None
        if cache is not None:
            _own(cache).take_fixed(self.fixed.state, self.length)
        return cache


@contextmanager
def released_states() -> Iterator[None]:
    """Context of a generation, at whose end its states are back in their caches."""
    states: list[FixedState] = []
    token = _OPEN.set(states)
    try:
        yield
    finally:
        _OPEN.reset(token)
        for state in states:
            state.release()


class FixedSteps:
    """The compiled step of a model, and the tensors of its last text, which the next one of the same shapes takes over.

    It belongs to one model: a copy of the model begins without.
    """

    def __init__(self) -> None:
        self._config: CompileConfig | None = None
        self._step: Callable[..., dict[str, Any]] = next_step
        self._last: FixedState | None = None
        self._lock = Lock()  # two threads may begin a text at the same time

    def __deepcopy__(self, memo: Any) -> FixedSteps:
        return FixedSteps()

    def __reduce__(self) -> tuple[type[FixedSteps], tuple[()]]:
        return FixedSteps, ()

    def compiled(self, config: CompileConfig | None) -> FixedSteps:
        """These steps, compiled as `config` says; None: not compiled."""
        if config is None:
            self._step = next_step
        elif config != self._config or self._step is next_step:
            options = config.to_dict()
            # Shapes stay the same: a graph for each set of them, not one whose kernels take sizes.
            options["dynamic"] = False if options["dynamic"] is None else options["dynamic"]
            self._step = torch.compile(next_step, **options)
        self._config = config
        return self

    def __call__(self, model: Any, past_key_values: Any, **inputs: Any) -> ModelOutput:
        """A call of the model in a generation: one token with a state, or else a piece of a prompt, which is not compiled."""
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        tokens = inputs.get(f"{prefix}input_ids")
        if not isinstance(past_key_values, FixedState):
            if tokens is None or tokens.shape[1] != 1 or past_key_values.get_seq_length() == 0:
                return model(past_key_values=past_key_values, **inputs)
            past_key_values = self._fix(model, past_key_values, inputs, len(tokens))
        state = past_key_values
        limit = model.config.max_target_length()
        if _slots_for(state.length, limit) > state.fixed.mask.shape[1]:  # more tokens than were announced
            state = self._fix(model, state.release(), inputs, len(tokens))
        ignored = ("input_ids", "attention_mask", "encoder_outputs", "position_ids", "use_cache", "return_dict")
        options = {
            name: value
            for name, value in inputs.items()
            if value is not None and name.removeprefix("decoder_") not in ignored
        }
        if model.config.is_encoder_decoder:
            options.pop("token_type_ids", None)  # of the source
        with torch.no_grad():
            if not uses_cpu_form(tokens):
                torch.compiler.cudagraph_mark_step_begin()
            found = self._step(model, tokens, state.fixed, **options)
        state.length += 1
        kind = Seq2SeqLMOutput if model.config.is_encoder_decoder else CausalLMOutputWithCrossAttentions
        found = {name: _copied(value) for name, value in found.items() if name in kind.__dataclass_fields__}
        return kind(**found, past_key_values=state)

    # ---------------------------------------------------------------------------------------------------- beginnings

    def _fix(self, model: Any, cache: Any, inputs: Mapping[str, Any], rows: int) -> FixedState:
        """The state of a cache in fixed tensors: those of the last text if they fit and no other generation uses them."""
        tensors = _fixed_tensors(model, cache, inputs, rows)
        length = _own(cache).get_seq_length()
        with self._lock:
            last = self._last
            if last is not None and last.cache is None and _same_shapes(last.fixed, tensors):
                for name, tensor in last.fixed.all().items():
                    tensor.copy_(tensors.all()[name])
                tensors = last.fixed
            else:
                with torch.inference_mode(False):
                    tensors = _at_own_addresses(tensors)
            state = self._last = FixedState(cache, tensors, length)
        states = _OPEN.get()
        if states is not None:
            states.append(state)
        return state


def _copied(value: Any) -> Any:
    """A value of the outputs in memory of its own: the next step overwrites that of a graph."""
    if isinstance(value, tuple):
        return tuple(_copied(part) for part in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def _slots_for(past: int, limit: int | None, announced: int = 0) -> int:
    """Slots for a text that goes on after `past` tokens; one is left, because the oldest token in a full row is lost."""
    slots = max(LEAST_SLOTS, 1 << (max(past + 2, announced) - 1).bit_length())
    return slots if limit is None else max(past + 1, min(slots, limit))


def _fixed_tensors(model: Any, cache: Any, inputs: Mapping[str, Any], rows: int) -> FixedTensors:
    """The tensors of a text that goes on from a cache, not yet at addresses of their own."""
    own, config = _own(cache), model.config
    past, prefix = own.get_seq_length(), "decoder_" if config.is_encoder_decoder else ""
    slots = _slots_for(past, config.max_target_length(), own.announced or 0)
    given = inputs.get(f"{prefix}attention_mask")
    device = model.device
    mask = torch.ones(rows, past, dtype=torch.bool, device=device) if given is None else given[:, :past].bool()
    if own.begins is not None:
        mask = mask & (torch.arange(past, device=device) >= own.begins.to(device).unsqueeze(-1))
    source: dict[str, torch.Tensor] = {}
    source_mask = None
    if config.is_encoder_decoder:
        held = cache.tensors()
        source = {name: held[name] for name in cache.source_axes}
        sources, _, size = (next(iter(source.values())).shape[axis] for axis in (0, 1, -2))
        more = _slots_for(size - 1, config.max_source_length()) - size
        given = inputs.get("attention_mask")
        source_mask = torch.ones(sources, size, dtype=torch.bool, device=device) if given is None else given.bool()
        source_mask = F.pad(source_mask, (0, more))
        source = {name: F.pad(tensor, (0, 0, 0, more)).contiguous() for name, tensor in source.items()}
    moved = torch.full((1,), slots - 1 - past, device=device)
    return FixedTensors(own.fitted(slots), F.pad(mask, (slots - past, 0)), moved, source, source_mask)


def _same_shapes(first: FixedTensors, second: FixedTensors) -> bool:
    one, other = first.all(), second.all()
    return one.keys() == other.keys() and all(
        tensor.shape == other[name].shape and tensor.dtype == other[name].dtype and tensor.device == other[name].device
        for name, tensor in one.items()
    )


def _at_own_addresses(tensors: FixedTensors) -> FixedTensors:
    """Copies that compiled graphs read and change where they lie."""

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        torch._dynamo.mark_static_address(copy, guard=False)
        return copy

    state, mask, moved, source, source_mask = tensors
    return FixedTensors(
        {name: placed(tensor) for name, tensor in state.items()},
        placed(mask),
        placed(moved),
        {name: placed(tensor) for name, tensor in source.items()},
        None if source_mask is None else placed(source_mask),
    )


def has_own_state(cache: Cache | FixedState | None) -> bool:
    """Whether the steps of a generation with this cache can have fixed shapes."""
    return isinstance(cache, (StateCache, FixedState)) or (
        isinstance(cache, EncoderDecoderCache) and isinstance(cache.self_attention_cache, StateCache)
    )


def announce_length(cache: Any, ids: torch.Tensor, model_kwargs: Mapping[str, Any], max_length: int) -> None:
    """Tells a cache for how many tokens a generation needs room: those of its prompt, cached ones included, and the new ones.

    Args:
        cache: the cache of the generation; nothing happens if it has no state of its own.
        ids: (B, n) the ids that `generate` begins with: of the whole prompt, or of a continued text only those that the cache
            does not hold, or none if the prompt is embedded.
        model_kwargs: the other arguments of the model; embeddings, or else the mask, cover the whole prompt.
        max_length: n and the new tokens.
    """
    if not has_own_state(cache):
        return
    own = _own(cache)
    embeds = model_kwargs.get("inputs_embeds") if own is cache else None  # of a source otherwise
    mask = model_kwargs.get("attention_mask" if own is cache else "decoder_attention_mask")
    given = ids if mask is None else mask
    prompt = given.shape[1] if embeds is None else embeds.shape[1]
    own.announced = prompt + max_length - ids.shape[1]
