"""Every name that `hf_hybrid` offers, and the module that defines it.

The classes of the architectures come from their records in `auto`; all other names are listed here. They are imported
on first use. `write_stub` writes the stub `__init__.pyi`, which shows the same names to type checkers and editors.
"""

from __future__ import annotations

from collections.abc import Iterable

from .auto import public_classes

_NAMES: dict[str, tuple[str, ...]] = {
    "auto": ("Architecture", "Paper", "register_architecture"),
    "data.corpus": ("embedded_classification_examples", "embedded_summarization_pairs", "embedded_text_corpus"),
    "data.packing": ("SeparateDocumentsCollator", "pack_documents"),
    "data.sharded_stream": ("ShardedStream", "StreamBatches", "merge_stream_states"),
    "data.span_corruption": ("SpanCorruptionDataset",),
    "data.streaming": ("CausalBlockStream",),
    "export": ("export_decoding_step", "export_int8", "export_onnx", "export_program"),
    "hub": ("push", "push_folder", "push_space"),
    "memory": ("MemoryEstimate", "estimate_memory"),
    "metrics": ("bits_per_byte", "perplexity"),
    "model_card": ("ModelCard", "card_of_model", "write_model_card"),
    "modeling.call_cache": ("detach_cache", "reset_rows"),
    "modeling.decoding_step": ("DecodingStep",),
    "ops.sequence_group": ("SequenceGroup",),
    "remote_code": ("export_remote_code", "verify_export"),
    "tokenization.byte_tokenizer": ("byte_tokenizer",),
    "tokenization.sentencepiece_tokenizer": ("train_sentencepiece_tokenizer",),
    "training.activations": ("ActivationCallback", "record_activations"),
    "training.adapters": ("add_lora", "load_adapter", "lora_target_modules", "state_modules"),
    "training.arguments": ("HybridSeq2SeqTrainingArguments", "HybridTrainingArguments"),
    "training.callbacks": ("TimeLimitCallback",),
    "training.codebooks": ("CodebookCallback",),
    "training.context_parallel": ("context_parallel", "reduce_gradients", "set_sequence_group", "split_batch"),
    "training.parameter_groups": ("parameter_groups",),
    "training.trainer": ("HybridSeq2SeqTrainer", "HybridTrainer"),
    "viz": ("activation_map", "codebook_usage", "plot_loss_curves", "plot_state_space_channels"),
}


def modules_by_name() -> dict[str, str]:
    """Public name -> module (relative to this package) that defines it."""
    return {**public_classes(), **{name: module for module, names in _NAMES.items() for name in names}}


def no_such_name(name: str, known: Iterable[str]) -> AttributeError:
    """The error for a name that does not exist, with the most similar one that does."""
    hint = "`dir(hf_hybrid)` lists the public names."
    if not name.startswith("_"):
        import difflib

        lower = {item.lower(): item for item in known}
        close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.7)
        hint = f"Did you mean {lower[close[0]]!r}?" if close else hint
    return AttributeError(f"module 'hf_hybrid' has no attribute {name!r}. {hint}")


def stub() -> str:
    """The text of `__init__.pyi`."""
    modules: dict[str, list[str]] = {}
    for name, module in modules_by_name().items():
        modules.setdefault(module, []).append(name)
    lines = ["# Written by `hf_hybrid.public_names.write_stub`.", ""]
    for module in sorted(modules):
        lines += [f"from .{module} import {name} as {name}" for name in sorted(modules[module])]
    return "\n".join([*lines, "", "__version__: str", "__all__: list[str]", ""])


def write_stub() -> None:
    """Rewrites `__init__.pyi` after a name was added or moved."""
    from pathlib import Path

    Path(__file__).with_name("__init__.pyi").write_text(stub(), encoding="utf-8")
