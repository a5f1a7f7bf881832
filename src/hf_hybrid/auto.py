"""The one table of architectures: configuration -> heads -> Auto classes. Nothing else registers anything.

A new architecture adds one `Architecture` entry here; `import hf_hybrid` registers it, and every test that runs over all
architectures finds it through `ARCHITECTURES`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


@dataclass(frozen=True)
class Architecture:
    """One model type.

    Args:
        model_type: the name in `config.json`.
        config: "module:class", the module relative to this package.
        modeling: module that defines the model classes.
        heads: name of the Auto class -> name of the model class.
        image_processor, feature_extractor: "module:class" of what prepares images and recordings, or None.
    """

    model_type: str
    config: str
    modeling: str
    heads: dict[str, str]
    image_processor: str | None = None
    feature_extractor: str | None = None


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_type="spade",
        config="configuration.configuration_spade:SpadeConfig",
        modeling="modeling.spade.spade_heads",
        heads={
            "AutoModel": "SpadeModel",
            "AutoModelForSeq2SeqLM": "SpadeForConditionalGeneration",
            "AutoModelForSequenceClassification": "SpadeForSequenceClassification",
            "AutoModelForTokenClassification": "SpadeForTokenClassification",
            "AutoModelForQuestionAnswering": "SpadeForQuestionAnswering",
            "AutoModelForTextEncoding": "SpadeEncoderModel",
        },
    ),
    Architecture(
        model_type="spade_lm",
        config="configuration.configuration_spade:SpadeLMConfig",
        modeling="modeling.spade.spade_lm_heads",
        heads={
            "AutoModel": "SpadeLMModel",
            "AutoModelForCausalLM": "SpadeLMForCausalLM",
            "AutoModelForSequenceClassification": "SpadeLMForSequenceClassification",
        },
    ),
    Architecture(
        model_type="mega",
        config="configuration.configuration_mega:MegaConfig",
        modeling="modeling.mega.mega_heads",
        heads={
            "AutoModel": "MegaModel",
            "AutoModelForCausalLM": "MegaForCausalLM",
            "AutoModelForSeq2SeqLM": "MegaForConditionalGeneration",
            "AutoModelForMaskedLM": "MegaForMaskedLM",
            "AutoModelForSequenceClassification": "MegaForSequenceClassification",
            "AutoModelForTokenClassification": "MegaForTokenClassification",
            "AutoModelForQuestionAnswering": "MegaForQuestionAnswering",
            "AutoModelForMultipleChoice": "MegaForMultipleChoice",
            "AutoModelForImageClassification": "MegaForImageClassification",
            "AutoModelForAudioClassification": "MegaForAudioClassification",
        },
        image_processor="processing.image_processing:PixelSequenceImageProcessor",
        feature_extractor="processing.audio_processing:WaveformFeatureExtractor",
    ),
    Architecture(
        model_type="seqboat",
        config="configuration.configuration_seqboat:SeqBoatConfig",
        modeling="modeling.seqboat.seqboat_heads",
        heads={
            "AutoModel": "SeqBoatModel",
            "AutoModelForCausalLM": "SeqBoatForCausalLM",
            "AutoModelForMaskedLM": "SeqBoatForMaskedLM",
            "AutoModelForSequenceClassification": "SeqBoatForSequenceClassification",
            "AutoModelForTokenClassification": "SeqBoatForTokenClassification",
            "AutoModelForImageClassification": "SeqBoatForImageClassification",
            "AutoModelForAudioClassification": "SeqBoatForAudioClassification",
        },
        image_processor="processing.image_processing:PixelSequenceImageProcessor",
        feature_extractor="processing.audio_processing:WaveformFeatureExtractor",
    ),
    Architecture(
        model_type="longvq",
        config="configuration.configuration_longvq:LongVQConfig",
        modeling="modeling.longvq.longvq_heads",
        heads={
            "AutoModel": "LongVQModel",
            "AutoModelForCausalLM": "LongVQForCausalLM",
            "AutoModelForMaskedLM": "LongVQForMaskedLM",
            "AutoModelForSequenceClassification": "LongVQForSequenceClassification",
            "AutoModelForTokenClassification": "LongVQForTokenClassification",
            "AutoModelForQuestionAnswering": "LongVQForQuestionAnswering",
            "AutoModelForImageClassification": "LongVQForImageClassification",
            "AutoModelForAudioClassification": "LongVQForAudioClassification",
        },
        image_processor="processing.image_processing:PixelSequenceImageProcessor",
        feature_extractor="processing.audio_processing:WaveformFeatureExtractor",
    ),
    Architecture(
        model_type="bst",
        config="configuration.configuration_bst:BstConfig",
        modeling="modeling.bst.bst_heads",
        heads={
            "AutoModel": "BstModel",
            "AutoModelForCausalLM": "BstForCausalLM",
            "AutoModelForSequenceClassification": "BstForSequenceClassification",
        },
    ),
)


# Task -> (class in `pipelines`, Auto class of its models). Transformers 5 bars the names of the pipelines that it removed.
PIPELINES: dict[str, tuple[str, str]] = {
    "seq2seq-summarization": ("Seq2SeqSummarizationPipeline", "AutoModelForSeq2SeqLM"),
    "seq2seq-text2text": ("Seq2SeqText2TextPipeline", "AutoModelForSeq2SeqLM"),
    "extractive-question-answering": ("ExtractiveQuestionAnsweringPipeline", "AutoModelForQuestionAnswering"),
}


def public_classes() -> dict[str, str]:
    """Public class name -> module (relative to this package) that defines it."""
    names: dict[str, str] = {}
    for architecture in ARCHITECTURES:
        config_module, config_name = architecture.config.split(":")
        names[config_name] = config_module
        names.update(dict.fromkeys(architecture.heads.values(), architecture.modeling))
        for processor in filter(None, (architecture.image_processor, architecture.feature_extractor)):
            module, name = processor.split(":")
            names[name] = module
    names.update({name: "pipelines" for name, _ in PIPELINES.values()})
    return names


def _load(module: str, name: str) -> type:
    return getattr(import_module(f".{module}", __package__), name)


def load_config_class(architecture: Architecture) -> type:
    """The configuration class of an architecture."""
    return _load(*architecture.config.split(":"))


def load_heads(architecture: Architecture) -> Iterator[tuple[str, type]]:
    """Pairs of Auto class name and model class."""
    for auto_name, class_name in architecture.heads.items():
        yield auto_name, _load(architecture.modeling, class_name)


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    for architecture in ARCHITECTURES:
        AutoConfig.register(architecture.model_type, load_config_class(architecture), exist_ok=True)


def _register_models() -> None:
    _register_configs()
    modeling_auto = import_module("transformers.models.auto.modeling_auto")
    for architecture in ARCHITECTURES:
        config_class = load_config_class(architecture)
        for auto_name, model_class in load_heads(architecture):
            getattr(modeling_auto, auto_name).register(config_class, model_class, exist_ok=True)


def _register_image_processors() -> None:
    _register_configs()
    module = import_module("transformers.models.auto.image_processing_auto")
    for architecture in ARCHITECTURES:
        if architecture.image_processor is not None:
            processor = _load(*architecture.image_processor.split(":"))
            config_class = load_config_class(architecture)
            module.AutoImageProcessor.register(config_class, slow_image_processor_class=processor, exist_ok=True)


def _register_feature_extractors() -> None:
    _register_configs()
    module = import_module("transformers.models.auto.feature_extraction_auto")
    for architecture in ARCHITECTURES:
        if architecture.feature_extractor is not None:
            extractor = _load(*architecture.feature_extractor.split(":"))
            module.AutoFeatureExtractor.register(load_config_class(architecture), extractor, exist_ok=True)


def _register_pipelines() -> None:
    _register_models()
    registry = import_module("transformers.pipelines").PIPELINE_REGISTRY
    modeling_auto = import_module("transformers.models.auto.modeling_auto")
    for task, (class_name, auto_name) in PIPELINES.items():
        if task not in registry.supported_tasks:
            pipeline_class, model_class = _load("pipelines", class_name), getattr(modeling_auto, auto_name)
            registry.register_pipeline(task, pipeline_class=pipeline_class, pt_model=model_class, type="text")
            # Without it `save_pretrained` would copy the source of the pipeline beside the model, and loading from there would
            # run the copy, after asking for trust, although the class is here.
            del pipeline_class._registered_impl  # type: ignore[attr-defined]


class _RegisterAfterImport(MetaPathFinder):
    """Runs registrations once the modules of Transformers that they need have been imported.

    The Auto classes pull in torch and take seconds to import. Waiting until somebody asks for them keeps `import hf_hybrid`
    as quick as `import transformers`. Modules of Transformers import each other in circles that our models would close,
    so a registration waits for the end of the outermost import of Transformers or of this package, not just of the module it is
    due after.

    Args:
        actions: name of a module of Transformers -> the registration that is due after it.
    """

    def __init__(self, actions: dict[str, Callable[[], None]]) -> None:
        self.actions = actions
        self.under_way = threading.local()  # .count: imports of either package within one another, in this thread

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".", 1)[0] not in ("transformers", __package__):
            return None
        finders = list(sys.meta_path)
        if self not in finders:  # removed by another thread meanwhile
            return None
        behind = finders[finders.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in behind)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            self.under_way.count = getattr(self.under_way, "count", 0) + 1
            try:
                execute(module)
                if self.under_way.count == 1:
                    self._register()
            finally:
                self.under_way.count -= 1

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec

    def _register(self) -> None:
        while due := [name for name in self.actions if name in sys.modules]:
            self.actions.pop(due[0])()
        if not self.actions and self in sys.meta_path:
            sys.meta_path.remove(self)


_REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.image_processing_auto": _register_image_processors,
    "transformers.models.auto.feature_extraction_auto": _register_feature_extractors,
    "transformers.pipelines": _register_pipelines,
}


def register() -> None:
    """Registers every architecture with the Auto classes: now if they are imported already, else as soon as they are."""
    waiting = {}
    for module, action in _REGISTRATIONS.items():
        if module in sys.modules:
            action()
        else:
            waiting[module] = action
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _RegisterAfterImport)]:
        sys.meta_path.remove(finder)
    if waiting:
        sys.meta_path.insert(0, _RegisterAfterImport(waiting))
