"""What a model keeps of a text between calls: the base of its cache layers, and their container.

Each architecture has its own layer class, in a file beside its model. Stacks use caches through `call_cache` alone; the
modules of a block read and set the attributes of their layer object. Nothing else touches the cache classes of
Transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..layers.kept_results import KeptResults

SURPLUS_TOKENS = 4096  # past tokens that no row sees any more are dropped once there are this many


class StateLayer(CacheLayerMixin):
    """State of one layer of a model: tensors with the batch first, the state of a recurrence, and a count of tokens.

    Attributes:
        state: state of the recurrence, a tensor or a tuple of tensors, batch first; None before the first call.
        begins: (B,) place at which the text of each row begins; None while it is 0.
        kept: results computed from the weights alone, for the steps of this generation.
        layout: settings of the model that made the cache, which the model that continues it must share.
        cumulative_length: tokens so far, padding included.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False
    description = "a recurrent state"  # what the layers of the model hold, for messages
    batch_tensors: tuple[str, ...] = (
        "keys",
        "values",
        "begins",
    )  # attributes that hold tensors, or None, beside the state
    token_axes: Mapping[str, int] = {}  # token axis of those with a place for each kept token
    source_axes: Mapping[str, int] = {}  # token axis of those with a place for each token of the encoder
    begins: torch.Tensor | None = None
    masks_past = False  # whether tokens before `begins` are still there and have to be masked
    training_obstacle: str | None = None  # why the state cannot be carried from one training step to the next
    has_fixed_shapes = False  # whether tensors have places for all tokens that are to come

    def __init__(self, layout: Mapping[str, Any]) -> None:
        super().__init__()
        self.layout = layout
        self._clear()

    def _clear(self) -> None:
        for name in self.batch_tensors:
            setattr(self, name, None)
        self.state: Any = None
        self.cumulative_length = 0
        self.is_initialized = False
        self.kept: KeptResults = {}

    # ------------------------------------------------------------------------------------------ what it answers

    @property
    def kept_tokens(self) -> int | None:
        """Largest number of tokens that the state keeps; None when it keeps all."""
        return None

    @property
    def num_rows(self) -> int | None:
        """Rows of the batch; None before the first call."""
        held = (getattr(self, name) for name in self.batch_tensors)
        return next((tensor.shape[0] for tensor in held if tensor is not None), None)

    def check_rows(self, batch: int) -> None:
        """Raises ValueError unless the call has as many rows as the state."""
        if self.num_rows not in (None, batch):
            raise ValueError(
                f"The input has {batch} rows but `past_key_values` holds {self.num_rows}: continue the batch that made the "
                "cache."
            )

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Everything that `fill` needs to go on from here, by name."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        states = {"state" if part == 0 else f"state_{part}": tensor for part, tensor in enumerate(parts)}
        return {name: getattr(self, name) for name in self.batch_tensors} | states

    def counters(self) -> dict[str, int]:
        """The numbers beside the tensors that a saved state needs."""
        return {"length": self.cumulative_length}

    # ------------------------------------------------------------------------------------------- what changes it

    def count(self, length: int, real: torch.Tensor | None = None) -> None:
        """Counts the tokens of a call, `length` of them; `real` (B,) without padding, or None where all are."""
        self.cumulative_length += length
        self.is_initialized = True

    def fill(self, tensors: Mapping[str, torch.Tensor], past: int) -> None:
        """Takes over the `tensors` of another layer, after `past` tokens."""
        for name in self.batch_tensors:
            setattr(self, name, tensors.get(name))
        self.state = (tensors["state"], tensors["state_1"]) if "state_1" in tensors else tensors.get("state")
        self.cumulative_length, self.is_initialized = past, True

    def restore(self, counters: Mapping[str, int]) -> None:
        """Takes over the `counters` of a saved layer, after `fill`."""
        self.cumulative_length = counters["length"]

    def hold_by_end(self) -> None:
        """Says, after `fill`, that all tensors have room for the tokens to come."""
        self.has_fixed_shapes = True

    def fitted(self, slots: int) -> dict[str, torch.Tensor]:
        """The tensors that a token changes, by name, with the shapes that they have in texts of at most `slots` tokens."""
        left_out = {"begins", *self.source_axes}
        return {name: t for name, t in self.tensors().items() if t is not None and name not in left_out}

    def take_fixed(self, tensors: Mapping[str, torch.Tensor], length: int) -> None:
        """Takes over copies of `fitted` tensors after `length` tokens; the source, and where rows begin, stay."""
        held = {name: tensor for name, tensor in self.tensors().items() if tensor is not None}
        self.fill(held | self._unfitted(tensors, length), length)

    def _unfitted(self, tensors: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def detach(self) -> None:
        """Cuts the state off the graph that made it: the next segment of a text gets no gradient into this one."""
        self._map(torch.Tensor.detach)
        self._map_source(torch.Tensor.detach)

    def reset_rows(self, rows: torch.Tensor) -> None:
        """Begins a new text in the rows (B,) bool, as if everything before were padding; the others go on."""
        if self.num_rows is None:
            return
        begins = torch.zeros_like(rows, dtype=torch.long) if self.begins is None else self.begins
        self._map(lambda tensor: zeroed(tensor, rows))
        self.begins = begins.masked_fill(rows.to(begins.device), self.cumulative_length)

    def drop_past(self, tokens: int) -> None:
        """Drops the first tokens, which no row sees any more, if the layer keeps them."""

    def reset(self) -> None:
        self._clear()

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies an operation along the batch to every tensor, except those of the source."""
        for name in self.batch_tensors:
            tensor = None if name in self.source_axes else getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))
        if isinstance(self.state, tuple):
            self.state = tuple(change(tensor) for tensor in self.state)
        elif self.state is not None:
            self.state = change(self.state)

    def _map_source(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies an operation along the batch to the tensors of the source, which have a row for each source only."""
        for name in self.source_axes:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else change(tensor))

    def _select_sources(self, indices: torch.Tensor) -> None:
        rows = self.num_rows
        if rows is not None:
            self._map_source(lambda tensor: select_sources(tensor, indices, rows))

    def reorder_targets(self, beam_idx: torch.Tensor) -> None:
        """`reorder_cache` for beams (B,), each of which takes the place of one with the same source: that one stays."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    # -------------------------------------------------------------------------------- the interface of Transformers

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its name in earlier versions of Transformers."""
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select_sources(beam_idx)
        self.reorder_targets(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))  # the copies share the source

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select_sources(indices)
        self._map(lambda tensor: tensor[indices.to(tensor.device), ...])

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: the tensors come with the first call."""

    def _refuse(self, operation: str, remedy: str) -> NoReturn:
        raise NotImplementedError(f"The cache of {self.description} cannot be {operation}: {remedy}.")

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._refuse("updated with keys and values", "the layers of the model set its attributes")

    def offload(self) -> None:
        self._refuse("offloaded", "leave `cache_implementation` unset")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            self._refuse(
                "cropped", "a recurrent state cannot be rolled back; keep a copy (`copy.deepcopy`) to return to"
            )


def zeroed(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A tensor (B, ...) with zeros in the rows (B,) bool."""
    return tensor.masked_fill(rows.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), 0)


def select_sources(source: torch.Tensor, indices: torch.Tensor, num_targets: int) -> torch.Tensor:
    """Sources of selected targets: of (S, ...) those that the `indices` among `num_targets` rows, in groups of S, read."""
    rows = torch.arange(num_targets, device=source.device)[indices.to(source.device)]
    return source[torch.div(rows, num_targets // source.shape[0], rounding_mode="floor")]


def is_cache(value: object) -> bool:
    """Whether a value is a cache, of this library or of Transformers."""
    return isinstance(value, Cache)


class StateCache(Cache):
    """The layers of a model, one for each of its blocks.

    Attributes:
        announced: tokens that a generation will have at most; None outside of one.
        moved: (1,) by how many places the text stands further right than `get_seq_length` says, where it is held by
            its end (`fixed_steps`); None elsewhere.
    """

    def __init__(self, layers: Sequence[StateLayer]) -> None:  # not a generator, which compiled graphs cannot hand out
        super().__init__(layers=list(layers))
        self.announced: int | None = None
        self.moved: torch.Tensor | None = None

    @property
    def kept_tokens(self) -> int | None:
        """See `StateLayer.kept_tokens`."""
        return self.layers[0].kept_tokens

    @property
    def training_obstacle(self) -> str | None:
        """See `StateLayer`."""
        return self.layers[0].training_obstacle

    @property
    def begins(self) -> torch.Tensor | None:
        """See `StateLayer`."""
        return self.layers[0].begins

    @property
    def masks_past(self) -> bool:
        """See `StateLayer`."""
        return self.layers[0].masks_past

    def check_rows(self, batch: int) -> None:
        """See `StateLayer.check_rows`."""
        self.layers[0].check_rows(batch)

    def count(self, length: int, mask: torch.Tensor | None = None) -> None:
        """Counts the tokens of a call; `mask` (B, length) bool, True at real ones, or None for all."""
        real = None if mask is None else mask.long().sum(1)
        for layer in self.layers:
            layer.count(length, real)

    def detach(self) -> None:
        """See `StateLayer.detach`."""
        for layer in self.layers:
            layer.detach()

    def reorder_targets(self, beam_idx: torch.Tensor) -> None:
        """See `StateLayer.reorder_targets`."""
        for layer in self.layers:
            layer.reorder_targets(beam_idx)

    def reset_rows(self, rows: torch.Tensor) -> None:
        """See `StateLayer.reset_rows`."""
        first = self.layers[0]
        held = first.num_rows
        if rows.dtype != torch.bool or (held is not None and tuple(rows.shape) != (held,)):
            raise ValueError(
                f"`rows` must be booleans of shape ({held},), one for each row of the cache; got {rows.dtype} of shape "
                f"{tuple(rows.shape)}."
            )
        for layer in self.layers:
            layer.reset_rows(rows)
        if first.begins is not None and first.masks_past:
            surplus = min(int(first.begins.min()), first.cumulative_length - (first.kept_tokens or 0))
            for layer in self.layers if surplus >= SURPLUS_TOKENS else ():
                layer.drop_past(surplus)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that a call has filled, by layer and kind: "0.keys", "0.values", "0.state" ..."""
        named = (
            (f"{index}.{name}", tensor)
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        )
        return {name: tensor for name, tensor in named if tensor is not None}

    def fill(self, tensors: Mapping[str, torch.Tensor], past: int) -> None:
        """Takes over the `tensors` of another cache, as if `past` tokens had been read."""
        for index, layer in enumerate(self.layers):
            prefix = f"{index}."
            layer.fill({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, past)

    def fitted(self, slots: int) -> dict[str, torch.Tensor]:
        """See `StateLayer.fitted`; names as in `tensors`."""
        named = (
            (f"{index}.{name}", tensor)
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.fitted(slots).items()
        )
        return dict(named)

    def hold_by_end(self, moved: torch.Tensor) -> None:
        """See `StateLayer.hold_by_end`; also sets `moved`."""
        self.moved = moved
        for layer in self.layers:
            layer.hold_by_end()

    def take_fixed(self, tensors: Mapping[str, torch.Tensor], length: int) -> None:
        """See `StateLayer.take_fixed`; names as in `tensors`."""
        for index, layer in enumerate(self.layers):
            prefix = f"{index}."
            layer.take_fixed({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, length)

    @property
    def token_axes(self) -> dict[str, int]:
        """Token axis of the tensors with a place for each kept token, by the names of `tensors`."""
        return {
            f"{index}.{name}": axis
            for index, layer in enumerate(self.layers)
            for name, axis in layer.token_axes.items()
        }

    @property
    def source_axes(self) -> dict[str, int]:
        """Token axis of the tensors of the source, which the first call makes and no later one changes."""
        return {
            f"{index}.{name}": axis
            for index, layer in enumerate(self.layers)
            for name, axis in layer.source_axes.items()
        }

    def saved(self) -> dict[str, torch.Tensor]:
        """Every tensor and counter by name, copied, to be written to a file between two segments."""
        numbers = {
            f"{index}.{name}": torch.tensor(number)
            for index, layer in enumerate(self.layers)
            for name, number in layer.counters().items()
        }
        form = torch.contiguous_format
        return numbers | {name: tensor.detach().clone(memory_format=form) for name, tensor in self.tensors().items()}

    def load_saved(self, saved: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Takes over the result of `saved`, before the next segment."""
        self.fill({name: tensor.to(device) for name, tensor in saved.items()}, 0)
        for index, layer in enumerate(self.layers):
            layer.restore({name: int(saved[f"{index}.{name}"]) for name in layer.counters()})
