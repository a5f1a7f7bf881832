"""What a call would ask of an accelerator: kernels launched, and values that the host waits for.

The forms for accelerators run on the CPU (`forced_branch`), and every operation that PyTorch dispatches is counted, inside
custom operators and in backward passes too.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_hybrid.ops.branches import forced_branch

# Operations whose result, or the size of whose result, the host has to know.
READS = {
    "_local_scalar_dense",
    "_linalg_check_errors",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
# Operations that launch nothing.
FREE = {
    "_has_compatible_shallow_copy_type",
    "_reshape_alias",
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "promote_types",
    "record_stream",
    "resize_",
    "set_",
    "sym_size",
}


class DeviceWork(TorchDispatchMode):
    """Counts the operations inside.

    Attributes:
        kernels: operations that launch at least one kernel, by name.
        shapes: these operations in turn, with the shapes of their tensors.
        reads: places in the code that made the host wait, by operation and place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.shapes: list[tuple[Any, ...]] = []
        self._on_host: list[
            torch.Tensor
        ] = []  # seeds of dropout are drawn on the host, and cost nothing to read there

    @property
    def launches(self) -> int:
        return self.kernels.total()

    def note_read(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "hf_hybrid" in frame.filename]
        place = f"{frames[-1].filename.rsplit('/', 1)[1]}:{frames[-1].lineno}" if frames else "elsewhere"
        self.reads[f"{name} {place}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim"):
            key = torch._C.DispatchKey.CompositeExplicitAutograd
            if (
                func.has_kernel_for_dispatch_key(key) and "fused" not in func.name()
            ):  # an operator of ours: look inside
                with self, torch.no_grad():
                    return func._op_dk(key, *args, **kwargs)
            self.kernels[func.name()] += 1
            return func(*args, **kwargs)
        has_kernel = partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
        if has_kernel("CompositeImplicitAutograd") and not has_kernel("CPU"):  # of some, a device has a kernel beside
            with self:  # inside operators of ours these arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = func._schema.name.removeprefix("aten::")
        is_seed = any(any(leaf is seed for seed in self._on_host) for leaf in tree_leaves(args))
        waits = name in READS or (name == "repeat_interleave" and "output_size" not in kwargs)
        if waits and not is_seed:
            self.note_read(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(leaf.dtype in (torch.bool, torch.uint8) for leaf in args[1] if isinstance(leaf, torch.Tensor)):
                self.note_read(f"{name} by booleans")
        if not (waits or func.is_view or name in FREE):
            self.kernels[name] += 1
            self.shapes.append(
                (name, *(tuple(leaf.shape) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)))
            )
        result = func(*args, **kwargs)
        if name == "randint" and "device" in kwargs and kwargs["device"] == torch.device("cpu"):
            self._on_host.append(result)
        return result


class _PythonReads(TorchFunctionMode):
    """Reads that are not dispatched as operations."""

    def __init__(self, work: DeviceWork) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.work.note_read(func.__name__)
        return func(*args, **(kwargs or {}))


@torch.library.custom_op("hf_hybrid_tests::fused_rms_norm", mutates_args=())
def _fused_rms_norm(
    inputs: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    factors = (inputs.square().mean(-1, keepdim=True) + eps).rsqrt()
    return inputs * factors * (1 if weight is None else weight), factors


@torch.library.custom_op("hf_hybrid_tests::fused_rms_norm_backward", mutates_args=())
def _fused_rms_norm_backward(
    gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor | None, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    units = inputs * factors
    scaled = gradient * (1 if weight is None else weight)
    found = factors * (scaled - units * (scaled * units).mean(-1, keepdim=True))
    return found, (gradient * units).flatten(0, -2).sum(0)


def _save_norm(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_of_norm(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    inputs, weight, factors = ctx.saved_tensors
    found, of_weight = _fused_rms_norm_backward(gradient, inputs, weight, factors)
    return found, None if weight is None else of_weight, None


_fused_rms_norm.register_autograd(_backward_of_norm, setup_context=_save_norm)


@contextmanager
def fused_norms() -> Iterator[None]:
    """`rms_norm` as one kernel that keeps its input and a factor per row, as on CUDA; on a CPU it is a chain of operations."""

    def rms_norm(inputs: Any, shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
        return _fused_rms_norm(inputs, weight, torch.finfo(inputs.dtype).eps if eps is None else eps)[0]

    with mock.patch.object(torch.nn.functional, "rms_norm", rms_norm):
        yield


@contextmanager
def counted_work() -> Iterator[DeviceWork]:
    """Counts the operations inside, in the forms for accelerators."""
    work = DeviceWork()
    with fused_norms(), forced_branch("accelerator"), _PythonReads(work), work:
        yield work


def work_of(call: Callable[[], Any], warm_ups: int = 1) -> DeviceWork:
    """The work of one call, after some that fill what is kept."""
    with forced_branch("accelerator"):
        for _ in range(warm_ups):
            call()
    with counted_work() as work:
        call()
    return work
