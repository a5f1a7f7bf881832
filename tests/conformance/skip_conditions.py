"""Why the library skips some of its own checks. A skip for a reason that is not here makes the check fail."""

from __future__ import annotations

import re

# What the library says when it skips -> what that means. All are conditions of the library's own.
CONDITIONS = {
    r"test requires (accelerator|multiple accelerators|MPS)": "no accelerator",
    r"test requires the kernels library": "the `kernels` library is not installed",
    r"test requires deepspeed": "DeepSpeed is not installed",
    r"test requires Flash Attention( \d)?": "Flash Attention is not installed",
    r"(\w+|Parts of this model) (does not|don't) support (SDPA|sdpa)": "no attention of the kind that SDPA computes",
    r"Model architecture does not support attentions|Model does not (output attentions|support output_attentions)": (
        "no stack that can return attention weights"
    ),
    r"This model has no `base_model_class` defined in tester\.": "a check of the bare model",
    r"This model does not (support RoPE scaling|have RoPE)|.+ has no axial RoPE layer defined\.": (
        "no rotary embedding of the library's"
    ),
    r"Model does not have position embeddings": "no table of positions that the check knows how to resize",
    r"\w+ does not support grouped_mm|This model has no (sparse experts|`output_router_logits` in its config)\.": (
        "no mixture of experts"
    ),
    r"No conversion found for .*": "no renaming of old weights is registered",
    r"Model does not have a TP plan\.": "no plan for tensor parallelism",
    r"(This model is not composite|Model is not a composite model\.|No subconfigs so the test does not make sense)": (
        "no model composed of several configurations"
    ),
    r"No sequence-to-sequence language modeling head to check": "not an encoder-decoder",
    r"No decoder-only language modeling head to check": "not a causal language model",
    r"Model does not support sliding window mask": "no sliding window of the library's",
    r"\w+ (class )?has no _keep_in_fp32_modules n?or _keep_in_fp32_modules_strict attribute defined": (
        "no tensors that loading keeps in float32 (the layers do that themselves)"
    ),
    r"\w+ does not propagate hidden states correctly or uses another name": (
        "hidden states of encoder and decoder, which the check looks up under the name of a single stack"
    ),
    r"This model doesn't use `inputs_embeds`": "no `inputs_embeds`: the model reads real numbers",
    r"ModelTester is not configured to run training tests": "no loss",
    r"No model with a differentiable loss was available to verify .*": "no loss",
    r"`?test_resize_embeddings`? is set to `?False`?": "no vocabulary",
    r"tokenizer doesn't accept chat templates at input": "the class takes its chat template from the saved files only",
    r"Tokenizer from TokenizersExtractor not enabled for this tokenizer": (
        "the general tokenizer class is made of a whole tokenizer.json, not of a vocabulary"
    ),
    r"HF_HYBRID_SKIP_CONFORMANCE is set": "switched off by the environment",
    r"a check of newer releases": "an older release of Transformers, without this check or with one that fits only its own models",
    r"Not a prioritized model for now\.": "an older release of Transformers, which checks only models with a year in their file",
    r"the page was made with another release of Transformers": "another release of Transformers",
}


def condition(reason: str) -> str:
    """The condition behind a reason for skipping, or the reason itself if it is not listed."""
    return next((meaning for pattern, meaning in CONDITIONS.items() if re.fullmatch(pattern, reason)), reason)


def is_accepted(reason: str) -> bool:
    """Whether a reason for skipping is listed."""
    return any(re.fullmatch(pattern, reason) for pattern in CONDITIONS)
