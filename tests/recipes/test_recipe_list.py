"""The list of recipes, and what a recipe sets in a new model because only it can know."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from factories import TINY_OVERRIDES
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import hf_hybrid.recipes
from hf_hybrid.auto import ARCHITECTURES
from hf_hybrid.recipes import evaluate, list_recipes, training_recipe
from hf_hybrid.recipes.support.models import NewModelArguments, build_new_or_pretrained

FOLDER = Path(hf_hybrid.recipes.__file__).parent


def test_the_list_costs_no_import():
    code = """
import sys
from hf_hybrid.recipes import list_recipes
assert len(list_recipes()) > 15 and all(item.summary.endswith((".", ":")) for item in list_recipes())
assert not {"torch", "transformers.models", "datasets"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_is_listed_and_has_a_script():
    """What is no command stands in `support`."""
    names = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert {item.name for item in list_recipes()} == names
    assert {path.stem.removeprefix("run_") for path in Path("scripts").resolve().glob("run_*.py")} <= names
    for item in list_recipes():
        module = import_module(f"hf_hybrid.recipes.{item.name}")
        assert callable(module.main) and hasattr(module, "RECIPE") == item.trains, item.name
        assert module.__doc__.startswith(item.summary) and len(item.summary) > 20


def test_recipes_that_train_are_found_by_name_and_by_task():
    trained = [item for item in list_recipes() if item.trains]
    assert len({item.task for item in trained}) == len(trained) >= 10
    for item in trained:
        assert training_recipe(item.name) is training_recipe(item.task)
        assert training_recipe(item.name).name == item.name
        assert re.search(rf"\b{item.task}\b", evaluate.__doc__)


@pytest.mark.parametrize(
    ("kind", "message"), [("glu", "Did you mean 'glue'"), ("tokenizer", "The task must be one of .*glue")]
)
def test_unknown_tasks_are_explained(kind, message):
    for args in ({"kind": kind, "output_dir": "eval"}, [kind, "--output_dir", "eval"]):
        with pytest.raises(ValueError, match=message):
            evaluate.main(args)


HEADS = {
    AutoModelForCausalLM: {"is_decoder": True, "is_causal": True, "bidirectional": False},
    AutoModelForMaskedLM: {"is_decoder": False, "is_causal": False, "bidirectional": True},
    AutoModelForSeq2SeqLM: {"is_encoder_decoder": True},
}
CASES = [
    (auto_class, item.model_type)
    for auto_class in HEADS
    for item in ARCHITECTURES
    if auto_class.__name__ in item.heads
]


@pytest.mark.parametrize(
    ("auto_class", "arch"), CASES, ids=[f"{auto_class.__name__[12:]}-{arch}" for auto_class, arch in CASES]
)
def test_a_new_model_is_what_its_task_needs(auto_class, arch, tokenizer):
    """Without a word of the user, and never against it."""
    arguments = NewModelArguments(arch=arch, config_overrides=TINY_OVERRIDES[arch])
    config = build_new_or_pretrained(auto_class, arguments, tokenizer, default_arch="spade").config
    for name, value in HEADS[auto_class].items():
        if not hasattr(AutoConfig.for_model(arch), name):
            continue
        assert getattr(config, name) is value
        if name != "is_encoder_decoder":
            arguments = NewModelArguments(arch=arch, config_overrides={name: not value})
            with pytest.raises(ValueError, match=rf"`config_overrides` set `{name}` to {not value}.*needs {value}"):
                build_new_or_pretrained(auto_class, arguments, tokenizer, default_arch="spade")


def test_a_misspelt_architecture_is_recognised(tokenizer):
    with pytest.raises(ValueError, match="Did you mean the architecture 'seqboat'"):
        build_new_or_pretrained(AutoModelForCausalLM, NewModelArguments(arch="seqbaot"), tokenizer, "spade_lm")


def test_one_name_for_the_architecture_and_one_for_the_checkpoint():
    """In every recipe: `arch` for a new model, `model_name_or_path` for what is read."""
    others = {"config_name", "model_type", "checkpoint", "model", "source", "adapter", "model_path"}
    for path in FOLDER.rglob("*.py"):
        found = set(re.findall(r"^    (\w+): [^=\n]* = field\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert not found & others, path.name
