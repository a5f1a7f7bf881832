"""The part of the trainers that cuts texts over processes (`context_parallel_size`).

Of W processes, every N neighbours share the texts of a batch, each with a piece, and W / N of these groups train on
different batches. Gradients are averaged over all processes, as without pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import IterableDataset
from transformers import Trainer

from ..ops.sequence_group import SequenceGroup
from .context_parallel import check_reads_pieces, context_parallel, split_batch


class PiecesTrainer(Trainer):
    """`Trainer` whose processes may share texts: `args.context_parallel_size` of them, 1 by default.

    Raises:
        ValueError: the number of processes is no multiple of it, or something of the run needs whole texts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.model: Any
        self._pieces: tuple[DeviceMesh, SequenceGroup] | None = None
        super().__init__(*args, **kwargs)
        size = getattr(self.args, "context_parallel_size", 1)
        if size != 1:
            self._check_pieces(size)
            shape = (self.args.world_size // size, size)
            mesh = init_device_mesh(self.args.device.type, shape, mesh_dim_names=("dp_replicate", "cp"))
            self._pieces = (mesh, SequenceGroup(mesh["cp"].get_group()))

    def _check_pieces(self, size: int) -> None:
        if size < 1 or self.args.world_size % size:
            raise ValueError(
                f"`context_parallel_size` must divide the number of processes, {self.args.world_size}; got {size}. Start the run "
                "with `torchrun --nproc_per_node` of a multiple of it."
            )
        if self.args.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` needs whole texts: leave it 0 with `context_parallel_size`.")
        if self.compute_metrics is not None:
            raise ValueError(
                "Metrics of predictions need whole texts: with `context_parallel_size` evaluate the loss alone (no "
                "`compute_metrics`), or evaluate in a run of its own."
            )
        if isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                "A streamed data set cannot be read by several processes alike: with `context_parallel_size` train on a data set "
                "with a length."
            )
        check_reads_pieces(self.model)

    @property
    def num_data_groups(self) -> int:
        """Number of processes, or groups of them, that read different batches."""
        return self.args.world_size // self.get_cp_size()

    def get_cp_size(self) -> int:
        """Number of processes that share a text; the Trainer counts tokens and steps by it."""
        return super().get_cp_size() if self._pieces is None else self._pieces[1].size

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Data loader that gives the processes of a group the same batches.

        Accelerate does so along the axis "cp" of a device mesh, but makes one itself for FSDP2 only.
        """
        if self._pieces is None:
            return super()._get_dataloader(*args, **kwargs)
        accelerator: Any = self.accelerator
        accelerator._prepare_device_mesh = lambda: self._pieces[0]  # type: ignore[index]
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            del accelerator._prepare_device_mesh

    def _prepare_context_parallel_inputs(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Callable[[], Any], dict[str, Any]]:
        """The context of a forward (and backward) pass, and the piece of this process."""
        if self._pieces is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        group = self._pieces[1]
        piece = split_batch(inputs, group, self.model)
        piece.pop("num_items_in_batch", None)  # the Trainer counts those of all processes
        return partial(context_parallel, self.model, group), piece

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Number of labels of a step; every process of a group counts those of the whole texts.

        `Trainer` divides by the size of the group, but before 5.23 only where Accelerate made the group.
        """
        pieces, self._pieces = self._pieces, None  # now the size is 1 for all of them
        try:
            count = super()._get_num_items_in_batch(*args, **kwargs)
        finally:
            self._pieces = pieces
        return count if count is None or pieces is None else count / pieces[1].size

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """The loss, and predictions unless texts are cut."""
        if self._pieces is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
        if not prediction_loss_only:
            raise ValueError("Predictions need whole texts: predict without `context_parallel_size`.")
        loss, logits, labels = super().prediction_step(model, inputs, True, ignore_keys, **kwargs)
        group = self._pieces[1]  # every process reports the loss of the whole text
        return None if loss is None else group.reduce(loss) / group.size, logits, labels

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        read = self.state.num_input_tokens_seen - before  # by each process of a group
        self.state.num_input_tokens_seen = before + read // self.get_cp_size()
