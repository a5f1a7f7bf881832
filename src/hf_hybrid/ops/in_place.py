"""Whether kept tensors may be changed in place."""

from __future__ import annotations

import torch


def is_changeable(tensor: torch.Tensor) -> bool:
    """Whether an operation may write into a tensor: not while tracing, nor into inference tensors outside inference
    mode.

    The caller must know whether autograd still needs the old values.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first: a compiler cannot ask for inference mode
        return False
    return not tensor.is_inference() or torch.is_inference_mode_enabled()
