"""Test classes that run Transformers' own checks of models and configurations over the architectures of this library.

Every head of every architecture in `hf_hybrid.auto.ARCHITECTURES` becomes one test class, with the small configuration of
`factories.py`. The checks know the heads of the library by the class names in its tables of Auto classes; those tables are
extended by ours, in the namespace of the checks only, so that each head is asked what its kind of head is asked.
"""

from __future__ import annotations

import unittest
from types import ModuleType
from typing import Any

import torch
import transformers
from factories import Case, all_heads, shallow_settings
from source_distribution import load
from transformers import PreTrainedConfig

from hf_hybrid.auto import ARCHITECTURES, load_config_class

BATCH, SOURCE_LENGTH, TARGET_LENGTH = 3, 9, 7


def know_our_heads(common: ModuleType) -> None:
    """Adds the heads of `ARCHITECTURES` to the tables of class names that the checks look heads up in."""
    tables = {name: table for name, table in vars(common).items() if name.endswith("MAPPING_NAMES")}
    for architecture in ARCHITECTURES:
        for auto_name, class_name in architecture.heads.items():
            names = getattr(transformers, auto_name)._model_mapping._model_mapping
            for table_name, table in tables.items():
                if table is names:
                    extended = getattr(common, table_name)
                    setattr(common, table_name, {**extended, architecture.model_type: class_name})


class ModelTester:
    """What the checks ask about one head: its configuration, its inputs, and a few sizes.

    Args:
        parent: the test case.
        case: head and small configuration.
    """

    is_training = True
    batch_size = BATCH
    num_choices = 3

    def __init__(self, parent: unittest.TestCase, case: Case) -> None:
        self.parent, self.case = parent, case
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        self.encoder_seq_length = self.seq_length = SOURCE_LENGTH
        self.key_length = SOURCE_LENGTH
        if case.is_seq2seq:
            self.seq_length = self.decoder_seq_length = TARGET_LENGTH
        elif case.auto_name == "AutoModelForImageClassification":
            self.encoder_seq_length = self.seq_length = self.key_length = case.inputs()["pixel_values"][0].numel()

    def get_config(self) -> PreTrainedConfig:
        return self.case.config(**shallow_settings(self.case.model_type))

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """Configuration and inputs; texts of different lengths, the last one padded on the right."""
        inputs = self.case.inputs(BATCH, SOURCE_LENGTH, TARGET_LENGTH)
        if self.case.auto_name == "AutoModelForMultipleChoice":  # the checks repeat the texts for each choice
            inputs = {name: value[:, 0] for name, value in inputs.items()}
        if "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][-1, -2:] = 0
        return self.get_config(), {name: value.to(torch_device()) for name, value in inputs.items()}


def torch_device() -> str:
    """The device that the checks of Transformers use."""
    return load("test_modeling_common").torch_device


def build_model_test(case: Case) -> type[unittest.TestCase]:
    """The test class of one head."""
    common, training = load("test_modeling_common"), load("test_training_mixin")
    mixins: list[type] = [common.ModelTesterMixin]
    if case.auto_name == "AutoModelForCausalLM":
        mixins.append(training.TrainingTesterMixin)
    if case.model_class.can_generate():
        mixins.append(common.GenerationTesterMixin)

    def set_up(self: Any) -> None:
        self.model_tester = ModelTester(self, case)

    members = {
        "__doc__": f"The common checks of models on {case.model_class.__name__}.",
        "__module__": __name__,
        "setUp": set_up,
        "model_tester": None,
        "all_model_classes": (case.model_class,),
        "is_encoder_decoder": case.is_seq2seq,
        "has_attentions": case.has_attentions,
        "test_can_init_all_missing_weights_before_2023": True,  # or the check is skipped: our files carry no year
    }
    return type(f"{case.model_class.__name__}Test", (*mixins, unittest.TestCase), members)


def build_config_test(case: Case) -> type[unittest.TestCase]:
    """The test class of one configuration class."""
    tester_class = load("test_configuration_common").ConfigTester
    config_class = type(case.config())

    def test_config(self: unittest.TestCase) -> None:
        self.model_tester = ModelTester(self, case)
        given = case.config().to_diff_dict()
        for name in ("model_type", "transformers_version"):
            given.pop(name, None)
        tester_class(self, config_class=config_class, **given).run_common_tests()

    return type(f"{config_class.__name__}Test", (unittest.TestCase,), {"test_config": test_config})


def all_test_classes() -> dict[str, type[unittest.TestCase]]:
    """Test classes of every head and every configuration class, by name."""
    know_our_heads(load("test_modeling_common"))
    cases = all_heads() + all_heads(other_inputs=True)
    classes = [build_model_test(case) for case in cases]
    classes += [
        build_config_test(next(case for case in cases if case.model_type == architecture.model_type))
        for architecture in ARCHITECTURES
        if load_config_class(architecture)
    ]
    return {test_class.__name__: test_class for test_class in classes}
