"""Published experiments: option files with the settings of the papers, and the models that they describe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from .experiment_files import experiment_names, folder_of_experiments
from .labels import Labels
from .models import load_config, parse_overrides, role_fields
from .options import read_options
from .sequence_classification import ClassifierArguments, build_classifier, classifier_config

SECTION = "published"  # of an option file; recipes pass over it


@dataclass(frozen=True)
class Experiment:
    """An experiment of a paper, as an option file of a recipe with a section `published`.

    Attributes:
        name: "<paper>/<experiment>".
        options: options of the recipe, with the settings of the paper.
        title: what was trained on what.
        arxiv: identifier of the paper.
        recipe: recipe that the options are for.
        metric: what the figure measures.
        figure: the published figure; None if it is not known to us.
        source: where the figure was read; figures without are quoted from memory.
        parameters: number of parameters that was published, or that the published code builds.
        parameters_of: which of the two, in words.
        tolerance: accepted relative difference of our number of parameters.
        difference: why it differs, if it does.
        data: the data of the paper; "generated" if the recipe makes it.
        data_format: how a stand-in for the data looks: "text", "pairs", "bytes", "documents", "pixels" or "waveforms"; None if
            the recipe generates its data.
        tokenizer: "bytes", or None for one that has to be given.
        build: what determines the size of the model besides the options: `vocab_size`, `num_classes`, `longest`.
        unknown: settings that the paper or its code leave open, with our choice.
        ours: our result at this or a smaller scale, in words; None if it was not run.
    """

    name: str
    options: Mapping[str, Any]
    title: str
    arxiv: str
    recipe: str
    metric: str
    figure: float | None = None
    source: str | None = None
    parameters: int | None = None
    parameters_of: str | None = None
    tolerance: float = 0.0
    difference: str | None = None
    data: str = ""
    data_format: str | None = None
    tokenizer: str | None = None
    build: Mapping[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    ours: str | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """Configuration of the model."""
        return parse_overrides(self.options.get("config_overrides"))


def load_experiment(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        ValueError: there is none; the message names the most similar ones.
    """
    path = folder_of_experiments() / f"{name}.yaml"
    names = experiment_names()
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        papers = sorted({known.partition("/")[0] for known in names})
        raise ValueError(f"`experiment` must be <paper>/<experiment> of {', '.join(papers)}; got {name!r}.{hint}")
    options = dict(read_options(path))
    return Experiment(name=name, **options.pop(SECTION), options=options)


def published_model(experiment: Experiment) -> PreTrainedModel:
    """The model of an experiment as its recipe builds it, without memory for its weights (on the meta device)."""
    overrides, build = experiment.overrides, experiment.build
    arch = str(experiment.options["arch"])
    vocabulary = {"vocab_size": build["vocab_size"]} if "vocab_size" in build else {}
    with torch.device("meta"):
        if experiment.recipe in ("train_lra", "classify_audio"):
            return _classifier(experiment, arch, vocabulary)
        auto_class: Any = {"pretrain_clm": AutoModelForCausalLM, "finetune_translation": AutoModelForSeq2SeqLM}[
            experiment.recipe
        ]
        fields = role_fields(auto_class, load_config(arch, {}), overrides)
        return auto_class.from_config(load_config(arch, {**vocabulary, **fields, **overrides}))


def _classifier(experiment: Experiment, arch: str, vocabulary: Mapping[str, int]) -> PreTrainedModel:
    options, build = experiment.options, experiment.build
    is_values = experiment.recipe == "classify_audio" or options.get("pixel_values", False)
    auto_class: Any = AutoModelForSequenceClassification
    if is_values:
        is_audio = experiment.recipe == "classify_audio"
        auto_class = AutoModelForAudioClassification if is_audio else AutoModelForImageClassification
    wishes: dict[str, Any] = {"input_type": "values"} if is_values else {}
    if options.get("task") == "retrieval":
        wishes["dual_encoder"] = True
    arguments = ClassifierArguments(arch=arch, config_overrides=dict(experiment.overrides))
    config = classifier_config(auto_class, arguments, vocabulary, wishes)
    labels = Labels("label", [str(number) for number in range(build["num_classes"])])
    return build_classifier(auto_class, config, arguments, labels, build["longest"])


def scaled(options: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The options with a share of the optimizer steps, of the warm-up and of the generated rows.

    Raises:
        ValueError: `scale` is not positive.
    """
    if not scale > 0:
        raise ValueError(f"`scale` must be positive, 1 for all steps of the paper; got {scale}.")
    changed = dict(options)
    batch = int(options.get("per_device_train_batch_size", 1))
    least = {"max_steps": 2, "num_train": batch, "num_validation": 16}
    for name in (
        "max_steps",
        "warmup_steps",
        "num_train",
        "num_validation",
        "eval_steps",
        "save_steps",
        "logging_steps",
    ):
        if options.get(name, 0) >= 1:
            changed[name] = max(least.get(name, 1), round(options[name] * scale))
    return changed


def training_recipe_of(experiment: Experiment) -> Any:
    """The `Recipe` that an experiment is for."""
    return import_module(f"hf_hybrid.recipes.{experiment.recipe}").RECIPE
