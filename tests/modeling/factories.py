"""Small models of every architecture, for the tests that run over all of them.

A new architecture joins every parametrised test by its entry in `hf_hybrid.auto.ARCHITECTURES` and one dictionary of small
settings here: the first variant is its default, the others switch the options on that change how a forward pass runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_hybrid.auto import ARCHITECTURES, Architecture, load_heads
from hf_hybrid.configuration.configuration_bst import BstConfig
from hf_hybrid.configuration.configuration_longvq import LongVQConfig
from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.configuration.configuration_spade import SpadeConfig, SpadeLMConfig

VOCABULARY = 40
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "classifier_dropout": 0.0}

_SPADE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "head_dim": 8,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "decoder_layers": 2,
    "window_size": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "ssm_state_size": 8,
    "ssm_max_length": 128,
    **NO_DROPOUT,
}
_SPADE_LM = {name: _SPADE[name] for name in _SPADE if name in SpadeLMConfig.__dataclass_fields__} | {
    "num_hidden_layers": 2
}

_LOCAL_DECODER = {"decoder_window_size": 4, "decoder_ssm_layers": [0]}

_MEGA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "ema_projection_size": 4,
    "shared_representation_size": 8,
    "nffn_hidden_size": 20,
    "max_positions": 512,
    "dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "nffn_activation_dropout_prob": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

# The least sizes, as `config_overrides` of the recipes.
TINY_OVERRIDES = {
    "spade": "hidden_size=16,head_dim=8,intermediate_size=32,num_attention_heads=2,num_hidden_layers=1,window_size=9,ssm_state_size=4",
    "spade_lm": "hidden_size=16,num_attention_heads=2,intermediate_size=32,num_hidden_layers=1,window_size=9,ssm_state_size=4",
    "mega": "hidden_size=16,num_hidden_layers=1,intermediate_size=16,shared_representation_size=8,nffn_hidden_size=16",
    "seqboat": "hidden_size=16,num_hidden_layers=1,value_dim=16,qk_dim=8,ema_dim=4,window_size=9",
    "longvq": "hidden_size=16,num_hidden_layers=1,value_size=16,shared_representation_size=8,intermediate_size=16,window_size=8,"
    "codebook_size=8",
    "bst": "hidden_size=16,num_hidden_layers=2,intermediate_size=16,num_attention_heads=2,head_dim=8,block_size=8,"
    "ssm_state_size=4",
}


def _mega(settings: dict[str, Any]) -> Callable[..., MegaConfig]:
    def build(**overrides: Any) -> MegaConfig:
        return MegaConfig(**_MEGA | settings | overrides)

    return build


_SEQBOAT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "qk_dim": 8,
    "value_dim": 24,
    "ema_dim": 4,
    "window_size": 5,
    "distance_table_size": 32,
    "hidden_dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def _seqboat(settings: dict[str, Any]) -> Callable[..., SeqBoatConfig]:
    def build(**overrides: Any) -> SeqBoatConfig:
        return SeqBoatConfig(**_SEQBOAT | settings | overrides)

    return build


# The codebooks stand still and cost nothing: the common tests call a model twice and expect the same. `test_longvq` has the others.
_LONGVQ = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "shared_representation_size": 8,
    "value_size": 24,
    "intermediate_size": 20,
    "ssm_state_size": 4,
    "window_size": 3,
    "chunk_size": 4,
    "codebook_size": 6,
    "freeze_codebook": True,
    "commitment_loss_weight": 0.0,
    "hidden_dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def _longvq(settings: dict[str, Any]) -> Callable[..., LongVQConfig]:
    def build(**overrides: Any) -> LongVQConfig:
        return LongVQConfig(**_LONGVQ | settings | overrides)

    return build


_BST = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 6,
    "intermediate_size": 24,
    "block_size": 4,
    "bst_layers": [1],
    "num_context_states": 3,
    "ssm_state_size": 8,
    "ssm_filter_length": 7,
    "ssm_filter_emb_dim": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "final_dropout": 0.0,
}


def _bst(**settings: Any) -> Callable[..., BstConfig]:
    def build(**overrides: Any) -> BstConfig:
        fields = _BST | settings | overrides
        if fields["num_hidden_layers"] == 1 and "bst_layers" not in overrides:
            fields["bst_layers"] = [0]
        return BstConfig(**fields)

    return build


VARIANTS: dict[str, dict[str, Callable[..., PreTrainedConfig]]] = {
    "spade": {
        "default": lambda **kwargs: SpadeConfig(**(_SPADE | kwargs)),
        "official": lambda **kwargs: SpadeConfig.official(**(_SPADE | {"head_dim": 8} | kwargs)),
        "chunk_gated": lambda **kwargs: SpadeConfig(
            **_SPADE
            | {"local_attention_type": "chunk", "ssm_combine": "gated", "logits_scaling": 4.0}
            | {"max_target_positions": 96}
            | kwargs
        ),
        "rotary_add": lambda **kwargs: SpadeConfig(
            **_SPADE
            | {"position_encoding": "rotary", "ssm_combine": "add", "ssm_layers": [0, 2], "norm_type": "layernorm"}
            | {"norm_first": False, "attention_bias": True, "tie_word_embeddings": False}
            | kwargs
        ),
        "stack_s4": lambda **kwargs: SpadeConfig(
            **_SPADE | {"ssm_combine": "stack", "ssm_type": "s4", "share_relative_bias": True} | kwargs
        ),
        "local_decoder": lambda **kwargs: SpadeConfig(**(_SPADE | _LOCAL_DECODER | kwargs)),
        "local_decoder_chunk": lambda **kwargs: SpadeConfig(
            **_SPADE
            | _LOCAL_DECODER
            | {"local_attention_type": "chunk", "position_encoding": "rotary", "decoder_ssm_layers": [0, 1]}
            | kwargs
        ),
    },
    "spade_lm": {
        "default": lambda **kwargs: SpadeLMConfig(**(_SPADE_LM | kwargs)),
        "official": lambda **kwargs: SpadeLMConfig.official(
            **_SPADE_LM | {"adaptive_cutoffs": [12, 25], "adaptive_factor": 2, "adaptive_dropout": 0.0} | kwargs
        ),
        "chunk_gated": lambda **kwargs: SpadeLMConfig(
            **_SPADE_LM
            | {"local_attention_type": "chunk", "window_size": 5, "ssm_combine": "gated", "logits_scaling": 4.0}
            | {"share_relative_bias": False}
            | kwargs
        ),
        "rotary_add": lambda **kwargs: SpadeLMConfig(
            **_SPADE_LM
            | {"position_encoding": "rotary", "ssm_combine": "add", "ssm_layers": [0, 1], "norm_type": "layernorm"}
            | {"tie_word_embeddings": False}
            | kwargs
        ),
        "stack_s4": lambda **kwargs: SpadeLMConfig(
            **_SPADE_LM | {"ssm_combine": "stack", "ssm_type": "s4", "ssm_num_copies": 4} | kwargs
        ),
        "normformer": lambda **kwargs: SpadeLMConfig(
            **_SPADE_LM
            | {"scale_attention": True, "scale_feed_forward": True, "scale_residuals": True, "ssm_trainable": False}
            | kwargs
        ),
        "attention_only": lambda **kwargs: SpadeLMConfig(
            **_SPADE_LM
            | {"ssm_layers": [], "scale_heads": True, "adaptive_cutoffs": [20], "tie_adaptive_projections": False}
            | kwargs
        ),
    },
    "mega": {
        "default": _mega({}),
        "laplace_simple": _mega(
            {
                "attention_activation": "laplace",
                "relative_positional_bias": "simple",
                "normalization_type": "layernorm",
            }
            | {"normalize_before_mega": False, "normalize_before_ffn": False, "normalize_embeddings": True}
            | {"add_lm_hidden_dense_layer": True}
        ),
        "relu2_untied": _mega(
            {"attention_activation": "relu2", "relative_positional_bias": "simple", "normalization_type": "rmsnorm"}
            | {"truncation": 5}
            | {"tie_word_embeddings": False, "share_encoder_decoder_embeddings": False, "norm_affine": False}
        ),
        "chunk_softmax_simple": _mega(
            {"use_chunking": True, "chunk_size": 4, "relative_positional_bias": "simple", "use_normalized_ffn": False}
            | {"add_token_type_embeddings": True, "activation": "gelu"}
        ),
        "chunk_laplace": _mega(
            {"use_chunking": True, "chunk_size": 5, "attention_activation": "laplace", "truncation": 7}
            | {"add_lm_hidden_dense_layer": False, "decoder_chunk_size": 3, "normalization_type": "layernorm"}
        ),
        "chunk_relu2_adaptive": _mega(
            {"use_chunking": True, "chunk_size": 6, "attention_activation": "relu2", "normalization_type": "rmsnorm"}
            | {
                "scale_embeddings": True,
                "final_norm": True,
                "mask_padded_states": True,
                "initializer_scheme": "official",
            }
            | {"add_lm_hidden_dense_layer": False, "adaptive_cutoffs": [12, 25], "adaptive_factor": 2}
        ),
    },
    "seqboat": {
        "default": _seqboat({}),
        "relu2_distance": _seqboat(
            {"attention_activation": "relu2", "position_bias": "distance", "window_size": 4, "ema_truncation": 5}
            | {"norm_type": "rmsnorm", "distance_table_size": 6, "tie_word_embeddings": False}
        ),
        "laplace_rank": _seqboat(
            {"attention_activation": "laplace", "position_bias": "rank", "window_size": 2, "norm_type": "scalenorm"}
            | {"norm_first": False, "embedding_norm": True, "hidden_act": "gelu"}
        ),
        "unlimited_t5": _seqboat(
            {"position_bias": "t5", "window_size": None, "intermediate_size": 20, "absolute_sinusoid": True}
            | {"final_norm_affine": False, "initializer_scheme": "official"}
        ),
        "unlimited_relu2": _seqboat(
            {
                "attention_activation": "relu2",
                "window_size": None,
                "router_act_bias": 0.1,
                "dead_layer_loss_weight": 0.1,
            }
        ),
        "always_active": _seqboat({"always_active": True, "position_bias": "distance", "window_size": 6}),
    },
    "longvq": {
        "default": _longvq({}),
        "heads_s4d": _longvq(
            {"num_attention_heads": 2, "ssm_type": "s4d", "norm_type": "rmsnorm", "tie_word_embeddings": False}
            | {"window_size": 5, "chunk_size": 4}
        ),
        "plain_keys": _longvq({"qk_norm": False, "window_size": 1, "chunk_size": 1, "codebook_size": 50}),
    },
    "bst": {
        "default": _bst(),
        "mf": _bst(context_variant="mf", bst_layers=[0, 1]),
        "mh_sliding": _bst(context_variant="mh", local_attention="sliding_window", qk_norm=False),
        "mf_unstructured": _bst(context_variant="mf", ssm_type="unstructured", tie_word_embeddings=False),
        "sh_unstructured": _bst(ssm_type="unstructured", local_attention="sliding_window", block_size=5),
        "mh_s4": _bst(context_variant="mh", ssm_type="s4", bst_layers=[0]),
    },
}

# Variants that stay in the default suite: those with another kind of state, mask or position. The others are marked as wide.
KINDS: dict[str, tuple[str, ...]] = {
    "spade": ("default", "official", "local_decoder_chunk"),
    "spade_lm": ("default", "official"),
    "mega": ("default", "chunk_laplace"),
    "seqboat": ("default", "unlimited_t5"),
    "longvq": ("default", "heads_s4d"),
    "bst": ("default", "mf_unstructured"),
}

GENERATIVE_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")

# What a head needs of its configuration besides the variant.
HEAD_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "mega": {
        "AutoModelForCausalLM": {"is_decoder": True, "bidirectional": False},
        "AutoModelForSeq2SeqLM": {"is_encoder_decoder": True, "adaptive_cutoffs": None},
        "AutoModelForImageClassification": {"input_type": "values"},
        "AutoModelForAudioClassification": {"input_type": "values"},
    },
    "seqboat": {
        "AutoModelForCausalLM": {"is_decoder": True},
        "AutoModelForImageClassification": {"input_type": "values"},
        "AutoModelForAudioClassification": {"input_type": "values"},
    },
    "longvq": {
        "AutoModelForMaskedLM": {"is_decoder": False},
        "AutoModelForTokenClassification": {"is_decoder": False},
        "AutoModelForQuestionAnswering": {"is_decoder": False},
        "AutoModelForImageClassification": {"input_type": "values", "is_decoder": False},
        "AutoModelForAudioClassification": {"input_type": "values"},
    },
}

# What the common checks of Transformers presuppose: two layers, as many in the encoder as in the decoder.
SHALLOW_SETTINGS: dict[str, dict[str, Any]] = {"spade": {"num_hidden_layers": 2, "decoder_layers": 2}}

# Heads whose inputs are no token ids (batch, length).
OTHER_INPUTS = ("AutoModelForMultipleChoice", "AutoModelForImageClassification", "AutoModelForAudioClassification")


@dataclass(frozen=True)
class Case:
    """One model class in one variant."""

    model_type: str
    auto_name: str
    variant: str

    @property
    def architecture(self) -> Architecture:
        return next(found for found in ARCHITECTURES if found.model_type == self.model_type)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return dict(load_heads(self.architecture))[self.auto_name]

    def config(self, **overrides: Any) -> PreTrainedConfig:
        return VARIANTS[self.model_type][self.variant](**self.head_settings | overrides)

    @property
    def head_settings(self) -> dict[str, Any]:
        return HEAD_SETTINGS.get(self.model_type, {}).get(self.auto_name, {})

    def model(self, **overrides: Any) -> PreTrainedModel:
        """The model in evaluation mode, its parameters moved away from their initial values; each time the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = perturb(self.model_class(self.config(**overrides))).eval()
            balance_routers(model, self)
            return model

    def shallow_model(self) -> PreTrainedModel:
        """The model with one layer in each stack, for tests that trace it: a second or two per layer."""
        depths = ("num_hidden_layers", "decoder_layers")
        config = self.config()
        overrides: dict[str, Any] = {name: 1 for name in depths if name in type(config).__dataclass_fields__}
        overrides |= {name: [0] for name in ("ssm_layers", "decoder_ssm_layers") if getattr(config, name, None)}
        return self.model(**overrides)

    @property
    def is_seq2seq(self) -> bool:
        """Whether a forward pass takes decoder inputs."""
        return "decoder_input_ids" in inspect.signature(self.model_class.forward).parameters

    @property
    def has_attentions(self) -> bool:
        """Whether every stack of the model can return its attention weights."""
        with torch.device("meta"):
            model = self.model_class(self.config())
        stacks = [module for module in model.modules() if getattr(type(module), "_can_record_outputs", None)]
        return all("attentions" in stack._can_record_outputs for stack in stacks)

    @property
    def is_causal(self) -> bool:
        """Whether the model has one causal stack, with a cache."""
        return not self.is_seq2seq and "past_key_values" in inspect.signature(self.model_class.forward).parameters

    def inputs(self, batch: int = 2, length: int = 11, target: int = 6) -> dict[str, torch.Tensor]:
        """Random inputs of the forward pass without padding; ids above those of the special tokens."""
        if self.auto_name == "AutoModelForMultipleChoice":
            return {"input_ids": random_ids(3 * batch, length).view(batch, 3, length)}
        if self.auto_name == "AutoModelForImageClassification":
            return {"pixel_values": torch.randn(batch, 1, 4, 5)}
        if self.auto_name == "AutoModelForAudioClassification":
            return {"input_values": torch.randn(batch, length)}
        inputs = {"input_ids": random_ids(batch, length)}
        if self.is_seq2seq:
            inputs["decoder_input_ids"] = random_ids(batch, target)
        return inputs

    def labels(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Labels that fit the head, or nothing for a bare model."""
        batch, length = next(iter(inputs.values())).shape[:2]
        if self.auto_name == "AutoModelForSeq2SeqLM":
            return {"labels": random_ids(*inputs["decoder_input_ids"].shape)}
        if self.auto_name == "AutoModelForCausalLM":
            return {"labels": inputs["input_ids"].clone()}
        if self.auto_name == "AutoModelForMaskedLM":
            return {"labels": random_ids(batch, length)}
        if self.auto_name.endswith("Classification") and self.auto_name != "AutoModelForTokenClassification":
            return {"labels": torch.arange(batch) % 2}
        if self.auto_name == "AutoModelForTokenClassification":
            return {"labels": torch.randint(2, (batch, length))}
        if self.auto_name == "AutoModelForMultipleChoice":
            return {"labels": torch.arange(batch) % 3}
        if self.auto_name == "AutoModelForQuestionAnswering":
            return {"start_positions": torch.arange(batch), "end_positions": torch.arange(batch) + 1}
        return {}


def all_variants(auto_name: str | None = None) -> list[Case]:
    """Every variant of every architecture that has the head `auto_name` (None: a head that exercises all of the model)."""
    cases = []
    for architecture in ARCHITECTURES:
        generative = {"AutoModelForSeq2SeqLM", "AutoModelForCausalLM"} & architecture.heads.keys()
        head = auto_name or (sorted(generative)[0] if generative else "AutoModel")
        if head in architecture.heads:
            cases += [Case(architecture.model_type, head, variant) for variant in VARIANTS[architecture.model_type]]
    return cases


def all_heads(*, other_inputs: bool = False) -> list[Case]:
    """Every head of every architecture that reads token ids (or: those that read something else), in the default variant."""
    return [
        Case(architecture.model_type, auto_name, next(iter(VARIANTS[architecture.model_type])))
        for architecture in ARCHITECTURES
        for auto_name in architecture.heads
        if (auto_name in OTHER_INPUTS) == other_inputs
    ]


def shallow_settings(model_type: str) -> dict[str, Any]:
    """Overrides that give the model of a type the same small depth everywhere."""
    return SHALLOW_SETTINGS.get(model_type, {})


def parametrize(cases: list[Case], kept: Collection[Case] | None = None) -> pytest.MarkDecorator:
    """`@parametrize(cases)` gives the test an argument `case`, with readable names.

    Args:
        cases: all of them.
        kept: those of the default suite; the others are marked as wide. Default: the variants in `KINDS` of generative heads,
            one case of each other head, and one of each architecture.
    """
    if kept is None:
        kept = [case for case in cases if case.variant in KINDS.get(case.model_type, VARIANTS[case.model_type])]
        kept = [case for case in kept if case.auto_name in GENERATIVE_HEADS] + one_of_each_kind(kept)
        kept += [case for case in one_each(cases) if case.model_type not in {other.model_type for other in kept}]
    parameters = []
    for case in cases:
        name = f"{case.model_type}-{case.auto_name.removeprefix('AutoModel')}-{case.variant}".replace("--", "-")
        parameters.append(pytest.param(case, id=name, marks=[] if case in kept else [pytest.mark.wide]))
    return pytest.mark.parametrize("case", parameters)


def one_each(cases: list[Case]) -> list[Case]:
    """One case of each architecture, of a head that no architecture before has, where there is one."""
    found: list[Case] = []
    for model_type in dict.fromkeys(case.model_type for case in cases):
        own = [case for case in cases if case.model_type == model_type]
        known = {case.auto_name for case in found}
        found.append(next((case for case in own if case.auto_name not in known), own[0]))
    return found


def one_of_each_kind(cases: list[Case]) -> list[Case]:
    """Cases that cover every head and every architecture: each head on the architecture that has the fewest so far."""
    found: list[Case] = []
    for auto_name in dict.fromkeys(case.auto_name for case in cases):
        own = [case for case in cases if case.auto_name == auto_name]
        found.append(min(own, key=lambda case: sum(case.model_type == other.model_type for other in found)))
    known = {case.model_type for case in found}
    return found + [case for case in one_each(cases) if case.model_type not in known]


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int = 1) -> Any:
    """Moves all parameters away from their initial values: zeros, ones and tiny values would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if ".ssm." in name:
            parameter.add_(noise, alpha=0.1)
        elif parameter.dim() == 1:
            parameter.add_(noise, alpha=0.2)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def balance_routers(model: torch.nn.Module, case: Case) -> None:
    """Moves the threshold of every router so that it activates about half of some random tokens: all or none hides errors."""
    routers = [module for module in model.modules() if hasattr(module, "log_temperature")]
    for router in routers:
        margins: list[torch.Tensor] = []

        def keep(_module: torch.nn.Module, _inputs: tuple, routing: Any, margins: list = margins) -> None:
            margins.append(routing.logits[..., 1] - routing.logits[..., 0] - _module.act_bias)

        handle = router.register_forward_hook(keep)
        inputs = case.inputs(batch=4, length=24)
        if model.config.dual_encoder:
            inputs["pair_input_ids"] = inputs["input_ids"]
        if "pixel_values" in inputs and model.config.image_size is not None:
            inputs["pixel_values"] = torch.rand(4, 1, model.config.image_size, model.config.image_size)
        model(**inputs)
        handle.remove()
        router.bias[1] -= margins[0].median()


def random_ids(batch: int, length: int) -> torch.Tensor:
    """Ids that are no special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length))


def main_output(outputs: ModelOutput) -> torch.Tensor:
    """The tensor that the head is for."""
    if "start_logits" in outputs:
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def enable_checkpointing(model: Any, options: dict[str, Any] | None = None) -> None:
    """Checkpoints activations, by the name that the installed Transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(options)
    assert getattr(model, f"is_{name}_checkpointing")
