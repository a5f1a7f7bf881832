"""The tokens of a training step that fit on a device, for models of several sizes; writes the table of the page on scaling.

    python benchmarks/memory_table.py

Nothing is run: the estimates are those of `hf_hybrid.estimate_memory`, for parameters in bfloat16, AdamW with moments in float32, and gradient
checkpointing. A tenth of the device is left free.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import hf_hybrid
from hf_hybrid.memory import estimate_memory

SIZES = {"base": (768, 12), "billion": (2048, 24)}
# Of the two estimates whose difference is the price of a token; both losses are computed in pieces.
LENGTHS = (8192, 16384)


def configs(hidden: int, layers: int) -> dict[str, Callable[[], Any]]:
    """A configuration of each architecture with this width and depth, and windows and chunks of its defaults."""
    common = {"vocab_size": 32_000, "hidden_size": hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64}
    single = {"shared_representation_size": hidden // 4, "intermediate_size": 2 * hidden}
    return {
        "spade_lm": lambda: hf_hybrid.SpadeLMConfig(**common, **heads, intermediate_size=4 * hidden),
        "spade": lambda: hf_hybrid.SpadeConfig(
            **common, **heads, head_dim=64, decoder_layers=layers, intermediate_size=4 * hidden
        ),
        "mega": lambda: hf_hybrid.MegaConfig(
            **common, **single, nffn_hidden_size=2 * hidden, use_chunking=True, chunk_size=128, is_decoder=True,
            bidirectional=False,
        ),
        "seqboat": lambda: hf_hybrid.SeqBoatConfig(
            **common, value_dim=2 * hidden, qk_dim=hidden // 4, window_size=128, is_decoder=True
        ),
        "bst": lambda: hf_hybrid.BstConfig(**common, **heads, head_dim=64, intermediate_size=4 * hidden),
        "longvq": lambda: hf_hybrid.LongVQConfig(**common, **single, value_size=2 * hidden, is_decoder=True),
    }  # fmt: skip


def row(name: str, config: Any, devices: list[int]) -> str:
    """A line of the table."""
    # A long target would make the step of an encoder-decoder: an eighth of the source.
    short, long = (
        estimate_memory(
            config, 1, length, target_length=length // 8, dtype=torch.bfloat16, gradient_checkpointing=True
        )
        for length in LENGTHS
    )
    token = (long.step - short.step) / (LENGTHS[1] - LENGTHS[0])
    fixed = short.parameters + short.optimizer + max(0, short.step - token * LENGTHS[0])
    fitting = [max(0, int((0.9 * device * 2**30 - fixed) / token)) for device in devices]
    cells = [f"{count // 1024:,}k" if count >= 1024 else "-" for count in fitting]
    return f"| {name} | {short.num_parameters / 1e6:,.0f} M | {fixed / 2**30:.2f} GiB | {token / 2**10:.1f} KiB | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--devices", nargs="+", type=int, default=[16, 24, 80], help="GiB")
    options = parser.parse_args()
    devices = " | ".join(f"{device} GiB" for device in options.devices)
    print(f"| model | parameters | fixed | a token | tokens in {devices} |")
    print("|---" * (4 + len(options.devices)) + "|")
    for size in options.sizes:
        for name, make in configs(*SIZES[size]).items():
            if options.models is None or name in options.models:
                print(row(name, make(), options.devices), flush=True)


if __name__ == "__main__":
    main()
