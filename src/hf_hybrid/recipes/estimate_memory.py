"""Estimate the accelerator memory of a training step without running it.

Also tells how many rows fit.

    hf-hybrid memory --arch spade_lm --config_overrides "hidden_size=1024,num_attention_heads=16,num_hidden_layers=24" \
        --length 8192 --gradient_checkpointing true --device_memory 24

The model is built without contents, so any size takes seconds. With `--device_memory` the largest batch that fits is found.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers

from ..memory import ADAMW_BYTES, estimate_memory, largest_batch
from .support.models import load_config, parse_overrides, role_fields
from .support.options import parse_arguments
from .support.runs import set_up_logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TASKS = {
    "clm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "span-corruption": "AutoModelForSeq2SeqLM",
}


@dataclass
class MemoryArguments:
    """Arguments of the recipe."""

    arch: str = field(metadata={"help": "Model type (spade, mega ...), or a folder or Hub name with a configuration."})
    length: int = field(metadata={"help": "Tokens of a row, of the source in an encoder-decoder."})
    config_overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Fields of the configuration, e.g. "hidden_size=256,num_hidden_layers=4".'}
    )
    task: str | None = field(
        default=None, metadata={"help": "clm, mlm or span-corruption. Default: the first that the architecture has."}
    )
    target_length: int | None = field(
        default=None, metadata={"help": "Tokens of a target. Default: as many as `length`."}
    )
    batch_size: int = field(default=1, metadata={"help": "Rows on one device."})
    dtype: str = field(default="float32", metadata={"help": "Data type of the parameters: float32 or bfloat16."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute layers again in the backward pass."}
    )
    optimizer_bytes: float = field(
        default=ADAMW_BYTES, metadata={"help": "Bytes of optimizer state per parameter: 8 for AdamW, 4 for Muon."}
    )
    device_memory: float | None = field(
        default=None,
        metadata={"help": "GiB of the device; tells the largest batch that fits, with a tenth left free."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a checkpoint."})

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("task", TASKS)):
            value = getattr(self, name)
            if value not in known and not (name == "task" and value is None):
                raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {value!r}.")
        if self.device_memory is not None and self.device_memory <= 0:
            raise ValueError(f"`device_memory` must be a positive number of GiB; got {self.device_memory}.")


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Prints the estimate and returns it.

    Args:
        args: see `parse_arguments`.

    Returns:
        Bytes by purpose (`hf_hybrid.memory.MemoryEstimate`), `total`, and `largest_batch` if a device was named.

    Raises:
        ValueError: an option is invalid, or the architecture has no such head.
    """
    (options,) = parse_arguments([MemoryArguments], args, __doc__)
    set_up_logging()
    overrides = parse_overrides(options.config_overrides)
    known = load_config(options.arch, {}, trust_remote_code=options.trust_remote_code)
    classes = [TASKS[options.task]] if options.task is not None else list(TASKS.values())
    auto_class = next((name for name in classes if _has_head(name, known)), classes[0])
    role = role_fields(getattr(transformers, auto_class), known, overrides)
    config = load_config(options.arch, {**role, **overrides}, trust_remote_code=options.trust_remote_code)
    step: dict[str, Any] = {
        "target_length": options.target_length,
        "auto_class": auto_class,
        "dtype": DTYPES[options.dtype],
        "gradient_checkpointing": options.gradient_checkpointing,
        "optimizer_bytes": options.optimizer_bytes,
    }
    estimate = estimate_memory(config, options.batch_size, options.length, **step)
    sys.stdout.write(f"{estimate}\n")
    result = {**asdict(estimate), "total": estimate.total}
    if options.device_memory is not None:
        usable = round(0.9 * options.device_memory * 2**30)
        result["largest_batch"] = largest_batch(config, options.length, usable, **step)
        sys.stdout.write(f"largest batch {result['largest_batch']:,} on {options.device_memory:g} GiB\n")
    return result


def _has_head(auto_class: str, config: Any) -> bool:
    return type(config) in getattr(transformers, auto_class)._model_mapping


if __name__ == "__main__":
    main()
