"""Configuration of Mega, moving average equipped gated attention (arXiv 2209.10655).

Every field of the `MegaConfig` of Transformers 4.x is here with its name, so that an old `config.json` loads unchanged. The
defaults are the old ones, except for one that kept new language models from learning (`add_lm_hidden_dense_layer`).
The other fields add what the published code has and Transformers 4.x lacked; by default it is off.
"""

# No `from __future__ import annotations` here: `@strict` checks types only where they are not strings.
import copy
from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict

from .checks import check_at_least, check_bands, check_probabilities, check_special_tokens
from .hybrid_config import HybridConfig

_PROBABILITIES = (
    "dropout_prob",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "nffn_activation_dropout_prob",
    "embedding_dropout_prob",
    "classifier_dropout",
    "adaptive_dropout",
)
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "ema_projection_size",
    "shared_representation_size",
    "max_positions",
    "type_vocab_size",
    "truncation",
    "rel_bias_table_size",
    "cross_bias_table_size",
    "classifier_hidden_size",
    "image_size",
    "decoder_layers",
    "decoder_intermediate_size",
    "decoder_ema_projection_size",
    "decoder_shared_representation_size",
    "max_target_positions",
)


@strict
class MegaConfig(HybridConfig):
    """Configuration of all Mega models.

    One stack is an encoder (default), or a decoder with `is_decoder=True, bidirectional=False`. With
    `is_encoder_decoder=True` the fields describe the encoder; the `decoder_*` fields say where the decoder differs.

    Args:
        vocab_size, hidden_size, num_hidden_layers, type_vocab_size, initializer_range: as in any Transformers model.
        intermediate_size: width E of the attention *values* (the inner width of the feed-forward layer is `nffn_hidden_size`).
        ema_projection_size: averages per channel of the moving average, N.
        bidirectional: the moving average runs in both directions. It does not decide what attention sees: see `is_decoder`.
        shared_representation_size: width Z of queries and keys, even for the rotary bias.
        use_chunking, chunk_size: attend within chunks of `chunk_size` tokens; -1 for none. A last chunk may be shorter.
        truncation: reach of the moving average in tokens, in each direction; None is unlimited. 0 is refused.
        normalize_before_mega, normalize_before_ffn: normalise the input of the block instead of its output.
        normalization_type: "layernorm", "scalenorm", "rmsnorm", "batchnorm" or "syncbatchnorm", with or without learned
            parameters (`norm_affine`).
        activation: activation of values, block output and feed-forward layer, by its Transformers name.
        attention_activation: "softmax", or elementwise "laplace" or "relu2".
        dropout_prob: dropout of moving average, block output, cross-attention output and feed-forward output.
        hidden_dropout_prob, attention_probs_dropout_prob, nffn_activation_dropout_prob: dropout of attention values,
            of attention weights and of the inner activations of the feed-forward layer.
        use_feature_dropout: drop whole features of a sample, at all its positions, instead of single entries.
        use_normalized_ffn, nffn_hidden_size: the feed-forward layer after each attention block; none with a width <= 0.
        max_positions: entries of the "simple" bias table; the rotary bias has no limit.
        relative_positional_bias: "rotary" or "simple" (a table).
        add_token_type_embeddings: add embeddings of `token_type_ids`.
        ema_delta_alpha_range, ema_beta_range, ema_gamma_omega_range: standard deviations of the initial moving
            average.
        classifier_dropout: dropout of the classification heads; None means `hidden_dropout_prob`.
        add_lm_hidden_dense_layer: a tanh layer before the language model head. None: true for the configurations that
            Transformers 4.x wrote, false for all others: with small initial weights the layer lets hardly any signal through,
            and a new model stays at the frequencies of the tokens for a long time.
        is_decoder: attention sees the past only. Needs `bidirectional=False`.
        add_cross_attention: gated attention to encoder states in every layer of a decoder.
        tie_word_embeddings: the language model head uses the embedding matrix.
        tied_weights_conflict: what to do with a checkpoint that holds two different tensors for the tied embedding and head.
            "keep": load both, untied, with a warning. "embedding": use the embedding for both, as Transformers 4.x did.
        lm_head_bias: bias of the language model head (the published models have none).
        scale_embeddings: multiply token embeddings by sqrt(hidden_size).
        normalize_embeddings: normalise the embeddings (only with `normalize_before_mega=False`).
        final_norm, final_norm_affine: normalise the output of the stack; with or without learned parameters.
        embedding_dropout_prob: dropout of the embeddings.
        mask_padded_states: zero the states of padded positions before the first layer and after the last norm.
        rms_norm_legacy: "rmsnorm" multiplies by its weight and does not divide, as in Transformers 4.x. None: true for the
            configurations that Transformers 4.x wrote, false for all others.
        rel_bias_table_size: tokens M that the "simple" table covers, in 2M - 1 entries. None: the rule of Transformers 4.x, a table
            of 2 * max_positions - 1 entries whose centre is that of `chunk_size` tokens when `chunk_size` is not -1.
        cross_bias_table_size: the same for cross-attention; None: as `rel_bias_table_size`.
        auto_pad_to_chunk: accept any length when chunking; False refuses lengths that are not a multiple of
            `chunk_size`.
        input_type: "tokens", or "values" for sequences of real numbers (pixels, samples of a waveform).
        image_size: height and width that image classification accepts; None accepts any.
        pooling_type: what classifiers read: the "first" real token, or the "mean" of all.
        classifier_type: "hf" (dense, tanh, projection) or "lra" (`num_classifier_layers` times linear and `classifier_activation` of
            width `classifier_hidden_size`, then a projection without bias).
        dual_encoder: classify pairs: the pooled second text, then the first, side by side.
        adaptive_cutoffs, adaptive_factor, adaptive_dropout, tie_adaptive_projections: bands of adaptive input and softmax
            (arXiv 1809.10853); None for plain embeddings. `adaptive_input_size`, if given, must equal `hidden_size`.
        initializer_scheme: "normal" (Transformers 4.x), or "official" (embeddings with deviation hidden_size ** -0.5, Xavier
            classifiers).
        decoder_layers: layers of the decoder of an encoder-decoder; None: as the encoder.
        decoder_intermediate_size, decoder_nffn_hidden_size, decoder_ema_projection_size: widths of that decoder; None: as the encoder.
        decoder_shared_representation_size, decoder_chunk_size, max_target_positions: its attention; None: as the encoder.
        share_encoder_decoder_embeddings: one embedding matrix for both sides (needs `tie_word_embeddings`). None: as
            `tie_word_embeddings`.
    """

    model_type = "mega"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {  # see `modeling.parallel_plans`
        "embedding_layer.word_embeddings": "embedding_rowwise",
        "layers.*.mega_layer.v_proj": "colwise_gather_output",
        "layers.*.mega_layer.mx_proj": "colwise_gather_output",
        "layers.*.mega_layer.h_proj": "rowwise_split_input",
        "layers.*.cross_attn.q_proj": "colwise_gather_output",
        "layers.*.cross_attn.k_proj": "colwise_gather_output",
        "layers.*.cross_attn.v_proj": "colwise_gather_output",
        "layers.*.cross_attn.h_proj": "rowwise_split_input",
        "layers.*.nffn.fc1": "colwise",
        "layers.*.nffn.fc2": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embedding_layer": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "mask"], ["hidden_states"]),
        "final_norm": (["hidden_states"], ["hidden_states"]),
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"encoder_layers": "num_hidden_layers", "hidden_dropout": "dropout_prob"}

    vocab_size: int = 30522
    hidden_size: int = 128
    num_hidden_layers: int = 4
    intermediate_size: int = 256
    ema_projection_size: int = 16
    bidirectional: bool = True
    shared_representation_size: int = 64
    use_chunking: bool = False
    chunk_size: int = -1
    truncation: int | None = None
    normalize_before_mega: bool = True
    normalization_type: Literal["layernorm", "scalenorm", "rmsnorm", "batchnorm", "syncbatchnorm"] = "scalenorm"
    norm_affine: bool = True
    activation: str = "silu"
    attention_activation: Literal["softmax", "laplace", "relu2"] = "softmax"
    dropout_prob: float | int = 0.1
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    use_feature_dropout: bool = False
    use_normalized_ffn: bool = True
    nffn_hidden_size: int = 256
    normalize_before_ffn: bool = True
    nffn_activation_dropout_prob: float | int = 0.1
    max_positions: int = 2048
    add_token_type_embeddings: bool = False
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    ema_delta_alpha_range: float | int = 0.2
    ema_beta_range: float | int = 0.02
    ema_gamma_omega_range: float | int = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    relative_positional_bias: Literal["rotary", "simple"] = "rotary"
    classifier_dropout: float | int | None = None
    use_cache: bool = True
    add_lm_hidden_dense_layer: bool | None = None
    num_attention_heads: int = 1
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    tied_weights_conflict: Literal["keep", "embedding"] = "keep"
    lm_head_bias: bool = True
    scale_embeddings: bool = False
    normalize_embeddings: bool = False
    final_norm: bool = False
    final_norm_affine: bool = True
    embedding_dropout_prob: float | int = 0.0
    mask_padded_states: bool = False
    rms_norm_legacy: bool | None = None
    rel_bias_table_size: int | None = None
    cross_bias_table_size: int | None = None
    auto_pad_to_chunk: bool = True
    input_type: Literal["tokens", "values"] = "tokens"
    image_size: int | None = None
    pooling_type: Literal["first", "mean"] = "first"
    classifier_type: Literal["hf", "lra"] = "hf"
    num_classifier_layers: int = 1
    classifier_hidden_size: int | None = None
    classifier_activation: str = "gelu"
    dual_encoder: bool = False
    adaptive_cutoffs: list[int] | None = None
    adaptive_input_size: int | None = None
    adaptive_factor: int = 4
    adaptive_dropout: float | int = 0.0
    tie_adaptive_projections: bool = True
    initializer_scheme: Literal["normal", "official"] = "normal"
    decoder_layers: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_nffn_hidden_size: int | None = None
    decoder_ema_projection_size: int | None = None
    decoder_shared_representation_size: int | None = None
    decoder_chunk_size: int | None = None
    max_target_positions: int | None = None
    share_encoder_decoder_embeddings: bool | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = self.take_old_spellings(kwargs)
        is_old = str(self.transformers_version or "").startswith("4.")
        if self.rms_norm_legacy is None:
            self.rms_norm_legacy = is_old and self.normalization_type == "rmsnorm"
        if self.add_lm_hidden_dense_layer is None:
            self.add_lm_hidden_dense_layer = is_old
        if self.is_encoder_decoder:
            if self.decoder_layers is None:
                self.decoder_layers = self.num_hidden_layers
            if self.decoder_start_token_id is None:
                self.decoder_start_token_id = self.eos_token_id if isinstance(self.eos_token_id, int) else None
        super().__post_init__(**kwargs)

    # ------------------------------------------------------------------------------------------------ derived sizes

    @property
    def attention_chunk(self) -> int | None:
        """Tokens per attention chunk, or None when attention is not chunked."""
        return self.chunk_size if self.use_chunking else None

    @property
    def relative_bias_reach(self) -> int:
        """Longest piece of text, in tokens, that the "simple" bias covers."""
        if self.rel_bias_table_size is not None:
            return self.rel_bias_table_size
        return self.chunk_size if self.chunk_size >= 0 else self.max_positions

    @property
    def relative_bias_entries(self) -> int:
        """Entries of the "simple" table, of which the first 2 * reach - 1 are used."""
        return 2 * (self.rel_bias_table_size or self.max_positions) - 1

    @property
    def cross_bias_reach(self) -> int:
        """Longest source and target that the "simple" bias of cross-attention covers."""
        return self.relative_bias_reach if self.cross_bias_table_size is None else self.cross_bias_table_size

    @property
    def cross_bias_entries(self) -> int:
        """Entries of the "simple" table of cross-attention."""
        return self.relative_bias_entries if self.cross_bias_table_size is None else 2 * self.cross_bias_table_size - 1

    @property
    def shares_embeddings(self) -> bool:
        """Whether encoder and decoder of an encoder-decoder have one embedding matrix."""
        shares = self.share_encoder_decoder_embeddings
        return self.tie_word_embeddings if shares is None else shares

    @property
    def head_dropout(self) -> float:
        """Dropout of the classification heads."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    # ------------------------------------------------------------------------------------------------------- lengths

    def source_limits(self) -> dict[str, int]:
        """Tables of the "simple" bias that limit an input, by the fields that set their size; the rotary bias limits nothing."""
        if self.relative_positional_bias != "simple":
            return {}
        if self.is_encoder_decoder:
            field = "max_positions" if self.rel_bias_table_size is None else "rel_bias_table_size"
            return {**self.encoder_config()._own_limits(field), **self.decoder_config()._cross_limits()}
        follows_positions = self.rel_bias_table_size is None and self.chunk_size < 0
        field = "max_positions" if follows_positions else "rel_bias_table_size"
        return {**self._own_limits(field), **self._cross_limits()}

    def target_limits(self) -> dict[str, int]:
        """The same for the text that a decoder writes."""
        if self.relative_positional_bias != "simple" or not self.is_encoder_decoder:
            return self.source_limits()
        has_own_table = self.rel_bias_table_size is None or self.decoder_chunk_size is not None
        field = "max_target_positions" if has_own_table else "rel_bias_table_size"
        decoder = self.decoder_config()
        return {**decoder._own_limits(field), **decoder._cross_limits()}

    def _own_limits(self, field: str) -> dict[str, int]:
        """The limit of self-attention: its table covers a whole text, or one chunk of a text of any length."""
        return {field: self.relative_bias_reach} if self.attention_chunk is None else {}

    def _cross_limits(self) -> dict[str, int]:
        return {"cross_bias_table_size": self.cross_bias_reach} if self.add_cross_attention else {}

    # --------------------------------------------------------------------------------------- parts of encoder-decoders

    def encoder_config(self) -> Self:
        """Configuration of the encoder of an encoder-decoder, as one stack."""
        config = copy.deepcopy(self)
        config.is_encoder_decoder = config.is_decoder = config.add_cross_attention = False
        config.bidirectional = True
        if config.rel_bias_table_size is None:
            config.rel_bias_table_size = config.attention_chunk or config.max_positions
        return config

    def decoder_config(self) -> Self:
        """Configuration of the decoder of an encoder-decoder, as one stack."""
        config = copy.deepcopy(self)
        config.is_encoder_decoder = config.bidirectional = False
        config.is_decoder = config.add_cross_attention = True
        config.num_hidden_layers = self.decoder_layers or self.num_hidden_layers
        for name in ("intermediate_size", "nffn_hidden_size", "ema_projection_size", "shared_representation_size"):
            value = getattr(self, f"decoder_{name}")
            setattr(config, name, getattr(self, name) if value is None else value)
        config.max_positions = self.max_target_positions or self.max_positions
        if self.decoder_chunk_size is not None:
            config.use_chunking, config.chunk_size = self.decoder_chunk_size > 0, self.decoder_chunk_size
        if self.rel_bias_table_size is None or self.decoder_chunk_size is not None:
            config.rel_bias_table_size = config.attention_chunk or config.max_positions
        if self.cross_bias_table_size is None:
            config.cross_bias_table_size = max(self.max_positions, config.max_positions)
        return config

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """The configuration itself, or that of the decoder: generation reads its `num_hidden_layers`."""
        return self.decoder_config() if decoder and not encoder and self.is_encoder_decoder else self

    # ---------------------------------------------------------------------------------------------------- validation

    def validate_architecture(self) -> None:
        """Checks that fields fit together; called on construction and on saving."""
        check_at_least(self, 1, _POSITIVE, {"truncation": "None switches it off"})
        check_probabilities(self, _PROBABILITIES)
        self._check_attention()
        self._check_stack()
        self._check_heads()

    def _check_attention(self) -> None:
        for name in ("chunk_size", "decoder_chunk_size"):
            value = getattr(self, name)
            if value is not None and value != -1 and value < 1:
                raise ValueError(f"`{name}` must be a positive number of tokens, or -1 for none; got {value}.")
        if self.use_chunking and self.chunk_size < 1:
            raise ValueError(
                f"`use_chunking=True` needs a positive `chunk_size`; got {self.chunk_size}. Set the tokens of a chunk, or "
                "`use_chunking=False`."
            )
        if self.relative_positional_bias == "simple" and 2 * self.relative_bias_reach - 1 > self.relative_bias_entries:
            raise ValueError(
                f"`chunk_size` {self.chunk_size} does not fit the table of the 'simple' bias, which covers `max_positions` = "
                f"{self.max_positions} tokens: raise `max_positions`, or set `rel_bias_table_size`."
            )
        table = self.rel_bias_table_size
        if self.relative_positional_bias == "simple" and self.use_chunking and table and table < self.chunk_size:
            raise ValueError(
                f"`chunk_size` {self.chunk_size} exceeds the {table} tokens of `rel_bias_table_size`: raise it to at least "
                "the chunk size."
            )
        if self.num_attention_heads != 1:
            raise ValueError(f"`num_attention_heads` is always 1 in Mega; got {self.num_attention_heads}.")
        for name in ("shared_representation_size", "decoder_shared_representation_size"):
            value = getattr(self, name)
            if self.relative_positional_bias == "rotary" and value is not None and value % 2:
                raise ValueError(f"`relative_positional_bias='rotary'` needs an even `{name}`; got {value}.")

    def _check_stack(self) -> None:
        if self.is_decoder and self.bidirectional:
            raise ValueError(
                "`is_decoder=True` needs `bidirectional=False`: a bidirectional moving average shows every position the "
                "tokens that a decoder is to predict."
            )
        if self.is_decoder and self.is_encoder_decoder:
            raise ValueError(
                "`is_decoder` describes a single stack; with `is_encoder_decoder=True` leave it False (the decoder "
                "has a configuration of its own)."
            )
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError("`add_cross_attention=True` needs `is_decoder=True`.")
        if self.normalize_embeddings and self.normalize_before_mega:
            raise ValueError("`normalize_embeddings=True` needs `normalize_before_mega=False`.")
        if self.input_type == "tokens":
            check_special_tokens(self)
        elif self.is_decoder or self.is_encoder_decoder or self.add_token_type_embeddings:
            raise ValueError(
                "`input_type='values'` is defined for encoders without token types: leave `is_decoder`, "
                "`is_encoder_decoder` and `add_token_type_embeddings` False."
            )
        if self.is_encoder_decoder and self.share_encoder_decoder_embeddings and not self.tie_word_embeddings:
            raise ValueError(
                "`share_encoder_decoder_embeddings=True` needs `tie_word_embeddings=True`: set it to False for separate "
                "matrices."
            )

    def _check_heads(self) -> None:
        if self.num_classifier_layers < 0:
            raise ValueError(f"`num_classifier_layers` must not be negative; got {self.num_classifier_layers}.")
        if self.dual_encoder and self.classifier_type != "lra":
            raise ValueError("`dual_encoder=True` needs `classifier_type='lra'`.")
        if self.adaptive_input_size not in (None, self.hidden_size):
            raise ValueError(
                f"`adaptive_input_size` must equal `hidden_size` ({self.hidden_size}) or be None; got "
                f"{self.adaptive_input_size}."
            )
        if self.adaptive_cutoffs is None:
            return
        check_bands(self)
        if not self.tie_word_embeddings or self.is_encoder_decoder or self.add_lm_hidden_dense_layer:
            raise ValueError(
                "`adaptive_cutoffs` needs `tie_word_embeddings=True`, `add_lm_hidden_dense_layer=False` and a single stack: "
                "the adaptive softmax reuses the embeddings."
            )


__all__ = ["MegaConfig"]
