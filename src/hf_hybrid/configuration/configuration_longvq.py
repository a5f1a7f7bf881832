"""Configuration of LongVQ, attention over vector-quantised keys with a structured memory (arXiv 2404.11163)."""

# No `from __future__ import annotations` here: `@strict` checks types only where they are not strings.
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .checks import check_at_least, check_positive, check_probabilities, check_special_tokens
from .hybrid_config import HybridConfig

_PROBABILITIES = ("hidden_dropout", "activation_dropout", "classifier_dropout")
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "shared_representation_size",
    "value_size",
    "intermediate_size",
    "num_attention_heads",
    "ssm_state_size",
    "window_size",
    "chunk_size",
    "codebook_size",
    "image_size",
)


@strict
class LongVQConfig(HybridConfig):
    """Configuration of all LongVQ models. The default is a decoder; `is_decoder=False` makes a bidirectional encoder.

    Args:
        vocab_size, hidden_size, num_hidden_layers, intermediate_size, hidden_act, use_cache: as in any Transformers model.
        shared_representation_size: width Z of queries and keys, over all heads.
        value_size: width E of values, over all heads; None: twice `hidden_size`.
        num_attention_heads: heads, each with its own codebooks; a divisor of the two widths above.
        ssm_type: "ema", Mega's damped moving average, or "s4d", a diagonal state space.
        ssm_state_size: averages per feature, or twice the complex modes.
        is_decoder: a token sees itself and earlier tokens only.
        window_size: number w of distances that a learned bias tells apart, 0 to w - 1 (in both directions for an
            encoder).
        chunk_size: tokens per chunk, at least w - 1. Keys in the same and the neighbouring chunks have gradients of
            their own; all others share that of their codeword. The outputs do not depend on it. None: the largest of
            w, S / 2 and 64.
        far_key_gradient: False stops the gradients of keys outside these chunks; for comparison only, since models
            then hardly learn to find anything far away.
        codebook_size: codewords per head and layer, S.
        codebook_decay, codebook_decay_warmup: decay rate of the averages of keys that form the codewords, and whether
            they begin as means over all batches.
        codebook_init, codebook_init_iters: initial codewords: keys of the first batch ("data"), centres of
            `codebook_init_iters` iterations of k-means among them ("kmeans"), or "random".
        dead_code_threshold: codewords used less often than this share of the average are moved to badly quantised
            keys; 0: never.
        commitment_loss_weight: weight, in training, of the mean square distance of keys from their codewords.
        freeze_codebook: keep all codewords fixed.
        qk_norm, qk_norm_eps: normalise queries and keys to a root mean square of 1 in every head.
        norm_type, norm_eps: "layernorm" or "rmsnorm".
        hidden_dropout: dropout of the outputs of the state space, of attention and of the feed-forward layer.
        activation_dropout: dropout of attention values and of the inner activations of the feed-forward layer.
        initializer_range: standard deviation of the initial embeddings and linear maps; narrow models learn better with about
            `hidden_size ** -0.5`.
        tie_word_embeddings: the language model head uses the embedding matrix.
        input_type: "tokens", or "values" for sequences of real numbers (pixels, samples of a waveform).
        image_size: height and width that image classification accepts; None accepts any.
        pooling: what classifiers read: the "mean" of all real tokens, or the "last"; None: the last if causal, else the mean.
        classifier_dropout: dropout of the classification heads; None means `hidden_dropout`.
        dual_encoder: classify pairs of texts, from their pooled states [second, first].
    """

    model_type = "longvq"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {  # see `modeling.parallel_plans`
        "layers.*.mixer.v_proj": "colwise_gather_output",
        "layers.*.mixer.mx_proj": "colwise_gather_output",
        "layers.*.mixer.h_proj": "rowwise_split_input",
        "layers.*.ffn.fc1": "colwise",
        "layers.*.ffn.fc2": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    attribute_map: ClassVar[dict[str, str]] = {"is_causal": "is_decoder"}
    former_fields: ClassVar[dict[str, str]] = {"dropout": "hidden_dropout"}
    # Codebook statistics are not predictions: Trainer must not gather them during evaluation.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "commitment_loss", "codebook_perplexity"]

    vocab_size: int = 50257
    hidden_size: int = 512
    num_hidden_layers: int = 12
    shared_representation_size: int = 128
    value_size: int | None = None
    intermediate_size: int = 1024
    num_attention_heads: int = 1
    ssm_type: Literal["ema", "s4d"] = "ema"
    ssm_state_size: int = 16
    is_decoder: bool = True
    window_size: int = 128
    chunk_size: int | None = None
    far_key_gradient: bool = True
    codebook_size: int = 512
    codebook_decay: float | int = 0.99
    codebook_decay_warmup: bool = True
    codebook_init: Literal["data", "kmeans", "random"] = "data"
    codebook_init_iters: int = 10
    dead_code_threshold: float | int = 0.01
    commitment_loss_weight: float | int = 1e-3
    freeze_codebook: bool = False
    qk_norm: bool = True
    qk_norm_eps: float = 1e-6
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    hidden_act: str = "silu"
    hidden_dropout: float | int = 0.1
    activation_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    input_type: Literal["tokens", "values"] = "tokens"
    image_size: int | None = None
    pooling: Literal["mean", "last"] | None = None
    classifier_dropout: float | int | None = None
    dual_encoder: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1

    @classmethod
    def read_former_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file; in files with a field `dropout`, `hidden_dropout` names another probability."""
        if "dropout" in fields:
            fields["activation_dropout"] = fields.pop("hidden_dropout", 0.0)
            fields["hidden_dropout"] = fields.pop("dropout")
        return fields

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = self.take_old_spellings(kwargs)
        if self.value_size is None:
            self.value_size = 2 * self.hidden_size
        super().__post_init__(**kwargs)

    # ------------------------------------------------------------------------------------------------ derived sizes

    @property
    def attention_chunk(self) -> int:
        """Tokens per chunk."""
        if self.chunk_size is not None:
            return self.chunk_size
        return max(self.window_size, self.codebook_size // 2, 64)

    @property
    def classifier_pooling(self) -> str:
        """What classifiers read: "mean" or "last"."""
        if self.pooling is not None:
            return self.pooling
        return "last" if self.is_decoder else "mean"

    @property
    def head_dropout(self) -> float:
        """Dropout of the classification heads."""
        return self.hidden_dropout if self.classifier_dropout is None else self.classifier_dropout

    # ---------------------------------------------------------------------------------------------------- validation

    def validate_architecture(self) -> None:
        """Checks that fields fit together; called on construction and on saving."""
        check_at_least(self, 1, _POSITIVE)
        check_probabilities(self, _PROBABILITIES)
        self._check_attention()
        self._check_codebook()
        if self.input_type == "tokens":
            check_special_tokens(self)

    def _check_attention(self) -> None:
        for name in ("shared_representation_size", "value_size"):
            if getattr(self, name) % self.num_attention_heads:
                raise ValueError(
                    f"`num_attention_heads` must divide `{name}`: {getattr(self, name)} cannot be split among "
                    f"{self.num_attention_heads} heads. Change one of the two."
                )
        if self.attention_chunk < self.window_size - 1:
            raise ValueError(
                f"`chunk_size` must be at least `window_size` - 1 = {self.window_size - 1}, so that the window lies within "
                f"neighbouring chunks; got {self.chunk_size}. Raise it, leave it None, or lower `window_size`."
            )
        if self.ssm_type == "s4d" and self.ssm_state_size % 2:
            raise ValueError(f"`ssm_type='s4d'` needs an even `ssm_state_size`; got {self.ssm_state_size}.")
        check_positive(self, ("qk_norm_eps", "norm_eps"))

    def _check_codebook(self) -> None:
        if not 0 <= self.codebook_decay < 1:
            raise ValueError(f"`codebook_decay` must lie in [0, 1); got {self.codebook_decay}.")
        if not 0 <= self.dead_code_threshold < 1:
            raise ValueError(
                f"`dead_code_threshold` is a share of the average use and must lie in [0, 1); got {self.dead_code_threshold}."
            )
        if self.commitment_loss_weight < 0:
            raise ValueError(f"`commitment_loss_weight` must not be negative; got {self.commitment_loss_weight}.")
        if self.codebook_init_iters < 0:
            raise ValueError(f"`codebook_init_iters` must not be negative; got {self.codebook_init_iters}.")


__all__ = ["LongVQConfig"]
