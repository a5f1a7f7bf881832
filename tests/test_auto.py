"""The table of architectures: complete, consistent and registered with every Auto class."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module, reload
from pathlib import Path

import pytest
import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_hybrid
from hf_hybrid.auto import (
    ARCHITECTURES,
    Architecture,
    load_config_class,
    load_heads,
    public_classes,
    register,
    register_architecture,
)

ROOT = Path(__file__).resolve().parents[1]
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.model_type)


@EVERY_ARCHITECTURE
class TestArchitecture:
    def test_configuration(self, architecture: Architecture) -> None:
        config_class = load_config_class(architecture)
        assert config_class.model_type == architecture.model_type
        assert CONFIG_MAPPING[architecture.model_type] is config_class
        assert type(transformers.AutoConfig.for_model(architecture.model_type)) is config_class

    def test_heads(self, architecture: Architecture) -> None:
        config_class = load_config_class(architecture)
        for auto_name, model_class in load_heads(architecture):
            assert issubclass(model_class, PreTrainedModel)
            assert model_class.config_class is config_class
            assert getattr(transformers, auto_name)._model_mapping[config_class] is model_class
            generates = auto_name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
            assert issubclass(model_class, GenerationMixin) == generates

    def test_modules_are_complete(self, architecture: Architecture) -> None:
        """What a modeling module declares public is what the table registers, and the base class."""
        module = import_module(f"{architecture.package}.{architecture.modeling}")
        declared = {name for name in module.__all__ if not name.endswith("PreTrainedModel")}
        assert declared == set(architecture.heads.values())

    def test_what_others_read(self, architecture: Architecture) -> None:
        """Page, paper, and the fields of the published classifier exist."""
        if architecture.package == "hf_hybrid":
            assert architecture.docs is not None and (ROOT / architecture.docs).is_file()
            assert architecture.paper is not None and architecture.paper.url in (ROOT / "CITATION.cff").read_text()
        config = load_config_class(architecture)()
        fields = {name: getattr(config, name) for name in type(config).__dataclass_fields__}
        published = architecture.published_classifier.items()
        changed = {name: value(fields) if callable(value) else value for name, value in published}
        assert changed.keys() <= fields.keys()
        config = load_config_class(architecture)(**changed)
        assert {name: getattr(config, name) for name in changed} == changed

    def test_class_names_of_the_library_are_left_alone(self, architecture: Architecture) -> None:
        assert not set(architecture.heads.values()) & set(transformers.__all__)

    def test_names_by_which_tools_decide(self, architecture: Architecture) -> None:
        """`transformers serve` loads `transformers.<class name>`; `Trainer` and lm-eval ask the tables of names."""
        has_both = {"AutoModelForCausalLM", "AutoModelForSeq2SeqLM"} <= architecture.heads.keys()
        for auto_name, model_class in load_heads(architecture):
            assert getattr(transformers, model_class.__name__) is model_class
            names = getattr(transformers, auto_name)._model_mapping._model_mapping
            if auto_name == "AutoModelForSeq2SeqLM" and has_both:
                assert (
                    architecture.model_type not in names
                )  # lm-eval would take causal checkpoints for encoder-decoders
            else:
                assert names[architecture.model_type] == model_class.__name__


def test_model_types_and_classes_are_unique() -> None:
    types = [architecture.model_type for architecture in ARCHITECTURES]
    classes = [name for architecture in ARCHITECTURES for name in architecture.heads.values()]
    assert len(set(types)) == len(types) and len(set(classes)) == len(classes)


def test_public_names_resolve() -> None:
    assert set(public_classes()) < set(hf_hybrid.__all__)
    for name in hf_hybrid.__all__:
        assert getattr(hf_hybrid, name) is not None
        assert name in dir(hf_hybrid)
    namespace: dict = {}
    exec("from hf_hybrid import *", namespace)
    assert set(hf_hybrid.__all__) - {"__version__"} <= namespace.keys()
    with pytest.raises(AttributeError, match="no attribute 'SpadeModl'. Did you mean 'SpadeModel'"):
        hf_hybrid.SpadeModl  # noqa: B018


def test_registering_again_is_harmless() -> None:
    before = len(sys.meta_path)
    for _ in range(3):
        register()
        reload(hf_hybrid)
    assert len(sys.meta_path) == before
    config_class = load_config_class(ARCHITECTURES[0])
    assert CONFIG_MAPPING[ARCHITECTURES[0].model_type] is config_class


def test_nothing_else_knows_an_architecture_by_name() -> None:
    """Outside of its own files and its record a model type stands in texts only, and as the default of a recipe."""
    types = {architecture.model_type for architecture in ARCHITECTURES}
    source = ROOT / "src" / "hf_hybrid"
    own = re.compile(r"auto\.py|(modeling|conversion|configuration)/.*(" + "|".join(types) + ")")
    found = []
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defaults = {
            id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "default_arch"
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and node.value in types
                and id(node) not in defaults
                and not own.match(name)
            ):
                found.append(f"{name}:{node.lineno}")
    assert not found, "read it from the record"


def test_taken_names_are_refused() -> None:
    before = list(ARCHITECTURES)
    other = {"title": "Other", "package": "other", "config": "c:C", "modeling": "m"}
    with pytest.raises(ValueError, match="`model_type` 'mega' already belongs to hf_hybrid"):
        register_architecture(Architecture(model_type="mega", heads={"AutoModel": "OtherModel"}, **other))
    with pytest.raises(ValueError, match="`heads` of 'other' name classes of other architectures: MegaModel"):
        register_architecture(Architecture(model_type="other", heads={"AutoModel": "MegaModel"}, **other))
    assert before == ARCHITECTURES
    register_architecture(ARCHITECTURES[0])
    assert before == ARCHITECTURES


CHECK = """
import sys, transformers
for model_type, auto_name, class_name in {heads!r}:
    config = transformers.AutoConfig.for_model(model_type)
    found = getattr(transformers, auto_name)._model_mapping[type(config)]
    assert found.__name__ == class_name and found.__module__.startswith("hf_hybrid."), found
    assert getattr(sys.modules["transformers"], class_name) is found
"""
HEADS = [
    (architecture.model_type, auto_name, class_name)
    for architecture in ARCHITECTURES
    for auto_name, class_name in architecture.heads.items()
]


ORDERS = [
    "import hf_hybrid",
    # a module of Transformers that imports the Auto classes while it is itself being imported
    "import hf_hybrid; from transformers.models.t5.modeling_t5 import T5Model",
]
FURTHER_ORDERS = [
    "from hf_hybrid.modeling.spade.modeling_spade import SpadeModel",
    "from transformers import AutoModel, AutoConfig; import hf_hybrid",
    "from transformers import AutoConfig; import hf_hybrid, importlib; importlib.reload(hf_hybrid)",
    "from hf_hybrid.pipelines import Seq2SeqSummarizationPipeline",
    "import hf_hybrid; hf_hybrid.Seq2SeqSummarizationPipeline",
    "import hf_hybrid.ops.fft_conv, transformers.modeling_layers",
    "import hf_hybrid, transformers.modeling_utils",
    "import hf_hybrid, transformers.generation.utils",
    "import hf_hybrid.auto, importlib; importlib.reload(hf_hybrid.auto).register()",
    "import hf_hybrid, peft",
]


@pytest.mark.parametrize("imports", ORDERS + [pytest.param(order, marks=pytest.mark.wide) for order in FURTHER_ORDERS])
def test_registration_in_any_order_of_imports(imports: str) -> None:
    """In a fresh process, whichever module was imported first."""
    code = imports + CHECK.format(heads=HEADS)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
