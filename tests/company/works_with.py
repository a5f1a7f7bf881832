"""Which programs work with which architecture: the table of docs/works_with.md, which the tests of this folder take their cases from.

Written by `python tests/company/works_with.py`; a test compares the page with the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "works_with.md"
MODEL_TYPES = ("spade", "spade_lm", "mega", "seqboat", "bst", "longvq")


@dataclass(frozen=True)
class Client:
    """A program and what it makes of each architecture.

    Args:
        name: of the program and the part of it.
        package: the distribution whose version counts.
        works: model type -> condition ("" for none) under which it works; the tests run these.
        refused: model type -> what is refused, by an error that names it; the tests run these too.
        impossible: model type -> why there is nothing to try.
    """

    name: str
    package: str
    works: dict[str, str]
    refused: dict[str, str] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)


CLIENTS = (
    Client(
        "TRL, `SFTTrainer`, `DPOTrainer`, `GRPOTrainer` (fused heads)",
        "trl",
        works={
            "spade_lm": "",
            "mega": "",
            "seqboat": "",
            "bst": "",
            "longvq": "with `commitment_loss_weight=0`",
        },
        refused={
            "spade_lm": "adaptive softmax",
            "mega": "adaptive softmax, `add_lm_hidden_dense_layer=True`",
            "seqboat": "`dead_layer_loss_weight` > 0",
            "longvq": "`commitment_loss_weight` > 0",
        },
        impossible={"spade": "an encoder-decoder; these trainers are for decoders"},
    ),
    Client(
        "TRL, `RewardTrainer`",
        "trl",
        works=dict.fromkeys(MODEL_TYPES, ""),
    ),
    Client(
        "`transformers serve`, `transformers chat`",
        "transformers",
        works=dict.fromkeys(MODEL_TYPES[1:], ""),
        impossible={"spade": "an encoder-decoder; the server is for decoders"},
    ),
    Client(
        "the example scripts of Transformers, on exports without the package",
        "transformers",
        works=dict.fromkeys(MODEL_TYPES, ""),
    ),
    Client(
        "`Trainer` with label smoothing",
        "transformers",
        works=dict.fromkeys(MODEL_TYPES, "") | {"longvq": "with `commitment_loss_weight=0`"},
        refused={
            "seqboat": "`dead_layer_loss_weight` > 0 (`HybridTrainer` keeps the term)",
            "longvq": "`commitment_loss_weight` > 0 (`HybridTrainer` keeps the term)",
        },
    ),
    Client(
        "Optuna, by `Trainer.hyperparameter_search`",
        "optuna",
        works=dict.fromkeys(MODEL_TYPES, ""),
    ),
    Client(
        "accelerate, weights on disk or on the CPU (`device_map`, `cpu_offload`)",
        "accelerate",
        works=dict.fromkeys(MODEL_TYPES, ""),
    ),
    Client(
        "lm-evaluation-harness",
        "lm_eval",
        works=dict.fromkeys(MODEL_TYPES, ""),
    ),
    Client(
        "sentence-transformers, `SentenceTransformer`",
        "sentence-transformers",
        works={"spade": "as `SpadeEncoderModel`"} | dict.fromkeys(MODEL_TYPES[1:], ""),
    ),
    Client(
        "sentence-transformers, `CrossEncoder`",
        "sentence-transformers",
        works=dict.fromkeys(MODEL_TYPES, ""),
    ),
)


def client(name: str) -> Client:
    """The client whose name begins so."""
    return next(found for found in CLIENTS if found.name.startswith(name))


def working(name: str, cases: Iterable[Any]) -> list[Any]:
    """The cases (with a `model_type`) that a client is to work with."""
    works = client(name).works
    return [case for case in cases if case.model_type in works]


def version(package: str) -> str:
    """The version that the tests run with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(package)}==(\S+)$", lines, re.MULTILINE)
    if found is None:
        raise ValueError(f"constraints.txt does not pin `{package}`.")
    return found[1]


def cell(entry: Client, model_type: str) -> str:
    """What the page says of a client and an architecture."""
    if model_type in entry.impossible:
        return f"– {entry.impossible[model_type]}"
    parts = []
    if model_type in entry.works:
        parts.append(f"works {entry.works[model_type]}".strip())
    if model_type in entry.refused:
        parts.append(f"refused by name: {entry.refused[model_type]}")
    return "; ".join(parts)


def render() -> str:
    """The whole page."""
    lines = [
        "# Works with",
        "",
        "Which programs run these models, as tested in `tests/company` with the programs themselves (`make test-company`; extra",
        '`company`). "Refused by name" means an error, before anything is computed, that names the setting and the remedy.',
        "",
        "| program (tested version) | " + " | ".join(MODEL_TYPES) + " |",
        "|" + "---|" * (len(MODEL_TYPES) + 1),
    ]
    for entry in CLIENTS:
        cells = " | ".join(cell(entry, model_type) for model_type in MODEL_TYPES)
        lines.append(f"| {entry.name} ({entry.package} {version(entry.package)}) | {cells} |")
    return "\n".join([*lines, "", *NOTES, ""])


NOTES = (
    "## How",
    "",
    '- **TRL**: `SFTTrainer(model="folder", ...)` after `import hf_hybrid`, or an export with',
    '  `SFTConfig(model_init_kwargs={"trust_remote_code": True})`; padded, padding-free and packed batches. Its trainers compute the loss from the',
    "  hidden states and the weights of the head, so losses with further terms are refused.",
    '- **sentence-transformers**: `SentenceTransformer("folder")` and `CrossEncoder("folder")` after `import hf_hybrid`, or an export with',
    "  `trust_remote_code=True`. `max_seq_length` is the tokenizer's `model_max_length`: inputs are not truncated to a length in the configuration.",
    "- **lm-eval**: `hf-hybrid lm-eval` passes the true `max_length` ([evaluation](guides/evaluation.md)); `lm_eval` itself truncates to 2,048",
    "  tokens unless `max_length` is given.",
    "- **`transformers serve`**: `python -c 'import hf_hybrid; from transformers.cli.transformers import app; app()' serve`, or of an export",
    "  `transformers serve --trust-remote-code`. Completions and streams; conversations (and `transformers chat`) where the tokenizer has a chat",
    "  template: `pretrain clm --conversations true` trains with one and saves it. After plain text there is none, and the server's log says so.",
)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
