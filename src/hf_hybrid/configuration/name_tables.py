"""Enters model classes where tools look classes up by name.

Besides the Auto classes, Transformers keeps tables of class names and bases decisions on them: for label smoothing
`Trainer` shifts labels only if the name is among the causal language models, and lm-eval chooses its backend by the
model type. `transformers serve` and trainers of TRL load `transformers.<architectures[0]>`. Registration with the Auto
classes reaches none of these.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType


def _library_modules() -> list[ModuleType]:
    """Every module object of Transformers in use: `processing_utils` executes the package again and replaces the
    module object, but earlier imports keep the old one."""
    import_module("transformers.processing_utils")
    found = {id(sys.modules["transformers"]): sys.modules["transformers"]}
    for importer in list(sys.modules.values()):
        module = getattr(importer, "__dict__", {}).get("transformers")
        if isinstance(module, ModuleType) and module.__name__ == "transformers":
            found[id(module)] = module
    return list(found.values())


def enter_names(model_type: str, heads: Mapping[str, str], classes: Mapping[str, type] | None = None) -> None:
    """Enters the heads of one architecture in the tables of names and in the namespace of Transformers.

    Args:
        model_type: the name in `config.json`.
        heads: name of the Auto class -> name of the model class.
        classes: name of a model class -> the class. Other names are bound to their Auto class, which finds the model
            class by the `auto_map` of a checkpoint; existing names are not replaced.
    """
    modeling_auto = import_module("transformers.models.auto.modeling_auto")
    modules = _library_modules()
    for auto_name, class_name in heads.items():
        auto_class = getattr(modeling_auto, auto_name)
        # lm-eval would take every checkpoint of a type with both heads for an encoder-decoder.
        if auto_name != "AutoModelForSeq2SeqLM" or "AutoModelForCausalLM" not in heads:
            auto_class._model_mapping._model_mapping[model_type] = class_name
        for module in modules:
            if classes is not None and class_name in classes:
                setattr(module, class_name, classes[class_name])
            elif class_name not in vars(module):
                setattr(module, class_name, auto_class)


__all__ = ["enter_names"]
