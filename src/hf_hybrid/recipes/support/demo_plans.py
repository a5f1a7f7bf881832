"""Sizes, options and times of the demonstration: from a checkpoint or from random weights, in full or quick."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...training.muon import product_dtype
from .demo_data import HIDDEN_LINE, NEW_FAMILIES, DataPlan


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of one demonstration; the options of the phases are those of the recipes.

    Attributes:
        minutes: time limit, if the user names none.
        shares: parts of the time of the three training phases and of everything after them.
        data: text and rows.
        pretraining, classification, summarization: options of the training phases.
        new_tokenizer, new_model: of a run from random weights; empty for one from a checkpoint.
    """

    minutes: float
    shares: Mapping[str, float]
    data: DataPlan
    pretraining: Mapping[str, Any]
    classification: Mapping[str, Any]
    summarization: Mapping[str, Any]
    new_tokenizer: Mapping[str, Any] = field(default_factory=dict)
    new_model: Mapping[str, Any] = field(default_factory=dict)


PRETRAINING, CLASSIFICATION, SUMMARIZATION, REST = "pretraining", "classification", "summarization", "rest"

# A minute is too short to overfit, and the checkpoint was pretrained without dropout.
NO_DROPOUT = {"hidden_dropout": 0.0}

# Steps are limits for fast machines; elsewhere the time ends a phase, and the learning rate with it.
FULL_PLAN = DemoPlan(
    minutes=5.5,
    shares={PRETRAINING: 1.0, CLASSIFICATION: 0.6, SUMMARIZATION: 2.9, REST: 0.6},
    data=DataPlan(new_families=NEW_FAMILIES, max_source_bytes=8_000_000, max_characters=2_000_000, max_per_class=25),
    pretraining={
        "input_length": 512, "noise_density": 0.15, "max_steps": 240, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16, "max_validation_segments": 32, "learning_rate": 1e-3, "ssm_learning_rate": 5e-4,
        "muon_learning_rate": 5e-4, "warmup_steps": 10, "lr_scheduler_type": "linear", "eval_steps": 40, "logging_steps": 10,
    },
    classification={
        "max_length": 80, "num_train_epochs": 6, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64,
        "learning_rate": 8e-3, "muon_learning_rate": 3e-4, "label_smoothing_factor": 0.1, "warmup_steps": 5, "config_overrides": NO_DROPOUT,
        "logging_steps": 20, "eval_strategy": "no",
    },
    summarization={
        "max_source_length": 64, "max_target_length": 28, "num_train_epochs": 2, "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 96, "learning_rate": 2e-3, "muon_learning_rate": 3e-3, "label_smoothing_factor": 0.1, "warmup_steps": 10,
        "logging_steps": 20, "no_repeat_ngram_size": 2, "min_new_tokens": 7, "generation_num_beams": 4, "eval_strategy": "no", "source_prefix": HIDDEN_LINE,
        "config_overrides": NO_DROPOUT,
    },
)  # fmt: skip

QUICK_PLAN = replace(
    FULL_PLAN,
    minutes=1.1,
    shares={PRETRAINING: 1.0, CLASSIFICATION: 1.0, SUMMARIZATION: 1.0, REST: 1.5},
    data=replace(
        FULL_PLAN.data, max_source_bytes=1_000_000, max_characters=400_000, max_evaluation=200
    ),
    pretraining={**FULL_PLAN.pretraining, "input_length": 256, "max_validation_segments": 16, "max_steps": 40, "eval_steps": 40, "logging_steps": 5},
    classification={**FULL_PLAN.classification, "logging_steps": 5},
    summarization={**FULL_PLAN.summarization, "num_train_epochs": 1, "logging_steps": 5},
)  # fmt: skip

FULL_PLAN_FROM_SCRATCH = DemoPlan(
    minutes=5.3,
    shares={PRETRAINING: 1.5, CLASSIFICATION: 0.8, SUMMARIZATION: 0.7, REST: 0.6},
    data=DataPlan(),
    new_tokenizer={"vocab_size": 2000, "num_sentinels": 48, "max_sentences": 30_000},
    new_model={
        "hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "intermediate_size": 384, "num_hidden_layers": 3, "decoder_layers": 1,
        "window_size": 17, "ssm_state_size": 16, "hidden_dropout": 0.0, "classifier_dropout": 0.3, "initializer_range": 0.08,
        "max_target_positions": 160,
    },
    pretraining={
        "input_length": 256, "noise_density": 0.3, "max_steps": 700, "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16, "max_validation_segments": 128, "learning_rate": 2e-3,
        "ssm_learning_rate": 2e-3, "eval_steps": 175, "logging_steps": 25,
    },
    classification={
        "max_length": 80, "num_train_epochs": 4, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64,
        "learning_rate": 1e-3, "logging_steps": 50, "eval_strategy": "no",
    },
    summarization={
        "max_source_length": 128, "max_target_length": 32, "num_train_epochs": 3, "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 48, "learning_rate": 2e-3, "logging_steps": 50, "no_repeat_ngram_size": 3,
        "eval_strategy": "no", "source_prefix": HIDDEN_LINE,
    },
)  # fmt: skip

QUICK_PLAN_FROM_SCRATCH = DemoPlan(
    minutes=1.0,
    shares={PRETRAINING: 1.0, CLASSIFICATION: 1.0, SUMMARIZATION: 1.0, REST: 1.0},
    data=DataPlan(
        families=("numpy", "sklearn"), max_source_bytes=1_000_000, max_characters=60_000, max_per_class=75,
        max_pairs=24, max_evaluation=8,
    ),
    new_tokenizer={"vocab_size": 500, "num_sentinels": 32, "max_sentences": 1000},
    new_model={
        "hidden_size": 16, "head_dim": 8, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1, "decoder_layers": 1,
        "window_size": 9, "ssm_state_size": 4, "hidden_dropout": 0.0, "max_target_positions": 64,
    },
    pretraining={
        "input_length": 64, "noise_density": 0.15, "max_steps": 4, "per_device_train_batch_size": 4,
        "max_validation_segments": 8, "eval_steps": 2, "logging_steps": 1,
    },
    classification={"max_length": 32, "max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1},
    summarization={
        "max_source_length": 64, "max_target_length": 12, "max_steps": 3, "per_device_train_batch_size": 8,
        "logging_steps": 1, "source_prefix": HIDDEN_LINE,
    },
)  # fmt: skip


def plan_of(*, quick: bool, from_scratch: bool) -> DemoPlan:
    """The plan of a demonstration."""
    if from_scratch:
        return QUICK_PLAN_FROM_SCRATCH if quick else FULL_PLAN_FROM_SCRATCH
    return QUICK_PLAN if quick else FULL_PLAN


def precision_options() -> tuple[dict[str, bool], str]:
    """Options of the trainer for the precision that is fastest on this machine, and its name for the report."""
    if torch.cuda.is_available():
        return ({"bf16": True}, "bfloat16") if torch.cuda.is_bf16_supported() else ({}, "float32")
    if torch.accelerator.is_available() or product_dtype("cpu") != torch.bfloat16:
        return {}, "float32"
    return {"bf16": True, "use_cpu": True}, "bfloat16"


def free_threads() -> int:
    """Threads for a machine that others use too: the cores that they leave, at least one.

    Threads wait for each other several times in a layer: with one of two cores taken, two are slower than one.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg"):
        return threads
    return max(1, min(threads, round(threads - os.getloadavg()[0])))
