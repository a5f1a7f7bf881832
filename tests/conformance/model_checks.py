"""Test classes that run Transformers' own checks of models and configurations over the architectures of this library.

Every head of every architecture in `hf_hybrid.auto.ARCHITECTURES` becomes one test class, with the small configuration of
`factories.py`. The checks know the heads of the library by the class names in its tables of Auto classes; those tables are
extended by ours, in the namespace of the checks only, so that each head is asked what its kind of head is asked.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import unittest
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from factories import GENERATIVE_HEADS, Case, all_heads, one_of_each_kind, shallow_settings
from source_distribution import load
from transformers import PreTrainedConfig

from hf_hybrid.auto import ARCHITECTURES

BATCH, SOURCE_LENGTH, TARGET_LENGTH = 3, 9, 7
NEWER_RELEASES = "a check of newer releases"


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

    batch_size = BATCH
    num_choices = 3

    def __init__(self, parent: unittest.TestCase, case: Case) -> None:
        self.parent, self.case = parent, case
        self.is_training = bool(case.labels(case.inputs()))  # whether the head has a loss
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
        config = self.case.config(**shallow_settings(self.case.model_type))
        # The checks ask the configuration whether there is a decoder; a head on an encoder may have that of both.
        config.is_encoder_decoder = self.case.is_seq2seq
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """Configuration and inputs; the last of several texts is padded on the right.

        Encoder-decoders get no mask: the checks would take that of the source for the target, which is shorter.
        """
        inputs = self.case.inputs(BATCH, SOURCE_LENGTH, TARGET_LENGTH)
        if self.case.auto_name == "AutoModelForMultipleChoice":  # the checks repeat the texts for each choice
            inputs = {name: value[:, 0] for name, value in inputs.items()}
        if "input_ids" in inputs and not self.case.is_seq2seq:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][-1, -2:] = 0
        return self.get_config(), {name: value.to(torch_device()) for name, value in inputs.items()}


def torch_device() -> str:
    """The device that the checks of Transformers use."""
    return load("test_modeling_common").torch_device


class Overrides:
    """The checks that are changed for some models. The first line of each says why; docs/conformance.md repeats it."""

    case: Case
    model_tester: ModelTester

    def test_retain_grad_hidden_states_attentions(self) -> None:
        """Attention weights are computed beside the output, which is never made from them: no gradient reaches them."""
        with mock.patch.object(type(self), "has_attentions", False):
            super().test_retain_grad_hidden_states_attentions()

    def test_attention_outputs(self) -> None:
        """Local attention never forms its weights: only those of the other stacks can be returned."""
        if self.case.has_attentions or not self.case.is_seq2seq:
            return super().test_attention_outputs()
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.case.model_class._from_config(config, attn_implementation="eager").eval().to(torch_device())
        outputs = model(**inputs, output_attentions=True)
        heads, depth = config.num_attention_heads, self.model_tester.num_hidden_layers
        for weights, keys in ((outputs.decoder_attentions, TARGET_LENGTH), (outputs.cross_attentions, SOURCE_LENGTH)):
            assert [tuple(layer.shape) for layer in weights] == [(BATCH, heads, TARGET_LENGTH, keys)] * depth
        return None

    def test_load_with_mismatched_shapes(self) -> None:
        """`AutoModel` of an encoder-decoder has a decoder, also where this head is on the encoder alone."""
        has_decoder = Case(self.case.model_type, "AutoModel", self.case.variant).is_seq2seq
        with mock.patch.object(type(self), "is_encoder_decoder", has_decoder):
            super().test_load_with_mismatched_shapes()

    def test_model_get_set_embeddings(self) -> None:
        """Heads on real numbers (pixels, samples) embed them by a line, not by a table."""
        if "input_ids" in self.case.inputs():
            return super().test_model_get_set_embeddings()
        model = self.case.model_class(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), torch.nn.Module)
        new = torch.nn.Linear(1, 10)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new
        assert model.get_output_embeddings() is None

    def test_model_base_model_prefix(self) -> None:
        """An encoder-decoder of two stacks of the same class has no base model that holds both."""
        if not self._is_made_of_two_stacks():
            return super().test_model_base_model_prefix()
        self._check_stacks()
        return None

    def test_base_model_prefix_loads_base_weights(self) -> None:
        """The same: each stack is a model that can be saved and loaded alone."""
        if self._is_made_of_two_stacks():
            return self._check_stacks()
        check = getattr(super(), "test_base_model_prefix_loads_base_weights", None)
        if check is None:
            self.skipTest(NEWER_RELEASES)
        return check()

    def test_keep_in_fp32_modules(self) -> None:
        """In earlier releases the check wants every tensor in half precision, integers too."""
        check = super().test_keep_in_fp32_modules
        if "is_floating_point" not in inspect.getsource(check):
            self.skipTest(NEWER_RELEASES)
        check()

    def _is_made_of_two_stacks(self) -> bool:
        model = self.case.model_class(self.model_tester.get_config())
        return self.case.is_seq2seq and type(model.get_encoder()) is type(model.get_decoder())

    def _check_stacks(self) -> None:
        """Encoder and decoder come back from a checkpoint of their own."""
        model = self.case.model_class(copy.deepcopy(self.model_tester.get_config()))
        for stack in (model.get_encoder(), model.get_decoder()):
            with tempfile.TemporaryDirectory() as folder:
                stack.save_pretrained(folder)
                loaded, report = type(stack).from_pretrained(folder, output_loading_info=True)
            assert not report["unexpected_keys"]
            state = loaded.state_dict()
            assert all(torch.equal(state[name], value) for name, value in stack.state_dict().items())


class WideEnoughToLearn:
    """Changes the check that a causal language model learns a text by heart in 300 steps."""

    case: Case
    model_tester: ModelTester

    def test_training_overfit(self) -> None:
        """Models of width 16 learn too slowly for the check: they get a width of 64, as its own models have."""
        config = self.case.config(hidden_size=64)
        with mock.patch.object(self.model_tester, "get_config", lambda: config):
            super().test_training_overfit()


def build_model_test(case: Case) -> type[unittest.TestCase]:
    """The test class of one head."""
    common = load("test_modeling_common")
    mixins: list[type] = [Overrides, common.ModelTesterMixin]
    if case.model_class.can_generate():
        mixins.append(common.GenerationTesterMixin)
    if case.is_causal and case.auto_name == "AutoModelForCausalLM":
        mixins += [WideEnoughToLearn, load("test_training_mixin").TrainingTesterMixin]

    def set_up(self: Any) -> None:
        self.model_tester = ModelTester(self, case)

    members = {
        "__doc__": f"The common checks of models on {case.model_class.__name__}.",
        "__module__": __name__,
        "setUp": set_up,
        "case": case,
        "model_tester": None,
        "all_model_classes": (case.model_class,),
        "is_encoder_decoder": case.is_seq2seq,
        "has_attentions": case.has_attentions or case.is_seq2seq,
        "test_resize_embeddings": "input_ids" in case.inputs(),
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
    """Test classes of every head and every configuration class, by name.

    The default suite runs one head of each kind, and every generative one; the others are marked as wide.
    """
    know_our_heads(load("test_modeling_common"))
    cases = all_heads() + all_heads(other_inputs=True)
    classes = [build_model_test(case) for case in cases]
    kept = one_of_each_kind(cases) + [case for case in cases if case.auto_name in GENERATIVE_HEADS]
    for case, test_class in zip(cases, classes):
        if case not in kept:
            test_class.pytestmark = [pytest.mark.wide]  # type: ignore[attr-defined]
    classes += [
        build_config_test(next(case for case in cases if case.model_type == architecture.model_type))
        for architecture in ARCHITECTURES
    ]
    return {test_class.__name__: test_class for test_class in classes}
