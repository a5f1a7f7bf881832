"""Exports models to formats without model code: programs of `torch.export`, decoding steps, ONNX, int8 checkpoints.

    export_program(model, "exported")          model.pt2: the forward pass of any head, any batch size and length
    export_decoding_step(model, "exported")    model.pt2: one token of generation, its state as plain tensors
    export_onnx(model, "exported")             model.onnx, for onnxruntime and other runtimes
    export_int8(model, "exported")             a checkpoint with 8-bit weights of its linear layers

Each writes a new folder with the model, its configuration and its tokenizer, and compares the exported model with the
original on inputs of other sizes. The folder appears complete or not at all.

Shapes: B batch, L tokens, T target tokens, P earlier tokens.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .auto import ARCHITECTURES
from .configuration.lengths import max_source_length, max_target_length
from .layers.kept_results import frozen_results
from .modeling.decoding_step import DecodingStep, State
from .new_folder import new_folder
from .published import clean_folder

Inputs = dict[str, torch.Tensor]

PROGRAM_FILE = "model.pt2"
ONNX_FILE = "model.onnx"

TOLERANCE = 1e-4  # absolute error; relative to the largest output where that is above 1
INT8_TOLERANCE = 0.2  # the same for 8-bit weights, whose rounding changes the outputs
_EXAMPLE_LENGTH, _OTHER_LENGTH = 150, 70  # longer than the blocks of every operator, so that no special case is traced


class Export(NamedTuple):
    """What an export wrote."""

    path: Path
    """The model file, or the folder of a checkpoint."""
    max_error: float
    """Largest difference from the model, on inputs of another size than the example."""


# ------------------------------------------------------------------------------------------------------------- public


def export_program(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
) -> Export:
    """Writes the forward pass as a program of `torch.export`, for any batch size and length.

    `torch.export.load(path).module()(**inputs)` runs it, without this package, and returns a dictionary of tensors.

    Args:
        model: any head, in evaluation mode.
        folder: folder to create.
        tokenizer: tokenizer saved with the program.
        example: inputs to trace with, two rows or more; default: random inputs for the head. Images have a fixed size.

    Raises:
        ValueError: a model of another library, or in training mode.
        FileExistsError: `folder` is not empty.
        RuntimeError: the program does not compute what the model computes.
    """
    _check_model(model)
    with new_folder(folder) as scratch, _exporting(model):
        inputs = example_inputs(model) if example is None else dict(example)
        forward = _Forward(model, inputs)
        program = _trace(forward, inputs)
        error = _compare(program.module(), forward, _other_inputs(model, example), TOLERANCE)
        torch.export.save(program, scratch / PROGRAM_FILE)
        _save_beside(scratch, model, tokenizer)
    return Export(Path(folder) / PROGRAM_FILE, error)


def export_decoding_step(
    model: PreTrainedModel, folder: str | os.PathLike[str], *, tokenizer: PreTrainedTokenizerBase | None = None
) -> Export:
    """Writes one step of generation as a program of `torch.export`: token, mask and state in, logits and next state out.

    Inputs and outputs are those of `DecodingStep.forward` with one token; `DecodingStep(model).start(batch_size)` is
    the initial state. For an encoder-decoder, `DecodingStep(model).encode` gives the keys and values of the source.

    Args:
        model: a head that generates, in evaluation mode.
        folder: folder to create.
        tokenizer: tokenizer saved with the program.

    Raises:
        ValueError: a model that does not generate, of another library, or in training mode.
        FileExistsError: `folder` is not empty.
        RuntimeError: the program does not compute what the model computes.
    """
    _check_model(model)
    step = DecodingStep(model).eval()
    with new_folder(folder) as scratch, _exporting(model):
        program = trace_decoding_step(step)
        error = _compare(program.module(), step, _step_inputs(step, batch=2, past=9, source=12), TOLERANCE)
        torch.export.save(program, scratch / PROGRAM_FILE)
        _save_beside(scratch, model, tokenizer)
    return Export(Path(folder) / PROGRAM_FILE, error)


def export_onnx(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
) -> Export:
    """Writes the forward pass as an ONNX model, for any batch size and length, and runs it in onnxruntime.

    Inputs and outputs have the same names as in Transformers.

    Args:
        model: an encoder or classifier, in evaluation mode and float32.
        folder: folder to create.
        tokenizer: tokenizer saved with the model.
        example: as in `export_program`.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: a model of another library, in training mode, or in another precision.
        FileExistsError: `folder` is not empty.
        RuntimeError: onnxruntime does not compute what the model computes.
    """
    _require("onnx", "onnxscript", "onnxruntime", extra="export")
    _check_model(model)
    if model.dtype != torch.float32:
        raise ValueError(f"ONNX models are written in float32; this model is in {model.dtype}: call `model.float()`.")
    with new_folder(folder) as scratch, _exporting(model):
        inputs = example_inputs(model) if example is None else dict(example)
        forward = _Forward(model, inputs)
        program = _trace(forward, inputs)
        names = list(forward(**inputs))
        written = torch.onnx.export(program, dynamo=True, verbose=False, input_names=list(inputs), output_names=names)
        assert written is not None
        written.save(scratch / ONNX_FILE)
        error = _compare(OnnxModel(scratch / ONNX_FILE), forward, _other_inputs(model, example), TOLERANCE)
        _save_beside(scratch, model, tokenizer)
    return Export(Path(folder) / ONNX_FILE, error)


def export_int8(
    model: PreTrainedModel, folder: str | os.PathLike[str], *, tokenizer: PreTrainedTokenizerBase | None = None
) -> Export:
    """Writes a checkpoint whose linear layers have 8-bit weights (by torchao); `from_pretrained` loads it.

    Embeddings, norms and the tensors of state space models and moving averages keep their precision.

    Args:
        model: any head, in evaluation mode.
        folder: folder to create.
        tokenizer: tokenizer saved with the weights.

    Raises:
        ImportError: torchao is missing.
        ValueError: a model of another library, or in training mode.
        FileExistsError: `folder` is not empty.
        RuntimeError: the outputs of the quantised model are too far from those of the model.
    """
    _require("torchao", extra="quantize")
    _check_model(model)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    with new_folder(folder) as scratch:
        plain = scratch / "plain"
        model.save_pretrained(plain)
        config = TorchAoConfig(Int8WeightOnlyConfig())
        quantised = type(model).from_pretrained(plain, quantization_config=config).eval()
        for file in plain.iterdir():
            file.unlink()
        plain.rmdir()
        quantised.save_pretrained(scratch)
        with torch.no_grad():
            inputs = example_inputs(model)
            forwards = (_Forward(quantised, inputs), _Forward(model, inputs))
            error = _compare(*forwards, [inputs], INT8_TOLERANCE)
        _save_beside(scratch, None, tokenizer)
    return Export(Path(folder), error)


# ------------------------------------------------------------------------------------------------------------- inputs


def example_inputs(model: PreTrainedModel, batch: int = 3, length: int = _EXAMPLE_LENGTH, padded: int = 0) -> Inputs:
    """Random inputs of the forward pass of a model; the first row begins with `padded` tokens of padding."""
    config: Any = model.config
    parameters = inspect.signature(type(model).forward).parameters
    reads_values = getattr(config, "input_type", "tokens") == "values"
    if "pixel_values" in parameters:
        side = config.image_size or 28
        return {"pixel_values": torch.rand(batch, 1, side, side)}
    length = min(length, max_source_length(config) or length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padded] = 0
    if reads_values:
        return {"input_values": torch.randn(batch, length), "attention_mask": mask}
    input_ids = torch.randint(config.vocab_size, (batch, length))
    if type(model).__name__.endswith("ForMultipleChoice"):
        choices = torch.randint(config.vocab_size, (batch, 3, length))
        return {"input_ids": choices, "attention_mask": mask.unsqueeze(1).repeat(1, 3, 1)}
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if "decoder_input_ids" in parameters:
        target = min(length // 2, max_target_length(config) or length)
        inputs["decoder_input_ids"] = torch.randint(config.vocab_size, (batch, target))
    return inputs


def _other_inputs(model: PreTrainedModel, example: Mapping[str, torch.Tensor] | None) -> list[Inputs]:
    """Inputs of other sizes than the example."""
    if example is not None:
        return [dict(example), {name: tensor[:1] for name, tensor in example.items()}]
    return [example_inputs(model, 2, _OTHER_LENGTH, padded=3), example_inputs(model, 1, 3)]


def _step_inputs(step: DecodingStep, batch: int, past: int, source: int) -> list[dict[str, Any]]:
    """One set of inputs of a decoding step in the middle of a text, in a list."""
    start = step.start(batch, growing=past)
    state = {
        name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in start.items()
    }
    config: Any = step.model.config
    vocabulary = config.vocab_size
    mask = torch.ones(batch, past + 1, dtype=torch.long)
    mask[0, :2] = 0
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(vocabulary, (batch, 1)),
        "attention_mask": mask,
        "state": state,
    }
    if step.has_encoder:
        ids = torch.randint(vocabulary, (batch, source))
        inputs |= {"source": step.encode(ids), "source_mask": torch.ones(batch, source, dtype=torch.long)}
    return [inputs]


# ------------------------------------------------------------------------------------------------------------ tracing


class _Forward(nn.Module):
    """The forward pass as a function from named tensors to a dictionary of tensors."""

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        has_cache = "use_cache" in inspect.signature(type(model).forward).parameters
        options = {"use_cache": False} if has_cache else {}

        def forward(**inputs: torch.Tensor) -> Inputs:
            outputs = model(**inputs, **options)
            return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}

        # `torch.export` takes the arguments of the program from the signature.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


def _open_sizes(tensor: torch.Tensor, *axes: int) -> dict[int, Any]:
    return {axis % tensor.dim(): Dim.AUTO for axis in axes}


def _trace(forward: _Forward, inputs: Inputs) -> ExportedProgram:
    """A program with dynamic batch size and length; images keep their size."""
    shapes = {
        name: _open_sizes(tensor, 0) if name == "pixel_values" else _open_sizes(tensor, 0, -1)
        for name, tensor in inputs.items()
    }
    return _without_traces(torch.export.export(forward, (), inputs, dynamic_shapes=shapes, strict=False))


def trace_decoding_step(step: DecodingStep) -> ExportedProgram:
    """The program of one token, with dynamic batch size and dynamic lengths of state and source, where they vary."""
    (inputs,) = _step_inputs(step, batch=3, past=6, source=10)

    def state_shapes(tensors: State, axes: Mapping[str, int]) -> dict[str, Any]:
        return {
            name: _open_sizes(tensor, 0, axes[name]) if name in axes else _open_sizes(tensor, 0)
            for name, tensor in tensors.items()
        }

    shapes = {
        "input_ids": _open_sizes(inputs["input_ids"], 0),
        "attention_mask": _open_sizes(inputs["attention_mask"], 0, 1),
        "state": state_shapes(inputs["state"], step.token_axes if step.is_growing else {}),
    }
    if step.has_encoder:
        shapes["source"] = state_shapes(inputs["source"], step.source_axes)
        shapes["source_mask"] = _open_sizes(inputs["source_mask"], 0, 1)
    return _without_traces(torch.export.export(step, (), inputs, dynamic_shapes=shapes, strict=False))


def _without_traces(program: ExportedProgram) -> ExportedProgram:
    """The program without the lines of source that made each operation, which name folders of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


@contextmanager
def _exporting(model: nn.Module) -> Iterator[None]:
    """Disables gradients and treats everything that depends on the weights alone as constants."""
    with torch.no_grad(), frozen_results(model, ahead=True):
        yield


class OnnxModel:
    """An ONNX model as a function from named tensors to a dictionary of tensors, run by onnxruntime on the CPU."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        _require("onnxruntime", extra="export")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, **inputs: torch.Tensor) -> Inputs:
        names = [output.name for output in self.session.get_outputs()]
        arrays = self.session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays)}


# ------------------------------------------------------------------------------------------------------------- checks


def _require(*packages: str, extra: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'This export needs {", ".join(missing)}: pip install "hf_hybrid[{extra}]".')


def _check_model(model: nn.Module) -> None:
    known = [architecture.model_type for architecture in ARCHITECTURES]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, PreTrainedModel) or model_type not in known:
        raise ValueError(
            f"`model` must be a model of type {', '.join(map(repr, known))}; got {type(model).__name__} of type {model_type!r}. "
            "Merge adapters first (`merge_and_unload`)."
        )
    if model.training:
        raise ValueError("`model` is in training mode, where dropout is active: call `model.eval()` first.")


def _compare(exported: Any, reference: Any, cases: list[Any], tolerance: float) -> float:
    """Largest difference at real tokens, relative to the largest output where that is above 1.

    Raises:
        RuntimeError: it exceeds the tolerance.
    """
    worst = 0.0
    with torch.no_grad():
        for inputs in cases:
            expected, actual = reference(**inputs), exported(**inputs)
            mask = inputs.get("attention_mask")
            for name, tensor in _flat(expected).items():
                difference = (_flat(actual)[name].float() - tensor.float()).abs()
                if mask is not None and difference.shape[:2] == mask.shape and "decoder_input_ids" not in inputs:
                    difference = difference * mask.view(*mask.shape, *(1,) * (difference.dim() - 2))
                if tensor.numel() > 0:  # a window of one token keeps no earlier tokens
                    worst = max(worst, difference.max().item() / max(1.0, tensor.float().abs().max().item()))
    if not worst <= tolerance:
        raise RuntimeError(
            f"The exported model differs from the original by {worst:.1e}, more than {tolerance:.1e}; nothing was written."
        )
    return worst


def _flat(outputs: Mapping[str, Any]) -> Inputs:
    flat: Inputs = {}
    for name, value in outputs.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return flat


def _save_beside(folder: Path, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if model is not None:
        model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    clean_folder(folder)
