"""What differs between the releases of Transformers that this library supports, and can go with the older ones.

The classes of image processors are in `auto.py`, because a record of an architecture names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainingArguments


def enable_checkpointing(model: Any) -> None:
    """Keeps only the inputs of the layers of a model for the backward pass. Transformers before 5.23 has another name for it."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")()


def generation_options(pipeline: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` in a pipeline: the given ones and its generation configuration."""
    if hasattr(pipeline, "_prepare_generate_kwargs"):
        return pipeline._prepare_generate_kwargs(dict(options))
    return {"generation_config": pipeline.generation_config, **options}  # Transformers before 5.23


@contextmanager
def device_without_number(args: TrainingArguments) -> Iterator[None]:
    """Calls the device of a process on a CPU "cpu" meanwhile.

    Where several processes train on CPUs, Accelerate calls it "cpu:0", to which `torch.load` cannot move anything; Transformers before
    5.23 asks it to.
    """
    device = args.device
    if device != torch.device("cpu", 0):
        yield
        return
    args.__dict__["_setup_devices"] = torch.device("cpu")
    try:
        yield
    finally:
        args.__dict__["_setup_devices"] = device
