"""Training and evaluation on consecutive segments of documents, with a state carried between them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel

from ..data.segments import DocumentSegments
from ..modeling.cache import StateCache
from .best_metric import check_best_metric
from .trainer import HybridTrainer

STATE_FILE = "carried_state_{rank}.safetensors"
POSITION_LIMITS = (4096, 16384, 65536)  # ends of the ranges of positions for which the loss is reported
_RANGE_LOSSES = [f"loss_{first}_{last}" for first, last in zip((0, *POSITION_LIMITS), (*POSITION_LIMITS, "end"))]


def new_state(model: Any, *, in_training: bool = False) -> StateCache:
    """Empty state of a causal model.

    Args:
        model: causal model, with or without adapters.
        in_training: whether the weights change from segment to segment.

    Raises:
        ValueError: its state cannot be carried through segments.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    base: Any = inner.base_model if isinstance(inner, PreTrainedModel) else inner
    cache = base.build_cache() if hasattr(base, "build_cache") else None
    obstacle: str | None = "it has none"
    if isinstance(cache, StateCache):
        obstacle = cache.training_obstacle if in_training else None
        if obstacle is None:
            return cache
    raise ValueError(
        f"`segment_length` needs a model whose state can be carried between segments; that of {type(inner).__name__} "
        f"cannot: {obstacle}. Choose a causal language model, or train on blocks (`block_length`)."
    )


class SegmentTrainer(HybridTrainer):
    """`HybridTrainer` on `DocumentSegments`: the state of each row is carried, without gradients, until its document ends.

    Every process trains its own rows of the data set: batch size times number of processes must equal the `num_rows`
        of the
    training data. The evaluation reads the documents of `eval_dataset` whole and also reports the loss by position in
    the document. The state is saved with each checkpoint, so that a resumed run equals an uninterrupted one.

    Raises:
        ValueError: the model cannot carry a state, activations are recomputed, or the batch size does not fit the data.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._new_state()
        self.args.remove_unused_columns = False  # `begins` is not an argument of the model
        if self.get_cp_size() > 1:
            raise ValueError(
                "`context_parallel_size` cannot be used with `segment_length`: a segment already continues the state of the one before "
                "it. Leave out one of them."
            )
        if self.args.gradient_checkpointing:
            raise ValueError(
                "`gradient_checkpointing` cannot be used with `segment_length`: recomputed layers have no state. Lower "
                "`segment_length` instead."
            )
        rows = self.args.train_batch_size * self.args.world_size
        data: Any = self.train_dataset
        if data is not None and data.num_rows != rows:
            raise ValueError(f"The training data has {data.num_rows} rows but a step reads {rows}.")
        self._carried: StateCache | None = None

    def _new_state(self) -> StateCache:
        return new_state(self.model, in_training=self.train_dataset is not None)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of one segment per row, given the state after the segments before it."""
        begins = inputs.pop("begins")
        if self._carried is None:
            self._carried = self._new_state()
        elif bool(begins.any()):
            self._carried.reset_rows(begins)
        loss = super().compute_loss(model, {**inputs, "past_key_values": self._carried}, *args, **kwargs)
        self._carried.detach()
        return loss

    def _state_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, STATE_FILE.format(rank=self.args.process_index))

    def _save_process_state(self, folder: Path) -> None:
        if self._carried is not None:
            save_file(self._carried.saved(), self._state_file(str(folder)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = self._state_file(resume_from_checkpoint)
        if not os.path.isfile(path):
            raise ValueError(
                f"{resume_from_checkpoint} has no {os.path.basename(path)}, the state that a run with `segment_length` carries: "
                "resume with as many processes as before, from a checkpoint of such a run."
            )
        self._carried = self._new_state()
        self._carried.load_saved(load_file(path), self.args.device)

    def _check_best_metric(self) -> None:
        check_best_metric(self, ["loss", *_RANGE_LOSSES])

    # ------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss per token of whole documents, overall and by range of positions (`eval_loss_0_4096`, ...)."""
        began = time.perf_counter()
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model
        was_training = model.training
        model.eval()
        rows = range(self.args.process_index, dataset.num_rows, self.args.world_size)
        cache, positions = new_state(model), torch.zeros(len(rows), dtype=torch.long)
        sums = torch.zeros(len(POSITION_LIMITS) + 1, 2, dtype=torch.float64)
        for step in range(dataset.num_steps) if rows else ():
            self._add_step(model, dataset, step, rows, cache, positions, sums)
        model.train(was_training)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        metrics = {f"{metric_key_prefix}_loss": float(sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1))}
        for (total, count), name in zip(sums.tolist(), _RANGE_LOSSES):
            if count:
                metrics[f"{metric_key_prefix}_{name}"] = total / count
        self._paused_seconds += time.perf_counter() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _add_step(
        self,
        model: Any,
        dataset: DocumentSegments,
        step: int,
        rows: range,
        cache: StateCache,
        positions: torch.Tensor,
        sums: torch.Tensor,
    ) -> None:
        """Adds the summed losses and the numbers of tokens of one step to those of their ranges of positions."""
        samples = [dataset[step * dataset.num_rows + row] for row in rows]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        begins, targets = batch["begins"], batch["shift_labels"]
        positions[begins] = 0
        if step and bool(begins.any()):
            cache.reset_rows(begins.to(model.device))
        with self.compute_loss_context_manager():
            logits = model(batch["input_ids"].to(model.device), past_key_values=cache).logits
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.to(logits.device).flatten(), reduction="none", ignore_index=-100
        )
        places = positions.unsqueeze(1) + torch.arange(targets.shape[1])
        ranges = torch.bucketize(places, torch.tensor(POSITION_LIMITS), right=True)
        counted = targets != -100
        values = torch.stack([losses.view(targets.shape).cpu().double(), torch.ones(targets.shape).double()], dim=-1)
        sums.index_add_(0, ranges[counted], values[counted])
        positions += targets.shape[1]
