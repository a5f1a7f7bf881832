"""Records, summarises and monitors the activations of layers with routers (arXiv 2306.11197).

Everything here works through hooks on the units of a model, so that it sees every forward pass, including those of
`generate`.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

DEAD_RATE = 1e-3  # share of active tokens below which a layer counts as dead
ALWAYS_ON_RATE = 1 - 1e-3


def attention_spans(active: torch.Tensor, window: int | None, causal: bool) -> torch.Tensor:
    """How far each active token looks: the mean distance, in tokens, of the keys it sees (itself left out).

    Args:
        active: (B, L) bool.
        window: number of active tokens seen on each side; None: all.
        causal: whether a token sees only those before it.

    Returns:
        (C,) float64 in the order of the tokens; NaN for an active token that sees no other.
    """
    rows, positions = active.nonzero(as_tuple=True)
    if rows.numel() == 0:
        return torch.zeros(0, dtype=torch.float64, device=active.device)
    counts = active.sum(-1)
    first = (counts.cumsum(0) - counts)[rows]  # position of the row's first active token
    places = torch.arange(rows.numel(), device=active.device)
    reach = active.shape[1] if window is None else window
    before = (places - first).clamp(max=reach)
    after = torch.zeros_like(before) if causal else (first + counts[rows] - 1 - places).clamp(max=reach)
    sums = torch.cat([positions.new_zeros(1), positions.cumsum(0)])
    passed = before * positions - (sums[places] - sums[places - before])
    coming = sums[places + after + 1] - sums[places + 1] - after * positions
    return (passed + coming).double() / (before + after).double()


def sparse_units(model: nn.Module) -> list[Any]:
    """The units of a model that have a router, in the order of the layers.

    Raises:
        ValueError: the model has none.
    """
    modules = model.modules()
    units: list[Any] = [module for module in modules if hasattr(getattr(module, "router", None), "log_temperature")]
    if not units:
        raise ValueError(f"{type(model).__name__} has no layers with a router: only SeqBoat models have activations.")
    return units


def has_routers(model: nn.Module) -> bool:
    """Whether a model has layers with a router."""
    return any(hasattr(getattr(module, "router", None), "log_temperature") for module in model.modules())


@contextmanager
def watch_routers(model: nn.Module, notice: Any) -> Iterator[list[Any]]:
    """Calls `notice(layer, routing, mask)` after every decision of a router, until the end of the block.

    Args:
        model: a SeqBoat model; compiled models do not run hooks.
        notice: function of the index of the layer, its `Routing`, and the mask (B, L) of real tokens or None.
    """
    units = sparse_units(model)
    handles = []
    for index, unit in enumerate(units):

        def hook(_module: nn.Module, arguments: tuple, routing: Any, index: int = index) -> None:
            notice(index, routing, arguments[1] if len(arguments) > 1 else None)

        handles.append(unit.router.register_forward_hook(hook))
    try:
        yield units
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_activations(model: nn.Module) -> Iterator[list[list[torch.Tensor]]]:
    """The gates of all forward passes inside the block: per layer a list of (B, L) tensors; 0 = inactive.

    `generate` makes one pass over the prompt, and one for each generated token::

        with record_activations(model) as gates:
            model.generate(**inputs)
        rates = [torch.cat(layer, dim=1).gt(0).float().mean() for layer in gates]
    """
    gates: list[list[torch.Tensor]] = [[] for _ in sparse_units(model)]
    with watch_routers(model, lambda layer, routing, mask: gates[layer].append(routing.gate.detach())):
        yield gates


@torch.no_grad()
def sample_gates(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The gates of one sample, (layers, L) float32 on the CPU; 0 = inactive.

    Args:
        model: a SeqBoat model; its stack is run in evaluation mode.
        inputs: arguments of the stack with one row each: `input_ids`, or `input_values`.

    Raises:
        ValueError: the model has no routers.
    """
    device, was_training = next(model.parameters()).device, model.training
    try:
        with record_activations(model.eval()) as recorded:
            getattr(model, "base_model", model)(**{name: value.to(device) for name, value in inputs.items()})
    finally:
        model.train(was_training)
    return torch.stack([layer[0][0] for layer in recorded]).float().cpu()


@dataclass(frozen=True)
class LayerActivation:
    """Summary of one layer over a set of sequences; padding is excluded everywhere.

    Attributes:
        layer: index of the layer.
        sequences: number of sequences.
        rate, rate_std: mean and standard deviation over the sequences of the share of active tokens.
        span, max_span: mean and largest distance, in tokens, of the keys that an active token sees; 0 if it sees none.
        temperature: temperature of the router.
        gate: mean gate of the active tokens; 0 if there are none.
        tokens_per_window: tokens of text that the working memory covers on average, window / rate; None without a window.
        saving: share of the cost of the attention unit that is saved, 1 - rate.
        is_dead, is_always_on: whether fewer than 1 in 1,000 tokens are active, or inactive.
    """

    layer: int
    sequences: int
    rate: float
    rate_std: float
    span: float
    max_span: float
    temperature: float
    gate: float
    tokens_per_window: float | None
    saving: float
    is_dead: bool
    is_always_on: bool


def _temperature(log_temperature: torch.Tensor) -> float:
    """The temperature of a router; a shard of a number may be empty."""
    whole = log_temperature.full_tensor() if hasattr(log_temperature, "full_tensor") else log_temperature
    return float(whole.exp())


class ActivationCollector:
    """Accumulates decisions of routers; the sums stay on the device of the model until `summary`."""

    def __init__(self, units: list[Any]) -> None:
        self.units = units
        self.rates: list[list[torch.Tensor]] = [[] for _ in units]
        self.sums: list[list[torch.Tensor]] = [[] for _ in units]

    @torch.no_grad()
    def notice(self, layer: int, routing: Any, mask: torch.Tensor | None) -> None:
        """Adds one decision over whole sequences."""
        active, unit = routing.active, self.units[layer]
        real = torch.full(active.shape[:1], active.shape[1], device=active.device) if mask is None else mask.sum(-1)
        self.rates[layer].append((active.sum(-1) / real)[real > 0])
        spans = attention_spans(active, unit.window, unit.is_causal)
        spans = spans[~spans.isnan()]
        largest = spans.max() if spans.numel() else spans.new_zeros(())
        parts = [spans.sum(), spans.new_tensor(float(spans.numel())), largest]
        parts += [routing.gate.double().sum(), active.sum().double()]
        self.sums[layer].append(torch.stack(parts))

    def summary(self) -> list[LayerActivation]:
        """One entry per layer; empty before the first decision. Of a sharded model all processes must call it."""
        found = []
        for layer, unit in enumerate(self.units):
            if not self.rates[layer]:
                return []
            rates = torch.cat(self.rates[layer]).double().cpu()
            sums = torch.stack(self.sums[layer]).cpu()
            span_sum, spans, _, gate_sum, number = sums.sum(0).tolist()
            rate = float(rates.mean()) if rates.numel() else 0.0
            found.append(
                LayerActivation(
                    layer=layer,
                    sequences=rates.numel(),
                    rate=rate,
                    rate_std=float(rates.std()) if rates.numel() > 1 else 0.0,
                    span=span_sum / spans if spans else 0.0,
                    max_span=float(sums[:, 2].max()),
                    temperature=_temperature(unit.router.log_temperature.detach()),
                    gate=gate_sum / number if number else 0.0,
                    tokens_per_window=unit.window / rate if unit.window is not None and rate > 0 else None,
                    saving=1.0 - rate,
                    is_dead=rate < DEAD_RATE,
                    is_always_on=rate > ALWAYS_ON_RATE,
                )
            )
        return found


@torch.no_grad()
def activation_statistics(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], *, max_sequences: int = 100
) -> list[LayerActivation]:
    """Runs a model over batches of inputs and summarises which tokens are active.

    Args:
        model: a SeqBoat model; it is run in evaluation mode.
        batches: keyword arguments of forward passes, without a cache; tensors are moved to the device of the model.
        max_sequences: number of sequences after which to stop.

    Raises:
        ValueError: the model has no routers, or there is no batch.
    """
    was_training = model.training
    collector = ActivationCollector(sparse_units(model))
    device = next(model.parameters()).device
    seen = 0
    model.eval()
    try:
        with watch_routers(model, collector.notice):
            for batch in batches:
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                model(**inputs)
                seen += len(next(iter(inputs.values())))
                if seen >= max_sequences:
                    break
    finally:
        model.train(was_training)
    if seen == 0:
        raise ValueError("`batches` is empty: pass at least one batch of inputs.")
    return collector.summary()


def write_activation_statistics(layers: list[LayerActivation], path: str | os.PathLike[str]) -> Path:
    """Writes a summary as JSON or CSV, depending on the suffix of the path.

    Raises:
        ValueError: the path has another suffix.
    """
    path = Path(path)
    rows = [asdict(layer) for layer in layers]
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"`path` must end in .json or .csv; got {path.name!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(LayerActivation)])
        writer.writeheader()
        writer.writerows(rows)
    return path


class ActivationCallback(TrainerCallback):
    """Logs `activation_rate/layer_i`, `activation_span/layer_i` and the mean rate, and warns of dead layers.

    Every `every` steps the first forward pass is observed; the observations since the last log are averaged. A router
    learns from
    active tokens only, so a layer without any may stay inactive for good: see `dead_layer_loss_weight`.

    Args:
        every: steps between two observations.
        patience: consecutive observations without active tokens after which a layer is reported, once.

    Raises:
        ValueError: `every` or `patience` is not positive.
    """

    def __init__(self, every: int = 10, patience: int = 5) -> None:
        if every < 1 or patience < 1:
            raise ValueError(f"`every` and `patience` must be at least 1; got {every} and {patience}.")
        self.every: int = every
        self.patience: int = patience
        self.watching: Any = None
        self.collector: ActivationCollector | None = None
        self.looking: set[int] = set()
        self.silent: list[int] = []
        self.warned: set[int] = set()

    def _notice(self, layer: int, routing: Any, mask: torch.Tensor | None) -> None:
        if layer in self.looking and self.collector is not None:
            self.looking.discard(layer)
            self.collector.notice(layer, routing, mask)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watching = watch_routers(kwargs["model"], self._notice)
        self.collector = ActivationCollector(self.watching.__enter__())
        self.silent = [0] * len(self.collector.units)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.collector is not None and state.global_step % self.every == 0:
            self.looking = set(range(len(self.collector.units)))

    def state_dict(self) -> dict[str, Any]:
        """The observations since the last log, in JSON types."""
        if self.collector is None:
            return {}
        collected = {
            name: [[part.tolist() for part in layer] for layer in getattr(self.collector, name)]
            for name in ("rates", "sums")
        }
        return {**collected, "silent": self.silent, "warned": sorted(self.warned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned; an empty state changes nothing."""
        if self.collector is None or not state or len(state["rates"]) != len(self.collector.units):
            return
        device = next(self.collector.units[0].parameters()).device
        kinds = {"rates": torch.float32, "sums": torch.float64}
        for name, dtype in kinds.items():
            parts = [[torch.tensor(part, dtype=dtype, device=device) for part in layer] for layer in state[name]]
            setattr(self.collector, name, parts)
        self.silent, self.warned = list(state["silent"]), set(state["warned"])

    def entries(self, step: int) -> dict[str, float]:
        """Log entries of the observations since the last call; empty if there were none. Warns of dead layers."""
        layers = [] if self.collector is None else self.collector.summary()
        if self.collector is None or not layers:
            return {}
        found = {f"activation_rate/layer_{layer.layer}": round(layer.rate, 5) for layer in layers}
        found |= {f"activation_span/layer_{layer.layer}": round(layer.span, 2) for layer in layers}
        found["activation_rate/mean"] = round(sum(layer.rate for layer in layers) / len(layers), 5)
        for layer in layers:
            index, looks = layer.layer, len(self.collector.rates[layer.layer])
            self.silent[index] = self.silent[index] + looks if layer.is_dead else 0
            if self.silent[index] >= self.patience and index not in self.warned:
                self.warned.add(index)
                logger.warning(
                    "Layer %d no longer activates any token (step %d), so its router gets no gradient. Train with "
                    "`dead_layer_loss_weight` > 0 to revive it.",
                    index,
                    step,
                )
        self.collector = ActivationCollector(self.collector.units)
        return found

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        found = self.entries(state.global_step)
        logs.update(found)
        if found and state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.watching is not None:
            self.watching.__exit__(None, None, None)
        self.watching = self.collector = None
