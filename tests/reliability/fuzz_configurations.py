"""Random configurations of every architecture, built from their own fields, and what they must end with.

A drawn configuration is a record of the fields that differ from a small one, so that `check_settings(Settings(...))` replays it.
"""

from __future__ import annotations

import inspect
import math
import tempfile
import types
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin

import torch
from factories import VARIANTS, Case, main_output, perturb
from fuzz_calls import find_architecture
from fuzz_oracle import check_documented, check_finite, check_same, move_weights
from huggingface_hub.errors import StrictDataclassError
from hypothesis import strategies as st
from transformers import PreTrainedConfig, PreTrainedModel

from hf_hybrid.auto import load_config_class

# Fields of Transformers that change what a model computes or returns; the others are the business of Transformers.
OF_TRANSFORMERS = ("is_encoder_decoder", "return_dict", "output_hidden_states")
SMALL_ENOUGH = 2_000_000  # parameters of a model that is built
ABSURD = (10**12, -(10**12), 10**30, math.nan, math.inf, -math.inf)
OF_WRONG_TYPE = ("3", "nonsense", [], ["a"], {}, {"a": 1}, [None], [[1]], 1.5, True, None, (), -1, 0)
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "gelu_new", "quick_gelu", "sigmoid", "linear")


@dataclass(frozen=True)
class Settings:
    """A configuration: the first variant of its architecture with other values in some fields, for one of the heads."""

    model_type: str
    head: str
    seed: int
    changes: tuple[tuple[str, Any], ...]

    @property
    def case(self) -> Case:
        return Case(self.model_type, self.head, next(iter(VARIANTS[self.model_type])))


def own_fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Type of every field that the architecture has itself, and of a few that all have."""
    kinds: dict[str, Any] = {
        "num_labels": int,
        "problem_type": Literal[None, "regression", "single_label_classification", "other"],
    }
    for base in reversed(config_class.__mro__):
        if not base.__module__.startswith("transformers.") and issubclass(base, PreTrainedConfig):
            kinds |= inspect.get_annotations(base, eval_str=True)
    named = {field.name for field in fields(config_class)}
    own = {name: kind for name, kind in kinds.items() if name in named or name == "num_labels"}
    return dict.fromkeys(OF_TRANSFORMERS, bool) | own


def values_of(name: str, kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field that its type allows, small ones and those at the edge."""
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of([values_of(name, part) for part in get_args(kind)])
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is list:
        return st.lists(st.integers(-2, 4), max_size=3)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.sampled_from((1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 32, 64))
    if kind is float:
        return st.sampled_from((0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0, 2.0))
    if kind is str:
        return st.sampled_from(ACTIVATIONS)
    return st.none()


@st.composite
def settings_of(draw: st.DrawFn, model_type: str) -> Settings:
    """Configurations with up to four changed fields: two thirds with values of the right type, one third with an absurd one too."""
    architecture = find_architecture(model_type)
    kinds = own_fields(load_config_class(architecture))
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=4, unique=True))
    changes = {name: draw(values_of(name, kinds[name])) for name in names}
    if draw(st.integers(0, 2)) == 0:
        changes[draw(st.sampled_from(sorted(kinds)))] = draw(st.sampled_from((*ABSURD, *OF_WRONG_TYPE)))
    head = draw(st.sampled_from(sorted(architecture.heads)))
    return Settings(model_type, head, draw(st.integers(0, 10**6)), tuple(changes.items()))


def check_settings(settings: Settings) -> str:
    """Builds the configuration, saves and loads it, and runs a small model of it.

    Returns:
        "refused", "too large" to be run, or "computed".

    Raises:
        AssertionError: an error that explains nothing, a configuration that changes when it is saved, a result that is not finite
            or differs between float32 and float64.
    """
    case = settings.case
    try:
        config = case.config(**dict(settings.changes))
    except Exception as error:  # whatever it is: the oracle judges it
        _check_refused(error)
        return "refused"
    _check_round_trip(config)
    try:
        with torch.device("meta"):
            model = case.model_class(config)
    except Exception as error:
        _check_refused(error)
        return "refused"
    if sum(parameter.numel() for parameter in model.parameters()) > SMALL_ENOUGH:
        return "too large"
    torch.manual_seed(settings.seed)
    model = perturb(case.model_class(config), seed=settings.seed).eval()
    inputs = _inputs(model, case)
    try:
        with torch.no_grad():
            model(**inputs)  # whatever kind of output the configuration asks for
            single = model(**inputs, return_dict=True)
            check_finite(single)
            if settings.seed % 10 == 0:
                _check_stored(model, case, inputs, single)
            double = model.double()(**_double(inputs), return_dict=True)
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
        check_documented(error)
        return "refused"
    check_finite(double)
    check_same(_real_output(single, inputs), _real_output(double, inputs), lambda: _moved(model, inputs))
    return "computed"


def _check_refused(error: Exception) -> None:
    """The checks of types and of classes by huggingface_hub wrap the error; both name the field."""
    if isinstance(error, StrictDataclassError):
        cause = error.__cause__
        assert isinstance(cause, (ValueError, TypeError)), repr(error)
        if "Class validation error" in str(error):
            check_documented(cause, of_transformers=True)
        else:
            assert "field '" in str(error), repr(error)
        return
    check_documented(error, of_transformers=True)


def _check_round_trip(config: PreTrainedConfig) -> None:
    """`to_dict` and `from_dict`, and a file, keep every field."""
    kept = config.to_dict()
    assert type(config).from_dict(config.to_dict()).to_dict() == kept
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = type(config).from_pretrained(folder).to_dict()
    ignored = ("transformers_version", "_name_or_path")
    changed = {name: (kept.get(name), loaded.get(name)) for name in {*kept, *loaded} - {*ignored}}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    assert not changed, f"saving changes {changed}"


def _check_stored(model: PreTrainedModel, case: Case, inputs: dict[str, Any], expected: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = case.model_class.from_pretrained(folder).eval()
    # Weights of a file lie at other addresses, for which sums in blocks may be taken in another order.
    check_same(main_output(loaded(**inputs, return_dict=True)), main_output(expected), None, 1e-6, "saved and loaded")


def _inputs(model: PreTrainedModel, case: Case) -> dict[str, torch.Tensor]:
    """Inputs of two rows, the first padded on the left, of ids that the vocabulary holds; pairs for models of pairs."""
    config = model.config
    inputs = case.inputs(2, 11, 6)
    size = getattr(config, "image_size", None)
    if "pixel_values" in inputs and size is not None:
        inputs["pixel_values"] = torch.randn(2, 1, size, size)
    if getattr(config, "input_type", "tokens") == "values" and "input_ids" in inputs:
        inputs = {"input_values": torch.randn(2, 11)}
    if getattr(config, "dual_encoder", False):
        inputs["pair_input_ids"] = inputs.get("input_ids", torch.ones(2, 5, dtype=torch.long))
    inputs = {
        name: value if value.is_floating_point() else value % config.vocab_size for name, value in inputs.items()
    }
    if "input_ids" in inputs:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, ..., :3] = 0
        inputs["attention_mask"] = mask
    return inputs


def _double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def _moved(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output in float64 with weights moved by as much as float32 rounds them."""
    move_weights(model)
    with torch.no_grad():
        return {"": _real_output(model(**_double(inputs), return_dict=True), inputs)}


def _real_output(outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The output of a head, with zeros at padding, where norms amplify the rounding of zeros."""
    output, mask = main_output(outputs), inputs.get("attention_mask")
    if mask is None or mask.shape != output.shape[:2] or "decoder_input_ids" in inputs:
        return output
    return output.masked_fill((mask == 0).view(*mask.shape, *[1] * (output.dim() - 2)), 0)
