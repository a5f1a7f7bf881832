"""The questions of the laboratory, each with the variants that it compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .settings import AS_IT_STANDS, RANDOM_DOCUMENTS

MUON = {"optimizer": "muon", "matrix_learning_rate": 1e-2, "learning_rate": 3e-3}
ADAMW = {"learning_rate": 3e-3}
RECIPE = MUON | {"matrix_learning_rate": 5e-3, "weight_decay": 0.1}  # the defaults of pretraining
# The denoisers R and X of UL2 (arXiv 2205.05131, table 1), without the prefix language model S and the tokens that name the kind.
UL2 = tuple((density, span) for density in (0.15, 0.5) for span in (3.0, 8.0, 64.0))


@dataclass(frozen=True)
class Variant:
    """A contender with changed settings.

    Attributes:
        name: shown; unique within its case.
        contender: name in `contenders.CONTENDERS`.
        changes: settings that differ from those of the case.
    """

    name: str
    contender: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A question.

    Attributes:
        name: on the command line.
        question: shown.
        variants: what is compared; those of one objective see the same tokens in the same order.
        changes: settings that differ from the defaults.
    """

    name: str
    question: str
    variants: tuple[Variant, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)


def _each(contender: str, setting: str, values: tuple[Any, ...], **common: Any) -> tuple[Variant, ...]:
    return tuple(Variant(f"{setting} {value}", contender, {**common, setting: value}) for value in values)


def _at_rates(contender: str, name: str | None = None, **common: Any) -> tuple[Variant, ...]:
    """Every contender is tried with the same two pairs of learning rates."""
    name = contender if name is None else name
    return (
        Variant(f"{name}, AdamW 3e-3", contender, ADAMW | common),
        Variant(f"{name}, Muon 5e-3", contender, RECIPE | common),
    )


def _seq2seq(*names: str) -> tuple[Variant, ...]:
    return tuple(variant for name in names for variant in _at_rates(name))


_RELATIVE: dict[str, Any] = {"ssm_learning_rate": None}  # steps relative to the size of the tensor, for states too
_BST_WINDOWS = {"bst_layers": [], "local_attention": "sliding_window"}
_SMALL_EMBEDDINGS = {"embedding_init_std": 0.02}  # as the other contenders; the default is that of T5
_PLAIN_HEAD = _SMALL_EMBEDDINGS | {"logits_scaling": 1.0}  # without the division of the logits that T5 has, either
_LM = ("SPADE-LM", "Mega", "SeqBoat", "BST", "LongVQ", "Llama", "Mistral", "Mamba2")

CASES = {
    case.name: case
    for case in (
        Case(
            "optimizers",
            "Which optimizer and learning rate?",
            (
                Variant("AdamW 1e-3, dropout 0.1", "SPADE", {"dropout": 0.1}),
                Variant("AdamW 1e-3", "SPADE"),
                Variant("AdamW 3e-3", "SPADE", ADAMW),
                Variant("Muon 1e-2, AdamW 3e-3", "SPADE", MUON),
                Variant("Muon 2e-2, AdamW 3e-3", "SPADE", MUON | {"matrix_learning_rate": 2e-2}),
                Variant("Muon 5e-3, AdamW 3e-3", "SPADE", MUON | {"matrix_learning_rate": 5e-3}),
                Variant("Muon 2.5e-3, AdamW 3e-3", "SPADE", MUON | {"matrix_learning_rate": 2.5e-3}),
                Variant("Muon 1e-2, AdamW 6e-3", "SPADE", MUON | {"learning_rate": 6e-3}),
                Variant(
                    "RMS-scaled AdamW 2e-2", "SPADE", _RELATIVE | {"optimizer": "rms_adamw", "learning_rate": 2e-2}
                ),
                Variant(
                    "RMS-scaled AdamW 5e-2", "SPADE", _RELATIVE | {"optimizer": "rms_adamw", "learning_rate": 5e-2}
                ),
                Variant("Lion 3e-4", "SPADE", _RELATIVE | {"optimizer": "lion", "learning_rate": 3e-4}),
                Variant("Lion 1e-3", "SPADE", _RELATIVE | {"optimizer": "lion", "learning_rate": 1e-3}),
                Variant("Adafactor 1e-2", "SPADE", _RELATIVE | {"optimizer": "adafactor", "learning_rate": 1e-2}),
                Variant("Adafactor 3e-2", "SPADE", _RELATIVE | {"optimizer": "adafactor", "learning_rate": 3e-2}),
            ),
        ),
        Case(
            "recipe",
            "What do the defaults of pretraining gain over those before them?",
            (
                Variant("before: AdamW 1e-3, dropout 0.1", "SPADE", {"dropout": 0.1}),
                Variant("AdamW 3e-3", "SPADE", ADAMW),
                Variant("now: Muon 5e-3, AdamW 3e-3, weight decay 0.1", "SPADE", RECIPE),
            ),
        ),
        Case(
            "schedules",
            "Which schedule?",
            (
                Variant("linear to zero", "SPADE"),
                Variant("cosine", "SPADE", {"schedule": "cosine"}),
                Variant("trapezoid, 30 % decay", "SPADE", {"schedule": "warmup_stable_decay"}),
                Variant("constant", "SPADE", {"schedule": "constant_with_warmup"}),
            ),
            MUON,
        ),
        Case(
            "batches",
            "How many rows to a step?",
            (
                *_each("SPADE", "batch_size", (4, 8, 16, 32)),
                Variant("batch_size 4, 8, 16", "SPADE", {"batch_size": 4, "batch_growth": 4}),
                Variant("batch_size 8, 16, 32", "SPADE", {"batch_size": 8, "batch_growth": 4}),
            ),
            MUON,
        ),
        Case(
            "vocabularies",
            "How many pieces? (compare nats per byte)",
            _each("SPADE", "vocab_size", (1000, 2000, 4000, 8000)),
            MUON,
        ),
        Case(
            "lengths",
            "How long are the inputs, at equal tokens to a step?",
            (
                Variant("128 tokens", "SPADE", {"length": 128, "batch_size": 32}),
                Variant("256 tokens", "SPADE", {"length": 256, "batch_size": 16}),
                Variant("512 tokens", "SPADE", {"length": 512, "batch_size": 8}),
            ),
            MUON,
        ),
        Case(
            "shapes",
            "Width or depth, encoder or decoder?",
            (
                Variant("width 128, 4 + 4", "SPADE"),
                Variant("width 128, 6 + 2", "SPADE", {"layers": 6, "decoder_layers": 2}),
                Variant(
                    "width 192, 2 + 2",
                    "SPADE",
                    {"hidden_size": 192, "layers": 2, "decoder_layers": 2, "feed_forward": 448},
                ),
                Variant(
                    "width 96, 8 + 6",
                    "SPADE",
                    {"hidden_size": 96, "layers": 8, "decoder_layers": 6, "feed_forward": 288},
                ),
            ),
            MUON,
        ),
        Case(
            "noise",
            "Which noise in training? (the held-out noise is always 0.15 and 3)",
            (
                Variant("density 0.15, spans of 3", "SPADE"),
                Variant("density 0.3, spans of 3", "SPADE", {"noise_density": 0.3}),
                Variant("density 0.15, spans of 8", "SPADE", {"mean_span_length": 8.0}),
                Variant("density 0.5, spans of 8", "SPADE", {"noise_density": 0.5, "mean_span_length": 8.0}),
                Variant("mixture of UL2", "SPADE", {"noise_mixture": UL2}),
            ),
            MUON,
        ),
        Case(
            "data",
            "In which order is the text read, and does it pay to leave out what it repeats?",
            (
                Variant("rows in random order", "SPADE"),
                Variant("documents in random order, each read through", "SPADE", {"order": RANDOM_DOCUMENTS}),
                Variant("as the files have it", "SPADE", {"order": AS_IT_STANDS}),
                Variant("rows in random order, no line twice", "SPADE", {"deduplicated": True}),
            ),
            RECIPE,
        ),
        Case(
            "moments",
            "Do moments in bfloat16 learn as much? (rounded after every step: compare at equal --steps)",
            _each("SPADE", "rounded_moments", (False, True)),
            RECIPE,
        ),
        Case("heads", "Does the head share the embedding matrix?", _each("SPADE", "tied", (True, False)), MUON),
        Case("compile", "Does `torch.compile` pay?", _each("SPADE", "compile", (False, True)), MUON),
        Case(
            "state-space",
            "Does the state space help, for one window?",
            (
                Variant("with state space", "SPADE"),
                Variant("without", "SPADE", {"model": {"ssm_layers": []}, "feed_forward": 400}),
            ),
            MUON | {"window": 32},
        ),
        Case(
            "encoder-decoders",
            "SPADE against T5, LongT5 and BART of the same size",
            _seq2seq("SPADE", "T5", "LongT5-local", "BART"),
            {"length": 512, "batch_size": 8},
        ),
        Case(
            "long-inputs",
            "The same at 4,096 tokens",
            _seq2seq("SPADE", "T5", "LongT5-local"),
            {"length": 4096, "batch_size": 1},
        ),
        Case(
            "language-models",
            "Language models of the same size",
            (
                *(variant for name in _LM for variant in _at_rates(name)),
                *_at_rates("BST", "BST, plain head", model=_PLAIN_HEAD),
            ),
            {"length": 512, "batch_size": 8},
        ),
        Case(
            "beyond-windows",
            "Does what reaches beyond the windows help? (windows of 64 in texts of 2,048 tokens)",
            (
                Variant("SPADE-LM", "SPADE-LM"),
                Variant("SPADE-LM, windows alone", "SPADE-LM", {"model": {"ssm_layers": []}, "feed_forward": 460}),
                Variant("BST", "BST"),
                Variant("BST, slower filters", "BST", {"model": {"ssm_dt_min": 1e-4, "ssm_dt_max": 1e-2}}),
                Variant("BST, filters at 1e-3", "BST", {"ssm_learning_rate": 1e-3}),
                Variant("BST, windows alone", "BST", {"model": _BST_WINDOWS}),
                Variant("BST, embeddings of 0.02", "BST", {"model": _SMALL_EMBEDDINGS}),
                Variant("BST, windows alone, embeddings of 0.02", "BST", {"model": _BST_WINDOWS | _SMALL_EMBEDDINGS}),
                Variant("BST, plain head", "BST", {"model": _PLAIN_HEAD}),
                Variant("BST, windows alone, plain head", "BST", {"model": _BST_WINDOWS | _PLAIN_HEAD}),
                Variant("Mega-chunk", "Mega"),
                Variant("SeqBoat", "SeqBoat"),
                Variant("LongVQ", "LongVQ"),
                Variant("LongVQ, maps of 0.08", "LongVQ", {"model": {"initializer_range": 0.08}}),
                Variant("Mistral", "Mistral"),
                Variant("Llama", "Llama"),
            ),
            RECIPE | {"ssm_learning_rate": 3e-3, "length": 2048, "batch_size": 2, "window": 64},
        ),
    )
}
