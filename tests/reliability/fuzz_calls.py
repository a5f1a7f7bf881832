"""Random calls of every head, right and wrong ones, and what they must end with.

A call is a small record without tensors, so that hypothesis prints it and `check_call(Call(...))` replays it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from factories import VARIANTS, VOCABULARY, Case, random_ids
from fuzz_oracle import check_documented, check_finite, check_same, move_weights, named_tensors
from fuzz_values import (
    FAULTS,
    MASKS,
    POSITIONS,
    random_mask,
    random_positions,
    spoil_tensor,
    wrong_cache,
    wrong_encoder_outputs,
    wrong_number,
    wrong_switch,
)
from huggingface_hub.errors import StrictDataclassError
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hf_hybrid.auto import find_architecture

DOUBLE_PRECISION = 1e-9  # largest difference between a row in a batch and alone, relative to the largest number
FLAGS = ("use_cache", "output_hidden_states", "output_attentions", "return_dict")
OF_LOSSES = ("skip_logits", "label_smoothing")
OWN_FLAGS = ("output_activations", "output_quantization")
PER_ROW = ("logits", "last_hidden_state", "start_logits", "end_logits", "pooler_output", "encoder_last_hidden_state")


@dataclass(frozen=True)
class Call:
    """A call of `forward`, with everything that it is made of.

    Attributes:
        model_type, head, variant: of a `Case`.
        batch, length, source: rows; tokens of the input, or of the target of an encoder-decoder; tokens of its source.
        seed: of all random numbers.
        mask, source_mask: kind of padding, one of `MASKS`.
        positions: kind of `position_ids`, one of `POSITIONS`.
        labels: "none", "all", "some" or "ignored" (-100 alone).
        inputs: "ids", "embeds", or "encoder_outputs" (of an encoder-decoder).
        earlier: tokens of calls before, whose cache this one continues.
        options: further arguments.
        faults: arguments that are replaced by something wrong, and by what.
        is_trained: training mode and a backward pass.
    """

    model_type: str
    head: str
    variant: str
    batch: int
    length: int
    source: int
    seed: int
    mask: str = "none"
    source_mask: str = "none"
    positions: str = "none"
    labels: str = "none"
    inputs: str = "ids"
    earlier: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    faults: tuple[tuple[str, str], ...] = ()
    is_trained: bool = False

    @property
    def case(self) -> Case:
        return Case(self.model_type, self.head, self.variant)


@functools.cache
def cases_of(model_type: str) -> list[Case]:
    """Every head in every variant in which it can be built."""
    found = []
    for head in find_architecture(model_type).heads:
        for variant in VARIANTS[model_type]:
            case = Case(model_type, head, variant)
            try:
                with torch.device("meta"):
                    case.model_class(case.config())
            except (ValueError, StrictDataclassError):
                continue  # the head needs other settings
            found.append(case)
    return found


@functools.cache
def models_of(case: Case) -> dict[torch.dtype, PreTrainedModel]:
    """The model in float32 and in float64, with the same weights."""
    model = case.model()
    return {torch.float32: model, torch.float64: copy.deepcopy(model).double()}


@functools.cache
def parameters_of(case: Case) -> tuple[str, ...]:
    """Names of the arguments of the forward pass."""
    names = inspect.signature(case.model_class.forward).parameters
    return tuple(name for name in names if name not in ("self", "kwargs"))


def _options(draw: st.DrawFn, parameters: tuple[str, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in FLAGS + OWN_FLAGS:
        if (name in parameters or name in FLAGS) and draw(st.integers(0, 3)) == 0:
            options[name] = draw(st.booleans())
    if "logits_to_keep" in parameters and draw(st.booleans()):
        options["logits_to_keep"] = draw(st.sampled_from((0, 1, 2, 5, 100, "indices")))
    if "num_items_in_batch" in parameters and draw(st.integers(0, 4)) == 0:
        options["label_smoothing"] = draw(st.sampled_from((0.0, 0.1, 1.5)))
        options["skip_logits"] = draw(st.booleans())
    if "num_items_in_batch" in parameters and draw(st.integers(0, 4)) == 0:
        options["num_items_in_batch"] = draw(st.sampled_from((1, 7, "tensor")))
    return options


@st.composite
def calls(draw: st.DrawFn, model_type: str) -> Call:
    """Calls of an architecture: half of them without a deliberate fault."""
    case = draw(st.sampled_from(cases_of(model_type)))
    parameters = parameters_of(case)
    inputs = ["ids", "ids", "embeds", "encoder_outputs"][: 4 if case.is_seq2seq else 3]
    earlier = draw(st.lists(st.sampled_from((1, 2, 3, 5, 9)), max_size=2)) if "past_key_values" in parameters else []
    faults = []
    if draw(st.booleans()):
        for name in draw(st.lists(st.sampled_from((*parameters, *FLAGS)), min_size=1, max_size=2, unique=True)):
            faults.append((name, draw(st.sampled_from(FAULTS.get(name, FAULTS["tensor"])))))
    return Call(
        model_type,
        case.auto_name,
        case.variant,
        batch=draw(st.integers(1, 3)),
        length=draw(st.sampled_from((1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 16, 17, 31))),
        source=draw(st.sampled_from((1, 2, 4, 5, 9, 12))),
        seed=draw(st.integers(0, 10**6)),
        mask=draw(st.sampled_from(MASKS)),
        source_mask=draw(st.sampled_from(MASKS)),
        positions=draw(st.sampled_from(POSITIONS)),
        labels=draw(st.sampled_from(("none", "none", "all", "some", "ignored"))),
        inputs=draw(st.sampled_from(inputs)),
        earlier=tuple(earlier),
        options=tuple(_options(draw, parameters).items()),
        faults=tuple(faults),
        is_trained=draw(st.sampled_from((False, False, True))),
    )


# ----------------------------------------------------------------------------------------------- from a record to arguments


def segments_of(call: Call) -> list[dict[str, Any]]:
    """The arguments of the calls before and of the call itself, floating numbers in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(call.seed)
        lengths = (*call.earlier, call.length)
        mask = random_mask(call.mask, call.batch, sum(lengths))
        given = _source_arguments(call) if call.case.is_seq2seq else {}
        segments, past = [], 0
        for length in lengths:
            segments.append(given | _arguments(call, length, past, mask))
            past += length
        for segment in segments[:-1]:
            segment["use_cache"] = True
        last = segments[-1]
        numbers = {"indices": torch.randint(call.length, (2,)), "tensor": torch.tensor(5)}
        last.update({name: numbers.get(value, value) for name, value in call.options})
        if call.labels != "none":
            last.update(_labels(call, last))
        for name, kind in call.faults:
            last[name] = _faulty(call, last, name, kind)
    accepted = {*parameters_of(call.case), *FLAGS, *OF_LOSSES}
    return [{name: value for name, value in segment.items() if name in accepted} for segment in segments]


def _has_types(call: Call) -> bool:
    """Whether the call passes token types: two thirds of those of models that have any."""
    return getattr(call.case.config(), "add_token_type_embeddings", False) and call.seed % 3 > 0


def _source_arguments(call: Call) -> dict[str, Any]:
    """What the encoder of an encoder-decoder reads."""
    model, ids = models_of(call.case)[torch.float64], random_ids(call.batch, call.source)
    source_mask = random_mask(call.source_mask, call.batch, call.source)
    given: dict[str, Any] = {"input_ids": ids}
    with torch.no_grad():
        if call.inputs == "encoder_outputs":
            given = {"encoder_outputs": (model.get_encoder()(ids, attention_mask=source_mask).last_hidden_state,)}
        elif call.inputs == "embeds":
            given = {"inputs_embeds": model.get_input_embeddings()(ids)}
    if _has_types(call):
        given["token_type_ids"] = torch.randint(2, ids.shape)
    return given if source_mask is None else given | {"attention_mask": source_mask}


def _arguments(call: Call, length: int, past: int, mask: torch.Tensor | None) -> dict[str, Any]:
    """What depends on the tokens of one call, which follow `past` others; `mask` (B, all tokens)."""
    case = call.case
    prefix = "decoder_" if case.is_seq2seq else ""
    made = case.inputs(call.batch, length, length)
    name = next(name for name in made if name.startswith(prefix))
    tokens = made[name].double() if made[name].is_floating_point() else made[name]
    arguments: dict[str, Any] = {name: tokens}
    seen = None if mask is None else mask[:, : past + length]
    positions = random_positions(call.positions, seen, call.batch, past, length)
    is_choice = case.auto_name == "AutoModelForMultipleChoice"
    for key, value in ((f"{prefix}attention_mask", seen), ("position_ids", positions)):
        if value is not None:
            arguments[key] = value[:, None].expand(call.batch, 3, value.shape[1]) if is_choice else value
    if call.inputs == "embeds" and name.endswith("input_ids"):
        config = case.config()
        width = getattr(config, "embedding_size", None) or config.hidden_size
        embeds = torch.randn(*arguments.pop(name).shape, width, dtype=torch.float64)
        arguments[name.replace("input_ids", "inputs_embeds")] = embeds
    if not case.is_seq2seq and _has_types(call):
        arguments["token_type_ids"] = torch.randint(2, tokens.shape)
    return arguments


def _labels(call: Call, last: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Labels of the tokens, or of the rows, that are there."""
    labels = call.case.labels(call.case.inputs(call.batch, call.length, call.length))
    mask = _real(call, last, "target")
    for name, tensor in labels.items():
        if mask is not None and call.head != "AutoModelForMultipleChoice":
            is_padding = ~mask if tensor.dim() == 2 else ~mask.any(-1)
            tensor = tensor.masked_fill(is_padding, -100)
        if call.labels == "ignored":
            tensor = torch.full_like(tensor, -100)
        elif call.labels == "some":
            tensor = tensor.masked_fill(torch.rand(tensor.shape) < 0.5, -100)
        labels[name] = tensor
    return labels


def _real(call: Call, last: dict[str, Any], side: str) -> torch.Tensor | None:
    """Which tokens of the call are there, (rows, tokens), on the side "source" or "target"; None: all."""
    is_source = call.case.is_seq2seq and side == "source"
    mask = last.get("decoder_attention_mask" if call.case.is_seq2seq and not is_source else "attention_mask")
    length = call.source if is_source else call.length
    if not isinstance(mask, torch.Tensor) or mask.dim() < 2 or mask.shape[-1] < length:
        return None
    return (mask != 0).flatten(0, -2)[:, -length:]


def real_part(call: Call, last: dict[str, Any], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """An output with zeros where it means nothing: at padding, where norms amplify the rounding of zeros, and in rows without tokens."""
    if "attentions" in name or tensor.dim() == 0:
        return tensor
    masks = [_real(call, last, "source" if "encoder_" in name.replace("decoder_", "") else "target")]
    if call.case.is_seq2seq and "encoder_" not in name.replace("decoder_", ""):
        source = _real(call, last, "source")
        masks.append(None if source is None else source.any(-1, keepdim=True))
    for mask in masks:
        if mask is None:
            continue
        if call.head == "AutoModelForMultipleChoice" and len(tensor) == call.batch:
            mask = mask.view(call.batch, -1)  # every choice, all of its tokens
            mask = mask.all(-1, keepdim=True)
        kept = last.get("logits_to_keep", 0) if name == "logits" else 0
        if (
            mask.shape[1] > 1
            and tensor.dim() > 1
            and isinstance(kept, (int, torch.Tensor))
            and mask.shape[1] == call.length
        ):
            mask = mask[:, kept] if isinstance(kept, torch.Tensor) else mask[:, -kept:]
        if len(mask) != len(tensor):
            continue
        if tensor.dim() < 2 or mask.shape[1] != tensor.shape[1]:
            mask = mask.any(-1, keepdim=True)
        tensor = tensor.masked_fill(~mask.view(*mask.shape, *[1] * (tensor.dim() - 2))[: len(tensor)], 0)
    return tensor


def _faulty(call: Call, last: dict[str, Any], name: str, kind: str) -> Any:
    """A wrong value of the argument `name`."""
    if name in FLAGS + OWN_FLAGS:
        return wrong_switch(kind)
    if name in ("logits_to_keep", "num_items_in_batch", "targets_per_source"):
        return wrong_number(name, kind)
    case = call.case
    if name == "past_key_values":
        return _faulty_cache(call, kind)
    if name == "encoder_outputs":
        return wrong_encoder_outputs(kind, torch.randn(call.batch, call.source, case.config().hidden_size).double())
    tensor = last.get(name)
    if tensor is None:
        tensor = torch.randint(3, VOCABULARY, (call.batch, call.length))
        if name.endswith(("embeds", "hidden_states")):
            tensor = torch.randn(call.batch, call.length, case.config().hidden_size, dtype=torch.float64)
        elif name.endswith("_values"):
            tensor = torch.randn(call.batch, call.length, dtype=torch.float64)
        elif name.endswith("mask"):
            tensor = torch.ones_like(tensor)
    return spoil_tensor(tensor, kind)


def _faulty_cache(call: Call, kind: str) -> Any:
    """A cache that does not fit; a function of the model where it is one of the library's own."""
    case = call.case
    own = getattr(models_of(case)[torch.float64], "get_decoder", lambda: None)() if case.is_seq2seq else None
    stack = own or models_of(case)[torch.float64].base_model
    if not hasattr(stack, "build_cache"):
        return wrong_cache("string" if kind in ("empty", "other_rows", "other_model") else kind, None, None)
    cache = stack.build_cache()
    if kind in ("other_rows", "other_model"):
        others = [other for other in cases_of(call.model_type) if other.auto_name == call.head]
        other = case if kind == "other_rows" else others[(others.index(case) + 1) % len(others)]
        batch = call.batch + 1 if kind == "other_rows" else call.batch
        with torch.no_grad():
            try:
                cache = models_of(other)[torch.float64](**other.inputs(batch, 4, 4), use_cache=True).past_key_values
            except (ValueError, AttributeError):
                cache = stack.build_cache()  # an encoder has none
    return wrong_cache(kind, cache, cache)


# ------------------------------------------------------------------------------------------------------------------ the check


def _as_type(value: Any, dtype: torch.dtype) -> Any:
    """float64 tensors in another precision; half precision stays, since it is a wrong one."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype == torch.float64 else value
    if isinstance(value, tuple):
        return tuple(_as_type(part, dtype) for part in value)
    return value


def _row(value: Any, index: int, batch: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == batch:
        return value[index : index + 1]
    if isinstance(value, tuple):
        return tuple(_row(part, index, batch) for part in value)
    return value


def run(call: Call, segments: list[dict[str, Any]], dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """Output of the call, and what of it means something, by name: of trained calls with the gradients."""
    model = models_of(call.case)[dtype]
    model.train(call.is_trained)
    problem_type = model.config.problem_type  # training records it
    try:
        with torch.set_grad_enabled(call.is_trained):
            outputs: Any = None
            for segment in segments:
                arguments = {name: copy.deepcopy(_as_type(value, dtype)) for name, value in segment.items()}
                if outputs is not None:
                    arguments.setdefault("past_key_values", outputs.past_key_values)
                outputs = model(**arguments)
        if isinstance(outputs, tuple):
            return outputs, {}  # without names
        parts = {name: real_part(call, segments[-1], name, tensor) for name, tensor in named_tensors(outputs)}
        if call.head == "AutoModelForQuestionAnswering" and "attention_mask" in segments[-1]:
            parts.pop("loss", None)  # a softmax over all tokens, padding included
        return outputs, parts | (_gradients(model, parts) if call.is_trained else {})
    finally:
        model.zero_grad(set_to_none=True)
        model.config.problem_type = problem_type


def _gradients(model: PreTrainedModel, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = [tensor for name, tensor in parts.items() if tensor.requires_grad and "attentions" not in name]
    loss = parts["loss"] if "loss" in parts else sum(tensor.square().mean() for tensor in tensors)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        loss.backward()
    found = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {f"gradient of {name}": gradient.clone() for name, gradient in found if gradient is not None}


def check_call(call: Call) -> str:
    """Runs a call in both precisions and by rows.

    Returns:
        "refused" or "computed".

    Raises:
        AssertionError: an error that explains nothing, a result that is not finite, differs between precisions, or depends on other
            rows of the batch.
    """
    segments = segments_of(call)
    results: list[Any] = []
    for dtype in (torch.float64, torch.float32):
        try:
            results.append(run(call, segments, dtype))
        except Exception as error:  # whatever it is: the oracle judges it
            check_documented(error)
            results.append(error)
    double, single = results
    is_refused = isinstance(double, Exception), isinstance(single, Exception)
    wrong = {kind for _, kind in call.faults}
    if any(is_refused):
        # A number of the right type for one of the two models is wrong for the other.
        assert all(is_refused) or wrong & {"float32", "float64"}, f"float64: {double!r}, float32: {single!r}"
        return "refused"
    if not wrong & {"nan", "large"}:
        check_finite((double, single))
        check_same(single[1], double[1], lambda: _moved(call, segments))
    if not call.is_trained and call.batch > 1 and not {*FLAGS, "logits_to_keep"} & {name for name, _ in call.faults}:
        _check_rows(call, segments, double[1])
    return "computed"


def _moved(call: Call, segments: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The result in float64 with weights moved by as much as float32 rounds them."""
    model = models_of(call.case)[torch.float64]
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    move_weights(model)
    try:
        return run(call, segments, torch.float64)[1]
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])


def _check_rows(call: Call, segments: list[dict[str, Any]], parts: dict[str, torch.Tensor]) -> None:
    """Each row gives what it gives alone."""
    for row in range(call.batch):
        own = [
            {
                name: value if name == "logits_to_keep" else _row(value, row, call.batch)
                for name, value in segment.items()
            }
            for segment in segments
        ]
        alone = run(dataclasses.replace(call, batch=1), own, torch.float64)[1]
        for name in (name for name in PER_ROW if name in parts and len(parts[name]) == call.batch):
            here, there = parts[name][row], alone[name][0]
            if any(kind == "nan" for _, kind in call.faults) and not bool(there.isfinite().all()):
                continue  # the spoiled row itself
            check_same(here, there, None, DOUBLE_PRECISION, f"row {row} of `{name}`")
