"""The options of each recipe that its `--help` shows; `--help-all` shows the others too.

A recipe that is not listed has few options, and shows all of them.
"""

from __future__ import annotations

_PRETRAINING = ("data", "tokenizer", "arch", "config_overrides", "model_name_or_path")
_STEPS = ("max_steps", "per_device_train_batch_size", "learning_rate", "output_dir", "resume_from_checkpoint")
_EPOCHS = ("num_train_epochs", *_STEPS[1:])
_CLASSIFIER = ("arch", "config_overrides", "model_name_or_path")

MAIN_OPTIONS: dict[str, tuple[str, ...]] = {
    "pretrain_span_corruption": (*_PRETRAINING, "input_length", *_STEPS),
    "pretrain_clm": (*_PRETRAINING, "block_length", *_STEPS),
    "pretrain_mlm": (*_PRETRAINING, "block_length", *_STEPS),
    "finetune_glue": (
        "model_name_or_path", "task", "data", "validation_data", "validation_fraction", "max_length", "lora_rank", *_EPOCHS,
    ),
    "finetune_summarization": (
        "model_name_or_path", "data", "text_column", "summary_column", "max_source_length", "max_target_length", "lora_rank",
        *_EPOCHS,
    ),
    "finetune_translation": (
        "model_name_or_path", "arch", "tokenizer", "data", "source_lang", "target_lang", "lora_rank", *_EPOCHS,
    ),
    "train_lra": ("task", "data", "num_train", "pixel_values", *_CLASSIFIER, *_STEPS),
    "train_synthetic": ("task", "length", "num_train", *_CLASSIFIER, *_STEPS),
    "classify_image": ("data", "validation_data", "validation_fraction", *_CLASSIFIER, *_EPOCHS),
    "classify_audio": ("data", "validation_data", "sampling_rate", "max_seconds", *_CLASSIFIER, *_EPOCHS),
    "train_tokenizer": ("data", "text_column", "vocab_size", "num_sentinels", "max_documents", "output_dir"),
    "tokenize_text": (
        "data", "tokenizer", "validation_data", "validation_fraction", "text_column", "conversations", "num_proc", "output_dir",
    ),
    "generate": (
        "model_name_or_path", "prompts", "input_file", "text_column", "source_prefix", "output_file", "batch_size",
        "max_new_tokens", "num_beams", "do_sample", "temperature",
    ),
    "inspect_activations": (
        "model_name_or_path", "prompts", "input_file", "data", "kind", "max_length", "max_texts", "pictures", "output_dir",
    ),
}  # fmt: skip

# What a training option does, where the Trainer of Transformers says it at length or in other words.
HELP = {
    "output_dir": "Folder of the checkpoint and all records; new or empty.",
    "num_train_epochs": "Passes over the training data.",
    "max_steps": "Optimizer steps; overrides `num_train_epochs`.",
    "per_device_train_batch_size": "Sequences per step and device.",
    "per_device_eval_batch_size": "Sequences per evaluation step and device.",
    "learning_rate": "Peak learning rate.",
    "resume_from_checkpoint": "Continue a run: `last`, `auto` (continue if there is a checkpoint), or a checkpoint folder.",
}

# Options of training that an evaluation does not have.
TRAINING_ONLY = {
    "arch", "config_overrides", "learning_rate", "lora_rank", "max_steps", "num_train", "num_train_epochs",
    "per_device_train_batch_size", "resume_from_checkpoint", "validation_fraction",
}  # fmt: skip
