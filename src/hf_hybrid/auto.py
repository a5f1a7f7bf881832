"""One record per architecture: its configuration and heads, and what adapters, optimizers, cards and converters need.

A new architecture is one `Architecture` here or, in a package of its own, one call of `register_architecture`. Nothing else knows
the architectures by name: whatever differs between them is read from the record, and tests over all architectures
iterate over `ARCHITECTURES`.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Paper:
    """Where an architecture was published.

    Args:
        title: as on arXiv.
        authors: "Family, Given and Family, Given", as BibTeX separates them.
        year: year of the first version.
        arxiv: identifier, e.g. "2212.08136".
    """

    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        """URL of the abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self) -> str:
        """BibTeX entry."""
        key = f"{self.authors.split(',')[0]}{self.year}{self.title.split()[0].strip(':')}".lower()
        fields = {
            "title": self.title,
            "author": self.authors,
            "year": self.year,
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        return f"@misc{{{key},\n" + "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items()) + "}"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model type.

    Every trainable tensor of every head is of exactly one kind: state (below a module of `state_modules`), without weight decay (norms,
    biases, `undecayed`), or with it (the weights of `lora_targets`, of heads, and `decayed`). A test checks this.

    Args:
        model_type: the name in `config.json`.
        title: name in tables and text.
        summary: the parts that the architecture combines, a phrase.
        decoding_state: what is kept while generating, a phrase; empty for a model that does not generate.
        paper: the paper that introduced it, or None.
        docs: page on its options, relative to the repository, or None.
        package: package that the modules below are relative to.
        config: "module:class".
        modeling: module that defines or imports the model classes.
        heads: name of the Auto class -> name of the model class.
        image_processor, feature_extractor: "module:class", with the full name of the module, of the class that
            prepares images or recordings; or None.
        converter: module that reads and writes official checkpoints, see `conversion.common.Converter`; or None.
        lora_targets: names of the linear maps of the blocks, which low-rank adapters change.
        state_modules: names of the recurrent parts, which have their own learning rate and no weight decay, and are
            trained in full alongside an adapter.
        statistics_modules: names of the parts that training changes without gradients; saved with an adapter.
        undecayed: patterns of further tensors without weight decay; each matches whole parts of a name
            ("embed_tokens", "rel_bias").
        decayed: patterns of further tensors with weight decay.
        per_document_outputs: output fields with a row per document instead of a value per token; the stack declares
            the same.
        published_classifier: configuration fields that the published code sets for classifiers and that differ from
            the defaults. A value that depends on other fields is a function of all fields.
    """

    model_type: str
    title: str
    summary: str = ""
    decoding_state: str = ""
    paper: Paper | None = None
    docs: str | None = None
    package: str = __package__
    config: str
    modeling: str
    heads: Mapping[str, str]
    image_processor: str | None = None
    feature_extractor: str | None = None
    converter: str | None = None
    lora_targets: tuple[str, ...] = ()
    state_modules: tuple[str, ...] = ()
    statistics_modules: tuple[str, ...] = ()
    undecayed: tuple[str, ...] = ()
    decayed: tuple[str, ...] = ()
    per_document_outputs: tuple[str, ...] = ()
    published_classifier: Mapping[str, Any] = field(default_factory=dict)

    def kinds_of(self, name: str) -> list[str]:
        """Kinds of a trainable tensor: "state", "no_decay", "decay". A complete record gives every tensor exactly one.

        Args:
            name: name of the parameter in the model.
        """
        if _has_part(name, self.state_modules):
            return ["state"]
        if _NORM_OR_BIAS.search(name):
            return ["no_decay"]
        matrices = (*self.lora_targets, *_HEAD_MATRICES, *self.decayed)
        kinds = {"no_decay": self.undecayed, "decay": matrices}
        return [kind for kind, patterns in kinds.items() if _has_part(name, patterns)]


# Tensors without weight decay in every architecture.
_NORM_OR_BIAS = re.compile(r"(^|\.)\w*norm\w*\.|(^|\.|_)bias$")

# Modules that heads add to a stack, in every architecture.
_HEAD_MATRICES = ("lm_head", "mlm_head", "classifier", "score", "qa_outputs", "pooler")


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a module that a head adds to a stack."""
    return _has_part(name, _HEAD_MATRICES)


def _has_part(name: str, patterns: Sequence[str]) -> bool:
    """Whether consecutive parts of a dotted name match one of the patterns."""
    return bool(patterns) and re.search(rf"(^|\.)({'|'.join(patterns)})(\.|$)", name) is not None


_SPADE: dict[str, Any] = {
    "paper": Paper(
        "Efficient Long Sequence Modeling via State Space Augmented Transformer",
        "Zuo, Simiao and Liu, Xiaodong and Jiao, Jian and Charles, Denis and Manavoglu, Eren and Zhao, Tuo and Gao, Jianfeng",
        2022,
        "2212.08136",
    ),
    "docs": "docs/architectures/spade.md",
    "converter": "conversion.spade",
    "lora_targets": (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "wi",
        "wi_0",
        "wi_1",
        "wo",
        "aggregate",
        "aggregate_gate",
    ),
    "state_modules": ("ssm",),
}
_IMAGE_PROCESSOR = f"{__package__}.processing.image_processing:PixelSequenceImageProcessor"
_FEATURE_EXTRACTOR = f"{__package__}.processing.audio_processing:WaveformFeatureExtractor"


def _twice_the_width(fields: Mapping[str, Any]) -> int:
    return 2 * fields["hidden_size"]


# `register_architecture` appends to this list, so it is never replaced by another one.
ARCHITECTURES: list[Architecture] = [
    Architecture(
        model_type="spade",
        title="SPADE encoder-decoder",
        summary="S4 in the bottom layer, next to local attention",
        decoding_state="keys and values of the target (a window of them with `decoder_window_size`)",
        config="configuration.configuration_spade:SpadeConfig",
        modeling="modeling.spade.spade_heads",
        heads={
            "AutoModel": "SpadeModel",
            "AutoModelForSeq2SeqLM": "SpadeForConditionalGeneration",
            "AutoModelForSequenceClassification": "SpadeForSequenceClassification",
            "AutoModelForTokenClassification": "SpadeForTokenClassification",
            "AutoModelForQuestionAnswering": "SpadeForQuestionAnswering",
            "AutoModelForMultipleChoice": "SpadeForMultipleChoice",
            "AutoModelForTextEncoding": "SpadeEncoderModel",
        },
        undecayed=("embed_tokens", "embed_positions", "relative_attention_bias"),
        **_SPADE,
    ),
    Architecture(
        model_type="spade_lm",
        title="SPADE language model",
        summary="the same, decoder-only",
        decoding_state="keys and values of the last `window_size` - 1 tokens per layer, one SSM state per SSM layer: constant",
        config="configuration.configuration_spade:SpadeLMConfig",
        modeling="modeling.spade.spade_lm_heads",
        heads={
            "AutoModel": "SpadeLMModel",
            "AutoModelForCausalLM": "SpadeLMForCausalLM",
            "AutoModelForSequenceClassification": "SpadeLMForSequenceClassification",
            "AutoModelForTokenClassification": "SpadeLMForTokenClassification",
            "AutoModelForQuestionAnswering": "SpadeLMForQuestionAnswering",
        },
        undecayed=("embed_tokens", "relative_attention_bias", "head_scale", "residual_scale"),
        **_SPADE,
    ),
    Architecture(
        model_type="mega",
        title="Mega",
        summary="a damped moving average inside gated attention with one head, full or in chunks",
        decoding_state="keys and values of the current chunk (unchunked: of all tokens) and one state of the moving average per layer",
        paper=Paper(
            "Mega: Moving Average Equipped Gated Attention",
            "Ma, Xuezhe and Zhou, Chunting and Kong, Xiang and He, Junxian and Gui, Liangke and Neubig, Graham and May, Jonathan "
            "and Zettlemoyer, Luke",
            2022,
            "2209.10655",
        ),
        docs="docs/architectures/mega.md",
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
        image_processor=_IMAGE_PROCESSOR,
        feature_extractor=_FEATURE_EXTRACTOR,
        converter="conversion.mega",
        lora_targets=("v_proj", "mx_proj", "h_proj", "q_proj", "k_proj", "fc1", "fc2"),
        state_modules=("ema_gate",),
        undecayed=("word_embeddings", "token_type_embeddings", "value_embeddings", "rel_pos_bias", "qk_weight"),
        decayed=("dense",),
        per_document_outputs=("pooler_output",),
        published_classifier={
            "classifier_type": "lra",
            "classifier_hidden_size": _twice_the_width,
            "pooling_type": "mean",
            "mask_padded_states": True,
            "final_norm": lambda fields: fields["normalize_before_mega"],  # of a stack whose blocks begin with a norm
        },
    ),
    Architecture(
        model_type="seqboat",
        title="SeqBoat",
        summary="a moving average decides which tokens enter a gated attention unit",
        decoding_state="the last `window_size` - 1 *active* tokens and one state of the moving average per layer: constant",
        paper=Paper(
            "Sparse Modular Activation for Efficient Sequence Modeling",
            "Ren, Liliang and Liu, Yang and Wang, Shuohang and Xu, Yichong and Zhu, Chenguang and Zhai, ChengXiang",
            2023,
            "2306.11197",
        ),
        docs="docs/architectures/seqboat.md",
        config="configuration.configuration_seqboat:SeqBoatConfig",
        modeling="modeling.seqboat.seqboat_heads",
        heads={
            "AutoModel": "SeqBoatModel",
            "AutoModelForCausalLM": "SeqBoatForCausalLM",
            "AutoModelForMaskedLM": "SeqBoatForMaskedLM",
            "AutoModelForSequenceClassification": "SeqBoatForSequenceClassification",
            "AutoModelForTokenClassification": "SeqBoatForTokenClassification",
            "AutoModelForQuestionAnswering": "SeqBoatForQuestionAnswering",
            "AutoModelForMultipleChoice": "SeqBoatForMultipleChoice",
            "AutoModelForImageClassification": "SeqBoatForImageClassification",
            "AutoModelForAudioClassification": "SeqBoatForAudioClassification",
        },
        image_processor=_IMAGE_PROCESSOR,
        feature_extractor=_FEATURE_EXTRACTOR,
        converter="conversion.seqboat",
        lora_targets=("skip_proj", "in_proj", "out_proj", "fc1", "fc2"),
        state_modules=("ema",),
        undecayed=("embed_tokens", "value_embeddings", "position_scale", "qk_weight", "log_temperature"),
        decayed=(r"router\.weight",),
        per_document_outputs=("activation_rate",),
        published_classifier={"pooling": "mean", "classifier_dim": _twice_the_width, "scale_embedding": False},
    ),
    Architecture(
        model_type="longvq",
        title="LongVQ",
        summary="softmax attention over vector-quantised keys of a moving average",
        decoding_state="codes and values of the last `window_size` - 1 tokens, number and mean value of all earlier ones by code, and one "
        "state of the moving average per layer: constant",
        paper=Paper(
            "LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory",
            "Liu, Zicheng and Wang, Li and Li, Siyuan and Wang, Zedong and Lin, Haitao and Li, Stan Z.",
            2024,
            "2404.11163",
        ),
        docs="docs/architectures/longvq.md",
        config="configuration.configuration_longvq:LongVQConfig",
        modeling="modeling.longvq.longvq_heads",
        heads={
            "AutoModel": "LongVQModel",
            "AutoModelForCausalLM": "LongVQForCausalLM",
            "AutoModelForMaskedLM": "LongVQForMaskedLM",
            "AutoModelForSequenceClassification": "LongVQForSequenceClassification",
            "AutoModelForTokenClassification": "LongVQForTokenClassification",
            "AutoModelForQuestionAnswering": "LongVQForQuestionAnswering",
            "AutoModelForMultipleChoice": "LongVQForMultipleChoice",
            "AutoModelForImageClassification": "LongVQForImageClassification",
            "AutoModelForAudioClassification": "LongVQForAudioClassification",
        },
        image_processor=_IMAGE_PROCESSOR,
        feature_extractor=_FEATURE_EXTRACTOR,
        lora_targets=("v_proj", "mx_proj", "h_proj", "fc1", "fc2"),
        state_modules=("ssm",),
        statistics_modules=("quantizer",),
        undecayed=("embed_tokens", "value_embeddings", "qk_gamma", "qk_beta"),
        per_document_outputs=("codebook_perplexity",),
        published_classifier={"is_decoder": False, "pooling": "mean"},
    ),
    Architecture(
        model_type="bst",
        title="Block-State Transformer",
        summary="a state space feeds context states to block-local attention (SH, MH, MF)",
        decoding_state="keys and values of the last `block_size` tokens per layer; where there are context states, theirs and the state of "
        "the filters: constant",
        paper=Paper(
            "Block-State Transformers",
            "Fathi, Mahan and Pilault, Jonathan and Firat, Orhan and Pal, Christopher and Bacon, Pierre-Luc and Goroshin, Ross",
            2023,
            "2306.09539",
        ),
        docs="docs/architectures/bst.md",
        config="configuration.configuration_bst:BstConfig",
        modeling="modeling.bst.bst_heads",
        heads={
            "AutoModel": "BstModel",
            "AutoModelForCausalLM": "BstForCausalLM",
            "AutoModelForSequenceClassification": "BstForSequenceClassification",
            "AutoModelForTokenClassification": "BstForTokenClassification",
            "AutoModelForQuestionAnswering": "BstForQuestionAnswering",
        },
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        state_modules=("ssm",),
        undecayed=("embed_tokens", "rel_bias", "qk_scale", r"context\.ids", r"context\.initial"),
    ),
]


def find_architecture(model_type: str | None) -> Architecture | None:
    """The record of a model type; None for a model type of another library."""
    return next((found for found in ARCHITECTURES if found.model_type == model_type), None)


def register_architecture(architecture: Architecture) -> None:
    """Adds an architecture of another package, which then works everywhere that the architectures of this library do.

    Call it when the package is imported. The modules of the architecture are imported when an Auto class is first
    used.

    Raises:
        ValueError: its model type or one of its class names is taken.
    """
    known = find_architecture(architecture.model_type)
    if known is not None and known.package == architecture.package:
        ARCHITECTURES[ARCHITECTURES.index(known)] = architecture  # registered again, e.g. by `importlib.reload`
    elif known is not None:
        raise ValueError(
            f"`model_type` {architecture.model_type!r} already belongs to {known.package}; taken are "
            f"{', '.join(found.model_type for found in ARCHITECTURES)}. Choose another name."
        )
    else:
        taken = {name for found in ARCHITECTURES for name in found.heads.values()} & set(architecture.heads.values())
        if taken:
            raise ValueError(
                f"`heads` of {architecture.model_type!r} name classes of other architectures: {', '.join(sorted(taken))}. Choose "
                "names of its own."
            )
        ARCHITECTURES.append(architecture)
    register()


# Task -> (class in `pipelines`, Auto class of its models). Transformers 5 rejects the names of its removed pipelines.
PIPELINES: dict[str, tuple[str, str]] = {
    "seq2seq-summarization": ("Seq2SeqSummarizationPipeline", "AutoModelForSeq2SeqLM"),
    "seq2seq-text2text": ("Seq2SeqText2TextPipeline", "AutoModelForSeq2SeqLM"),
    "extractive-question-answering": ("ExtractiveQuestionAnsweringPipeline", "AutoModelForQuestionAnswering"),
}


def public_classes() -> dict[str, str]:
    """Public class name -> module (relative to this package) that defines it."""
    names: dict[str, str] = {}
    for architecture in ARCHITECTURES:
        if architecture.package != __package__:
            continue
        config_module, config_name = architecture.config.split(":")
        names[config_name] = config_module
        names.update(dict.fromkeys(architecture.heads.values(), architecture.modeling))
        for processor in filter(None, (architecture.image_processor, architecture.feature_extractor)):
            module, name = processor.removeprefix(f"{__package__}.").split(":")
            names[name] = module
    names.update({name: "pipelines" for name, _ in PIPELINES.values()})
    return names


def _load(module: str, name: str, package: str = __package__) -> type:
    return getattr(import_module(f"{package}.{module}"), name)


def load_config_class(architecture: Architecture) -> type:
    """The configuration class of an architecture."""
    module, name = architecture.config.split(":")
    return _load(module, name, architecture.package)


def load_converter(architecture: Architecture) -> Any:
    """The module that reads and writes official checkpoints (see `conversion.common.Converter`); None where there is none."""
    return architecture.converter and import_module(f"{architecture.package}.{architecture.converter}")


def _load_processor(place: str) -> type:
    module, name = place.split(":")
    return getattr(import_module(module), name)


def load_heads(architecture: Architecture) -> Iterator[tuple[str, type]]:
    """Pairs of Auto class name and model class."""
    for auto_name, class_name in architecture.heads.items():
        yield auto_name, _load(architecture.modeling, class_name, architecture.package)


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    for architecture in ARCHITECTURES:
        AutoConfig.register(architecture.model_type, load_config_class(architecture), exist_ok=True)


def _register_models() -> None:
    _register_configs()
    from .configuration.name_tables import enter_names

    modeling_auto = import_module("transformers.models.auto.modeling_auto")
    for architecture in ARCHITECTURES:
        config_class = load_config_class(architecture)
        heads = dict(load_heads(architecture))
        for auto_name, model_class in heads.items():
            getattr(modeling_auto, auto_name).register(config_class, model_class, exist_ok=True)
        classes = {model_class.__name__: model_class for model_class in heads.values()}
        enter_names(architecture.model_type, architecture.heads, classes)


def image_processor_class() -> Any:
    """`AutoImageProcessor`, also where torchvision is missing.

    Transformers before 5.23 asks for torchvision if the class is imported by its name at the top, though it works without.
    """
    return import_module("transformers.models.auto.image_processing_auto").AutoImageProcessor


def _register_image_processors() -> None:
    _register_configs()
    for architecture in ARCHITECTURES:
        if architecture.image_processor is not None:
            processor = _load_processor(architecture.image_processor)
            config_class = load_config_class(architecture)
            image_processor_class().register(config_class, slow_image_processor_class=processor, exist_ok=True)


def _register_feature_extractors() -> None:
    _register_configs()
    module = import_module("transformers.models.auto.feature_extraction_auto")
    for architecture in ARCHITECTURES:
        if architecture.feature_extractor is not None:
            extractor = _load_processor(architecture.feature_extractor)
            module.AutoFeatureExtractor.register(load_config_class(architecture), extractor, exist_ok=True)


def _register_pipelines() -> None:
    _register_models()
    registry = import_module("transformers.pipelines").PIPELINE_REGISTRY
    modeling_auto = import_module("transformers.models.auto.modeling_auto")
    for task, (class_name, auto_name) in PIPELINES.items():
        if task not in registry.supported_tasks:
            pipeline_class, model_class = _load("pipelines", class_name), getattr(modeling_auto, auto_name)
            registry.register_pipeline(task, pipeline_class=pipeline_class, pt_model=model_class, type="text")
            # Otherwise `save_pretrained` would copy the source of the pipeline next to the model, and loading the
            # folder would ask for `trust_remote_code` and run the copy, although the class is here.
            del pipeline_class._registered_impl  # type: ignore[attr-defined]


def _watched_packages() -> set[str]:
    """Transformers, this package, and those with further architectures."""
    return {"transformers", *(architecture.package.split(".", 1)[0] for architecture in ARCHITECTURES)}


class _RegisterAfterImport(MetaPathFinder):
    """Runs registrations once the modules of Transformers that they need have been imported.

    The Auto classes pull in torch and take seconds to import. Waiting until they are used keeps `import hf_hybrid` as
    fast as `import transformers`. Modules of Transformers import each other in ways that become circular imports once
    our models join in, so a registration waits until the outermost import of Transformers, or of a package with
    architectures, has finished, and not just the module that triggers it.

    Args:
        actions: name of a module of Transformers -> the registration that its import triggers.
    """

    def __init__(self, actions: dict[str, Callable[[], None]]) -> None:
        self.actions = actions
        self.under_way = threading.local()  # .count: nested imports of these packages in this thread

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".", 1)[0] not in _watched_packages():
            return None
        finders = list(sys.meta_path)
        if self not in finders:  # another thread has removed it
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
    """Registers every architecture with the Auto classes: now if those are imported, else as soon as they are."""
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
