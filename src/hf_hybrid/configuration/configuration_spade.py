"""Configurations of SPADE, the State Space Augmented Transformer (arXiv 2212.08136).

`SpadeConfig` describes the encoder-decoder, `SpadeLMConfig` the decoder-only language model. The defaults of both are the
settings for *new* models (pre-norm, RMSNorm, gated feed-forward, a trainable diagonal SSM); `.official()` gives the settings
of the published code, under which official checkpoints reproduce their outputs.
"""

# No `from __future__ import annotations` here: `@strict` checks types only where they are not strings.
import copy
from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict

from .checks import (
    check_at_least,
    check_bands,
    check_probabilities,
    check_special_tokens,
    check_step_sizes,
)
from .hybrid_config import HybridConfig

_POSITIVE = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "window_size", "ssm_max_length")
# Programs take a field of that name for the longest input.
_FORMER_TABLE = {"max_position_embeddings": "max_target_positions"}
_FORMER_WINDOWS = {"attention_window": "window_size", "decoder_attention_window": "decoder_window_size"}
FEED_FORWARD_TYPES = ("relu", "gelu", "gated-gelu", "gated-silu")


def _read_former_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file; windows were radii, which do not count the token itself, and norm names had an
    underscore."""
    has_windows = fields.get("local_attention_type", "window") == "window"
    for former, name in _FORMER_WINDOWS.items():
        if former in fields:
            size = fields.pop(former)
            fields[name] = size + 1 if has_windows and size is not None else size
    for former, name in _FORMER_TABLE.items():
        if former in fields:
            fields[name] = fields.pop(former)
    if isinstance(norm := fields.get("norm_type"), str):
        fields["norm_type"] = norm.replace("_", "")
    return fields


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, accepted))}; got {value!r}.")


def _check_layer_list(name: str, indices: list[int], num_layers: int, depth_name: str) -> None:
    wrong = [index for index in indices if not 0 <= index < num_layers]
    if wrong:
        raise ValueError(
            f"`{name}` names layer {wrong[0]}, but `{depth_name}` is {num_layers}: accepted are 0 to {num_layers - 1}."
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"`{name}` names a layer twice: {indices}.")


def _with_logits_scaling(fields: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """Extra fields with `scale_logits` of earlier checkpoints (divide by sqrt(hidden_size), or not) written as `logits_scaling`."""
    if "scale_logits" not in fields:
        return fields
    others = {name: value for name, value in fields.items() if name != "scale_logits"}
    return others | ({"logits_scaling": hidden_size**0.5} if fields["scale_logits"] else {})


def _check_common(config: HybridConfig) -> None:
    """Rules that the encoder-decoder and the language model share."""
    if config.logits_scaling <= 0:
        raise ValueError(f"`logits_scaling` must be greater than 0; got {config.logits_scaling}.")
    check_at_least(config, 1, _POSITIVE)
    check_at_least(config, 2, ("relative_attention_num_buckets", "ssm_state_size"))
    check_probabilities(config, ("hidden_dropout", "attention_dropout", "activation_dropout", "classifier_dropout"))
    if config.ssm_state_size % 2:
        raise ValueError(
            f"`ssm_state_size` counts real states and must be even (half of them are stored); got {config.ssm_state_size}."
        )
    copies = config.ssm_num_copies
    if copies is not None and (copies < 1 or config.hidden_size % copies):
        raise ValueError(f"`ssm_num_copies` must divide `hidden_size` ({config.hidden_size}); got {copies}.")
    check_step_sizes(config)
    if config.ssm_stop_gradient and config.ssm_trainable:
        raise ValueError(
            "`ssm_stop_gradient=True` lets no gradient reach the SSM, so `ssm_trainable=True` would train nothing: "
            "set one of them to False."
        )
    if config.ssm_type == "s4" and config.ssm_init != "legs":
        raise ValueError(
            f"`ssm_type='s4'` is defined for `ssm_init='legs'` only; got {config.ssm_init!r}. Use ssm_type='s4d'."
        )
    if config.position_encoding == "rotary" and not config.rotary_base > 0:
        raise ValueError(f"`rotary_base` must be positive; got {config.rotary_base}.")
    if config.norm_eps < 0:
        raise ValueError(f"`norm_eps` must not be negative; got {config.norm_eps}.")
    _check_choice("feed_forward_proj", config.feed_forward_proj, FEED_FORWARD_TYPES)
    check_special_tokens(config)


def _check_buckets(config: HybridConfig, *, is_causal: bool) -> None:
    """Relative biases need an exact and a logarithmic bucket per direction; see `relative_position_bucket`."""
    if config.position_encoding != "bias":
        return
    buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if not is_causal and (buckets < 4 or buckets % 2):
        raise ValueError(
            f"`relative_attention_num_buckets` must be even and at least 4, half for each direction; got {buckets}."
        )
    exact = buckets // 2 if is_causal else buckets // 4
    if distance <= exact:
        raise ValueError(
            f"`relative_attention_max_distance` ({distance}) must exceed {exact}, the distance where the logarithmic ones of "
            f"{buckets} `relative_attention_num_buckets` begin."
        )


@strict
class SpadeConfig(HybridConfig):
    """Configuration of the SPADE encoder-decoder.

    The encoder uses local attention in every layer and adds a bidirectional state space model (SSM) in `ssm_layers`; the
    decoder uses full causal attention and cross-attention.

    Args:
        vocab_size: tokens in the vocabulary, sentinels included.
        hidden_size: width of the residual stream.
        head_dim: width of one attention head; `num_heads * head_dim` must equal `hidden_size`.
        intermediate_size: inner width of the feed-forward layers.
        num_hidden_layers, decoder_layers: depths.
        num_heads: attention heads of every layer.
        window_size: tokens w that a query sees, itself included: itself and the w - 1 on each side (`local_attention_type=
            "window"`), or the tokens of its chunk ("chunk").
        local_attention_type: "window" or "chunk".
        position_encoding: positions inside the local attention: "bias" (T5 buckets), "rotary" or "none".
        relative_attention_num_buckets, relative_attention_max_distance: T5 bucket parameters.
        share_relative_bias: one table for all encoder layers instead of one per layer.
        ssm_layers: encoder layers that hold an SSM beside their attention.
        ssm_combine: "concat" (linear of both), "gated" (the same, times a sigmoid gate), "add" (fixed weights), "stack"
            (attention over the SSM output).
        ssm_add_weight: weight of the SSM branch under "add".
        ssm_type: "s4d" (diagonal, zero-order hold) or "s4" (diagonal plus low rank, bilinear; the published form).
        ssm_init: "legs", "lin" or "inv" (the last two for "s4d").
        ssm_state_size: real states per channel, N (even; N/2 conjugate pairs are stored).
        ssm_num_copies: independent copies of the state matrix; None means one per channel.
        ssm_dt_min, ssm_dt_max: range of the initial step sizes.
        ssm_max_length: tokens that the kernel of "s4" reaches, on each side; longer inputs are processed, with the reach
            truncated. "s4d" reaches over any length.
        ssm_trainable: False keeps the SSM as a fixed filter bank (its tensors are then buffers).
        ssm_stop_gradient: no gradient through the SSM to the layer input (published encoder-decoder).
        norm_first: normalise before each sublayer (pre-norm) instead of after it.
        norm_type, norm_eps: "rmsnorm" or "layernorm", and its epsilon.
        embedding_norm: normalise the embeddings; not those of a decoder with rotary positions: with nothing added to them, a head
            that is tied to them would begin by repeating the token just read.
        use_final_norm: normalise the output of encoder and decoder.
        feed_forward_proj: "relu", "gelu" (exact), "gated-gelu" (tanh form, as T5) or "gated-silu".
        feed_forward_bias: biases in the feed-forward layers. None: biases exactly where the published code has them.
        attention_bias: biases in the decoder attention (the encoder never has them).
        hidden_dropout, attention_dropout, activation_dropout, classifier_dropout: probabilities.
        max_target_positions: rows of a learned table of positions in the decoder, the longest target (the published form).
            None: no table and no limit; the full self-attention of the decoder has rotary positions instead, and local
            attention (`decoder_window_size`) those of `position_encoding`.
        decoder_window_size: None for full causal self-attention in the decoder, or the tokens that a query sees, itself included.
        decoder_ssm_layers: decoder layers with a causal SSM (needs `decoder_window_size`).
        logits_scaling: divisor of the logits; T5 has sqrt(hidden_size) for tied embeddings.
        initializer_scheme: "normal" (std `initializer_range`, residual projections scaled by depth) or "official" (the
            distributions of the published code, std-1 embeddings times `initializer_factor`).
        pooling: "mean", "first" or "last" real token.
        dual_encoder: classify pairs of texts, which are encoded separately and compared token by token (`SpadePairHead`).
    """

    model_type = "spade"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {  # see `modeling.parallel_plans`
        "encoder.layers.*.mixer.attention.q_proj": "colwise_gather_output",
        "encoder.layers.*.mixer.attention.k_proj": "colwise_gather_output",
        "encoder.layers.*.mixer.attention.v_proj": "colwise_gather_output",
        "encoder.layers.*.mixer.attention.o_proj": "rowwise_split_input",
        "encoder.layers.*.mixer.aggregate": "colwise_gather_output",
        "encoder.layers.*.mixer.aggregate_gate": "colwise_gather_output",
        "encoder.layers.*.feed_forward.wi": "colwise",
        "encoder.layers.*.feed_forward.wi_0": "colwise",
        "encoder.layers.*.feed_forward.wi_1": "colwise",
        "encoder.layers.*.feed_forward.wo": "rowwise",
        "decoder.layers.*.self_attention.q_proj": "colwise_gather_output",
        "decoder.layers.*.self_attention.k_proj": "colwise_gather_output",
        "decoder.layers.*.self_attention.v_proj": "colwise_gather_output",
        "decoder.layers.*.self_attention.o_proj": "rowwise_split_input",
        "decoder.layers.*.self_attention.attention.q_proj": "colwise_gather_output",
        "decoder.layers.*.self_attention.attention.k_proj": "colwise_gather_output",
        "decoder.layers.*.self_attention.attention.v_proj": "colwise_gather_output",
        "decoder.layers.*.self_attention.attention.o_proj": "rowwise_split_input",
        "decoder.layers.*.self_attention.aggregate": "colwise_gather_output",
        "decoder.layers.*.self_attention.aggregate_gate": "colwise_gather_output",
        "decoder.layers.*.cross_attention.q_proj": "colwise_gather_output",
        "decoder.layers.*.cross_attention.k_proj": "colwise_gather_output",
        "decoder.layers.*.cross_attention.v_proj": "colwise_gather_output",
        "decoder.layers.*.cross_attention.o_proj": "rowwise_split_input",
        "decoder.layers.*.feed_forward.wi": "colwise",
        "decoder.layers.*.feed_forward.wi_0": "colwise",
        "decoder.layers.*.feed_forward.wi_1": "colwise",
        "decoder.layers.*.feed_forward.wo": "rowwise",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "d_kv": "head_dim",
        "d_ff": "intermediate_size",
        "encoder_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "layer_norm_eps": "norm_eps",
        "dropout_rate": "hidden_dropout",
        "classifier_pooling": "pooling",
    }
    former_fields: ClassVar[dict[str, str]] = _FORMER_WINDOWS | _FORMER_TABLE

    vocab_size: int = 32128
    hidden_size: int = 768
    head_dim: int = 64
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    decoder_layers: int = 12
    num_attention_heads: int = 12
    window_size: int = 128
    local_attention_type: Literal["window", "chunk"] = "window"
    position_encoding: Literal["bias", "rotary", "none"] = "bias"
    rotary_base: float | int = 10000.0
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    share_relative_bias: bool = False
    ssm_layers: list[int] | None = None
    ssm_combine: Literal["concat", "gated", "add", "stack"] = "concat"
    ssm_add_weight: float | int = 0.5
    ssm_type: Literal["s4", "s4d"] = "s4d"
    ssm_init: Literal["legs", "lin", "inv"] = "legs"
    ssm_state_size: int = 64
    ssm_num_copies: int | None = None
    ssm_dt_min: float | int = 1e-3
    ssm_dt_max: float | int = 1e-1
    ssm_max_length: int = 16384
    ssm_trainable: bool = True
    ssm_stop_gradient: bool = False
    norm_first: bool = True
    norm_type: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float | int = 1e-6
    embedding_norm: bool = True
    use_final_norm: bool = True
    feed_forward_proj: str = "gated-gelu"
    feed_forward_bias: bool | None = None
    attention_bias: bool = False
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.1
    pooling: Literal["mean", "first", "last"] = "mean"
    dual_encoder: bool = False
    max_target_positions: int | None = None
    decoder_window_size: int | None = None
    decoder_ssm_layers: list[int] | None = None
    tie_word_embeddings: bool = True
    logits_scaling: float | int = 1.0
    initializer_scheme: Literal["normal", "official"] = "normal"
    initializer_range: float | int = 0.02
    initializer_factor: float | int = 1.0
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0

    @classmethod
    def read_former_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file, with those of earlier versions translated."""
        return _read_former_fields(fields)

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = self.take_old_spellings(kwargs)
        if self.ssm_layers is None:
            self.ssm_layers = [0]
        if self.decoder_ssm_layers is None:
            self.decoder_ssm_layers = []
        super().__post_init__(**_with_logits_scaling(kwargs, self.hidden_size))

    @classmethod
    def official(cls, **overrides: Any) -> Self:
        """The settings of the published encoder-decoder code (post-norm, frozen S4 in encoder layer 0), with `overrides`."""
        settings: dict[str, Any] = {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 6,
            "decoder_layers": 6,
            "num_attention_heads": 8,
            "ssm_type": "s4",
            "ssm_trainable": False,
            "ssm_stop_gradient": True,
            "ssm_max_length": 512,
            "window_size": 129,
            "norm_first": False,
            "norm_type": "layernorm",
            "use_final_norm": False,
            "feed_forward_proj": "relu",
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "pooling": "first",
            "max_target_positions": 512,
            "initializer_scheme": "official",
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        }
        return cls(**(settings | overrides))

    @property
    def decoder_has_rotary_positions(self) -> bool:
        """Whether the full self-attention of the decoder turns queries and keys by their positions."""
        return self.max_target_positions is None and self.decoder_window_size is None

    def target_limits(self) -> dict[str, int]:
        """The learned table of positions, which limits the targets."""
        rows = self.max_target_positions
        return {} if rows is None else {"max_target_positions": rows}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """The configuration itself; for the decoder alone, a copy whose `num_hidden_layers` is the depth of the decoder.

        Generation builds caches from it. The general method renames every `decoder_*` field, which would write
        `decoder_window_size=None` into `window_size`.
        """
        if not decoder or encoder:
            return self
        config = copy.deepcopy(self)
        config.num_hidden_layers, config.ssm_layers = self.decoder_layers, list(self.decoder_ssm_layers)
        return config

    def validate_architecture(self) -> None:
        """Checks that fields fit together; called on construction and on saving."""
        _check_common(self)
        check_at_least(self, 1, ("num_hidden_layers", "decoder_layers", "max_target_positions", "decoder_window_size"))
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"`num_attention_heads` * `head_dim` must equal `hidden_size`; got {self.num_heads} * {self.head_dim} != {self.hidden_size}."
            )
        _check_buckets(self, is_causal=False)
        if self.decoder_window_size is not None:
            _check_buckets(self, is_causal=True)
        if self.position_encoding == "rotary" and self.head_dim % 2:
            raise ValueError(f"`position_encoding='rotary'` needs an even `head_dim`; got {self.head_dim}.")
        if self.decoder_has_rotary_positions and self.head_dim % 2:
            raise ValueError(
                f"The decoder's rotary positions need an even `head_dim`; got {self.head_dim}. Change it, or set "
                "`max_target_positions` for a learned table of positions."
            )
        _check_layer_list("ssm_layers", self.ssm_layers, self.num_hidden_layers, "num_hidden_layers")
        _check_layer_list("decoder_ssm_layers", self.decoder_ssm_layers, self.decoder_layers, "decoder_layers")
        if self.decoder_ssm_layers and self.decoder_window_size is None:
            raise ValueError(
                "`decoder_ssm_layers` needs `decoder_window_size`: the SSM stands beside local attention."
            )


@strict
class SpadeLMConfig(HybridConfig):
    """Configuration of the decoder-only SPADE language model; fields not listed here mean what they mean in `SpadeConfig`.

    Args:
        num_layers: depth.
        window_size: tokens w that a query sees, itself and the w - 1 before it, or the tokens of a chunk.
        share_relative_bias: one table of relative biases, used by all layers (published form).
        ssm_max_length: reach of an "s4" kernel in the parallel form; generation continues the untruncated recurrence.
        scale_embedding: multiply the embeddings by sqrt(hidden_size).
        adaptive_cutoffs: None for a plain tied head; otherwise the band limits of adaptive input and softmax
            (arXiv 1809.10853), each band `adaptive_factor` times narrower than the one before.
        adaptive_dropout: dropout inside the adaptive softmax.
        tie_adaptive_projections: the softmax reuses the input projections of the tail bands.
        scale_attention, scale_feed_forward, scale_residuals, scale_heads: NormFormer options (arXiv 2110.09456).
    """

    model_type = "spade_lm"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {  # see `modeling.parallel_plans`
        "layers.*.mixer.attention.q_proj": "colwise_gather_output",
        "layers.*.mixer.attention.k_proj": "colwise_gather_output",
        "layers.*.mixer.attention.v_proj": "colwise_gather_output",
        "layers.*.mixer.attention.o_proj": "rowwise_split_input",
        "layers.*.mixer.aggregate": "colwise_gather_output",
        "layers.*.mixer.aggregate_gate": "colwise_gather_output",
        "layers.*.feed_forward.wi": "colwise",
        "layers.*.feed_forward.wi_0": "colwise",
        "layers.*.feed_forward.wi_1": "colwise",
        "layers.*.feed_forward.wo": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "key_mask"], ["hidden_states"]),
        "final_norm": (["hidden_states"], ["hidden_states"]),
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "d_ff": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "layer_norm_eps": "norm_eps",
        "dropout_rate": "hidden_dropout",
    }
    former_fields: ClassVar[dict[str, str]] = {"attention_window": "window_size"}

    vocab_size: int = 32128
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    window_size: int = 512
    local_attention_type: Literal["window", "chunk"] = "window"
    position_encoding: Literal["bias", "rotary", "none"] = "bias"
    rotary_base: float | int = 10000.0
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    share_relative_bias: bool = True
    ssm_layers: list[int] | None = None
    ssm_combine: Literal["concat", "gated", "add", "stack"] = "concat"
    ssm_add_weight: float | int = 0.5
    ssm_type: Literal["s4", "s4d"] = "s4d"
    ssm_init: Literal["legs", "lin", "inv"] = "legs"
    ssm_state_size: int = 64
    ssm_num_copies: int | None = None
    ssm_dt_min: float | int = 1e-3
    ssm_dt_max: float | int = 1e-1
    ssm_max_length: int = 16384
    ssm_trainable: bool = True
    ssm_stop_gradient: bool = False
    norm_type: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float | int = 1e-6
    use_final_norm: bool = True
    feed_forward_proj: str = "gated-gelu"
    feed_forward_bias: bool | None = None
    scale_embedding: bool = False
    adaptive_cutoffs: list[int] | None = None
    adaptive_factor: int = 4
    adaptive_dropout: float | int = 0.0
    tie_adaptive_projections: bool = True
    scale_attention: bool = False
    scale_feed_forward: bool = False
    scale_residuals: bool = False
    scale_heads: bool = False
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.1
    tie_word_embeddings: bool = True
    logits_scaling: float | int = 1.0
    initializer_scheme: Literal["normal", "official"] = "normal"
    initializer_range: float | int = 0.02
    initializer_factor: float | int = 1.0
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1

    @classmethod
    def read_former_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file, with those of earlier versions translated."""
        return _read_former_fields(fields)

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = self.take_old_spellings(kwargs)
        if self.ssm_layers is None:
            self.ssm_layers = [0]
        super().__post_init__(**_with_logits_scaling(kwargs, self.hidden_size))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def official(cls, **overrides: Any) -> Self:
        """The settings of the published WikiText-103 language model, with `overrides`."""
        settings: dict[str, Any] = {
            "vocab_size": 267744,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "ssm_type": "s4",
            "ssm_max_length": 3072,
            "norm_type": "layernorm",
            "norm_eps": 1e-5,
            "use_final_norm": False,
            "feed_forward_proj": "relu",
            "scale_embedding": True,
            "adaptive_cutoffs": [20000, 60000],
            "adaptive_dropout": 0.2,
            "hidden_dropout": 0.3,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "initializer_scheme": "official",
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }
        return cls(**(settings | overrides))

    def validate_architecture(self) -> None:
        """Checks that fields fit together; called on construction and on saving."""
        _check_common(self)
        check_at_least(self, 1, ["num_hidden_layers"])
        check_probabilities(self, ["adaptive_dropout"])
        _check_buckets(self, is_causal=True)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size` ({self.hidden_size}); got {self.num_heads}."
            )
        if self.position_encoding == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"`position_encoding='rotary'` needs an even head width hidden_size / num_heads; got {self.head_dim}."
            )
        _check_layer_list("ssm_layers", self.ssm_layers, self.num_layers, "num_hidden_layers")
        if self.scale_heads and self.ssm_layers:
            raise ValueError(
                "`scale_heads` is not defined for layers with an SSM: set it to False, or `ssm_layers=[]`."
            )
        if self.adaptive_cutoffs is not None:
            self._check_adaptive()

    def _check_adaptive(self) -> None:
        check_bands(self)
        if not self.tie_word_embeddings:
            raise ValueError(
                "`adaptive_cutoffs` needs `tie_word_embeddings=True`: the adaptive softmax reuses the embeddings."
            )
        if self.logits_scaling != 1:
            raise ValueError(
                "`logits_scaling` is not defined for the adaptive softmax (`adaptive_cutoffs`): set it to 1."
            )


__all__ = ["SpadeConfig", "SpadeLMConfig"]
