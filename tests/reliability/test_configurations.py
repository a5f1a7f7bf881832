"""What if a configuration holds nonsense: sizes that no machine holds, numbers that are none, ranges below zero."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import all_variants, main_output
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from hf_hybrid.configuration.configuration_bst import BstConfig
from hf_hybrid.configuration.configuration_longvq import LongVQConfig
from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.configuration.configuration_spade import SpadeConfig, SpadeLMConfig

CONFIGURATIONS = (SpadeConfig, SpadeLMConfig, BstConfig, LongVQConfig, SeqBoatConfig, MegaConfig)
OF_TRANSFORMERS = {"chunk_size_feed_forward"}  # read by no model of this library


def fields_of(kind: type) -> list[tuple[type[PreTrainedConfig], str]]:
    """Every field of every configuration whose default is of this kind."""
    found = []
    for cls in CONFIGURATIONS:
        config = cls()
        for field in fields(cls):
            if type(getattr(config, field.name)) is kind and field.name not in OF_TRANSFORMERS:
                found.append((cls, field.name))
    return found


def fields_by_name(config: PreTrainedConfig) -> list[str]:
    return [field.name for field in fields(config)]


def write(folder: Path, cls: type[PreTrainedConfig], **changes: Any) -> Path:
    """A stored configuration that no constructor has seen."""
    stored = {**cls().to_dict(), "model_type": cls.model_type, **changes}
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(("cls", "name"), fields_of(int))
@pytest.mark.parametrize("value", [10**12, 10**30, -(10**12)])
def test_absurd_sizes_are_refused_before_anything_is_allocated(cls, name, value, tmp_path):
    with pytest.raises(Exception, match=f"`{name}`"):
        AutoModel.from_config(AutoConfig.from_pretrained(write(tmp_path, cls, **{name: value})))


@pytest.mark.parametrize(("cls", "name"), fields_of(float))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(cls, name, value, tmp_path):
    with pytest.raises(Exception, match=f"`{name}`.*finite"):
        cls(**{name: value})
    with pytest.raises(Exception, match=f"`{name}`.*finite"):
        AutoConfig.from_pretrained(write(tmp_path, cls, **{name: value}))


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls, name in fields_of(float) if "_range" in name or "init" in name]
)
def test_ranges_of_initial_values_are_not_negative(cls, name):
    with pytest.raises(Exception, match=f"`{name}`"):
        cls(**{name: -0.02})


@pytest.mark.parametrize("cls", CONFIGURATIONS)
def test_tables_that_fit_no_machine_are_refused(cls):
    """Each size alone would pass."""
    with pytest.raises(Exception, match="`vocab_size`.*`hidden_size`"):
        cls(vocab_size=2**27, hidden_size=2**19)


def test_numbers_inside_lists_count_too():
    with pytest.raises(Exception, match="`adaptive_cutoffs`"):
        MegaConfig(adaptive_cutoffs=[10**12])


@pytest.mark.parametrize(("cls", "name"), fields_of(float))
@pytest.mark.parametrize("value", [10**30, 1e300])
def test_numbers_beyond_all_precision_are_refused(cls, name, value):
    with pytest.raises(Exception, match=name):
        cls(**{name: value})


@pytest.mark.parametrize("cls", CONFIGURATIONS)
def test_what_forward_passes_return_is_switched_by_booleans(cls):
    for name in ("return_dict", "output_hidden_states"):
        for wrong in ({"a": 1}, "yes", 1.5, ["a"]):
            # Transformers 5.17 checks the type itself.
            with pytest.raises(Exception, match=f"`{name}` must be True, False or None|Field '{name}' with value"):
                cls(**{name: wrong})
    try:
        PreTrainedConfig(output_hidden_states=[0, -1])
    except StrictDataclassError:  # Transformers 5.17 accepts no list of layers
        return
    assert cls(output_hidden_states=[0, -1]).output_hidden_states == [0, -1]


def test_large_numbers_that_are_no_sizes_pass():
    assert SpadeConfig(rotary_base=5e6).rotary_base == 5e6


@pytest.mark.parametrize("cls", CONFIGURATIONS)
def test_labels_of_classifiers(cls):
    for wrong in (0, -1, 10**12):
        with pytest.raises(ValueError, match="`num_labels` must lie between 1 and"):
            cls(num_labels=wrong)
    for wrong in ("3", [], 1.5):
        with pytest.raises(TypeError, match="`num_labels` must be an int"):
            cls(num_labels=wrong)
    # Transformers 5.17 checks the type itself.
    with pytest.raises(Exception, match="`problem_type` must be one of 'regression'|'problem_type' expected one of"):
        cls(problem_type="classification")


@pytest.mark.parametrize("case", [case for case in all_variants() if case.variant == "default"], ids=str)
def test_initial_values_without_a_spread(case):
    """A spread of 0 is refused, or nothing is divided by it."""
    names = [name for name in fields_by_name(case.config()) if name.endswith(("initializer_range", "init_std"))]
    assert names
    try:
        model = case.model_class(case.config(**dict.fromkeys(names, 0.0))).eval()
    except StrictDataclassError as error:
        assert "must be greater than 0" in str(error)
        return
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    with torch.no_grad():
        assert main_output(model(**case.inputs())).isfinite().all()
