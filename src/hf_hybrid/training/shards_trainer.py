"""The part of the trainers whose processes hold shards of parameters, gradients and optimizer (FSDP2, `fsdp_size`).

Transformers shards the model, and PyTorch's distributed checkpoints hold the shards of the optimizer. They name parameters, not
processes, so that any number of processes, sharded or not, can resume. Weights are saved whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from ..layers.full_precision import GathersFullPrecision
from .checkpoints import OPTIMIZER_FOLDER


def shard_model(model: PreTrainedModel, fsdp_size: int, processes: int) -> PreTrainedModel:
    """Shards a model that every process has whole, by the plan of its configuration.

    Args:
        model: with the same weights in every process. It is changed.
        fsdp_size: number of processes that share the parameters; `processes` / `fsdp_size` such groups hold copies.
        processes: number of all processes.

    Raises:
        ValueError: `fsdp_size` does not divide the number of processes, or the model is an adapter.
    """
    from transformers.distributed import DistributedConfig

    if fsdp_size < 1 or processes % fsdp_size:
        raise ValueError(
            f"`fsdp_size` must divide the number of processes, {processes}; got {fsdp_size}. Start the run with `torchrun "
            "--nproc_per_node` of a multiple of it."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`fsdp_size={fsdp_size}` shards whole models, not {type(model).__name__}: train an adapter without it."
        )
    config: Any = DistributedConfig(fsdp_size=fsdp_size, dp_replicate_size=processes // fsdp_size)
    config, _, mesh = type(model).prepare_distribute_model(config)
    model = type(model).maybe_distribute_model(model, config, mesh)
    model.tie_weights()  # sharding gave each module a parameter of its own
    return model


def lacking_weights(model: Any, missing: Sequence[str]) -> list[str]:
    """The weights that a checkpoint really lacks: of tied ones it stores one.

    Args:
        model: the model.
        missing: names that the checkpoint does not have.
    """
    lacking = set(missing)
    for name, partner in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if not {name, partner} <= lacking:
            lacking -= {name, partner}
    return [name for name in missing if name in lacking]


def refuse_cast_states(model: torch.nn.Module, args: Any) -> None:
    """Refuses half precision under DeepSpeed, which casts every parameter.

    Args:
        model: the model, whole.
        args: training arguments of a run under DeepSpeed.

    Raises:
        ValueError: the model has layers that compute with float32 tensors only.
    """
    option = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), None)
    layer = next((module for module in model.modules() if isinstance(module, GathersFullPrecision)), None)
    if option is not None and layer is not None:
        raise ValueError(
            f"`{option}=True` cannot be used with DeepSpeed: it would cast all parameters, also those of {type(layer).__name__}, which "
            f"gives wrong results in half precision. Leave out `{option}` and add "
            '"torch_autocast": {"enabled": true, "dtype": "bfloat16"} to the file of `deepspeed`, or use `fsdp_size` instead of it.'
        )


class ShardsTrainer(Trainer):
    """`Trainer` of models that `from_pretrained(distributed_config=…)`, or `args.fsdp_size`, has sharded.

    Raises:
        ValueError: `fsdp_size` does not fit the number of processes, the model, or pieces of texts; or half precision under DeepSpeed.
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        size = getattr(args, "fsdp_size", 1)
        if size != 1 and model is not None:
            if getattr(args, "context_parallel_size", 1) != 1:
                raise ValueError("`fsdp_size` and `context_parallel_size` cannot be combined: leave out one of them.")
            _ = args.device  # joins the process group
            model = shard_model(model, size, args.world_size)
        saves_optimizer = getattr(model, "is_distributed_loading_by_transformers", False) and not args.save_only_model
        if saves_optimizer:  # `Trainer` refuses it, as it cannot save an optimizer in shards; this class can
            args.save_only_model = True
        try:
            super().__init__(model, args, *rest, **kwargs)
        finally:
            if saves_optimizer:
                args.save_only_model = False
        if self.is_deepspeed_enabled and self.model is not None:
            refuse_cast_states(self.model, self.args)

    @property
    def _holds_shards(self) -> bool:
        return bool(getattr(self, "is_distributed_loading_by_transformers", False))

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without Accelerate's wrapper."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._holds_shards:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        from safetensors.torch import load_file
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        own: Any = self.model
        state: dict[str, Any] = {}
        for path in sorted(Path(resume_from_checkpoint).glob("model*.safetensors")):
            state.update(load_file(path))
        missing, unexpected = set_model_state_dict(
            own, state, options=StateDictOptions(full_state_dict=True, strict=False)
        )
        missing = lacking_weights(own, missing)
        if missing or unexpected:
            raise ValueError(
                f"{resume_from_checkpoint} is the checkpoint of another model: {(missing or unexpected)[0]} is only in "
                f"{'the model' if missing else 'the checkpoint'}."
            )

    def _load_best_model(self) -> None:
        if self._holds_shards:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._holds_shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from transformers.distributed.checkpoint import save_optimizer_distributed

        save_optimizer_distributed(self.model, self._plain_optimizer, str(Path(output_dir) / OPTIMIZER_FOLDER))
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = None if checkpoint is None else Path(checkpoint) / OPTIMIZER_FOLDER
        if folder is not None and folder.is_dir():
            from transformers.distributed.checkpoint import load_optimizer_distributed

            load_optimizer_distributed(self.model, self._plain_optimizer, str(folder))
            scheduler: Any = self.lr_scheduler
            scheduler.load_state_dict(torch.load(folder.parent / "scheduler.pt", weights_only=True))
            return
        if folder is not None and self._holds_shards:
            raise ValueError(
                f"{folder.parent} is the checkpoint of a run without shards, whose optimizer is in one piece: resume it without "
                "`fsdp_size`, or begin a new run from its weights (`model_name_or_path`)."
            )
        super()._load_optimizer_and_scheduler(checkpoint)
