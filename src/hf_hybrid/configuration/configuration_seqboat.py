"""Configuration of SeqBoat, sparse modular activation for efficient sequence modelling (arXiv 2306.11197)."""

# No `from __future__ import annotations` here: `@strict` checks types only where they are not strings.
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .checks import check_at_least, check_positive, check_probabilities, check_special_tokens
from .hybrid_config import HybridConfig

_PROBABILITIES = ("hidden_dropout", "activation_dropout", "attention_dropout", "classifier_dropout")
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "qk_dim",
    "value_dim",
    "ema_dim",
    "ema_truncation",
    "distance_table_size",
    "embedding_size",
    "classifier_dim",
    "image_size",
)
_SWITCHED_OFF = {
    "ema_truncation": "None switches it off",
}


@strict
class SeqBoatConfig(HybridConfig):
    """Configuration of all SeqBoat models. The default is a bidirectional encoder; `is_decoder=True` makes a decoder.

    Args:
        vocab_size, hidden_size, num_hidden_layers, use_cache: as in any Transformers model.
        qk_dim: width z of queries and keys.
        value_dim: width h of values and output gate; None: twice `hidden_size`.
        ema_dim: averages per channel of the moving average, N.
        window_size: working memory w in *active* tokens: an active token sees itself and the w - 1 active ones before it, and the
            w - 1 after it in an encoder. None lets it see all active ones.
        ema_truncation: reach of the moving average in tokens, in each direction; None is unlimited.
        attention_activation: "softmax", or pointwise "relu2" or "laplace".
        position_bias: what attention knows of positions: "rotary" (turned queries and keys), "distance" (table of
            distances in the text), "rank" (table of distances in active tokens; needs a window) or "t5" (buckets of distances).
        distance_table_size: distances that the "distance" table tells apart; larger ones take its ends.
        hidden_act: activation of moving average, attention unit and layer output, by its Transformers name.
        norm_type: "layernorm", "scalenorm", "rmsnorm", "batchnorm" or "syncbatchnorm", with `norm_eps`.
        norm_first: normalise the input of a layer (and the output of the stack) instead of the output of the layer.
        final_norm_affine: learned parameters in the norm of the output of the stack.
        embedding_norm: normalise the embeddings; only with `norm_first=False`.
        scale_embedding: multiply token embeddings by sqrt(hidden_size).
        embedding_size: width of the embeddings if other than `hidden_size`; a projection follows.
        absolute_sinusoid: add scaled sinusoids of the positions to the embeddings.
        intermediate_size: width of a feed-forward layer after each unit; 0 for none, as published.
        hidden_dropout: dropout of embeddings, moving average and output of a unit (and of its feed-forward layer).
        activation_dropout, attention_dropout: dropout of attention values (and inside the feed-forward layer), and of
            attention weights.
        feature_dropout: drop whole features of a row, at all its positions, instead of single entries (weights excepted).
        router_init_temp_scale: c; the temperature of each router starts at c * sqrt(hidden_size).
        router_act_bias: bias added to the logit of skipping; positive values reduce activation.
        always_active: run the attention unit on every token, without a router.
        dead_layer_loss_weight: weight of a term of the loss that revives layers in which fewer than `dead_layer_min_rate` of the
            tokens are active; 0 (as published) for none.
        output_activations: return per layer which tokens were active, and their gates.
        is_decoder: moving averages and attention see the past only.
        tie_word_embeddings: the language model head uses the embedding matrix.
        input_type: "tokens", or "values" for sequences of real numbers (pixels, samples of a waveform).
        image_size: height and width that image classification accepts; None accepts any.
        pooling: what classifiers read: the "mean" of all real tokens, or the "first".
        classifier_layers, classifier_dim, classifier_act: layers of linear and activation before the last projection of a classifier.
        classifier_dropout: dropout of the classification heads; None means `hidden_dropout`.
        dual_encoder: classify pairs of texts, from their pooled states [second, first], and with `pair_features` also
            from their product and difference.
        initializer_scheme, initializer_range: "normal" (all matrices with deviation `initializer_range`) or "official" (embeddings and
            free language model heads with deviation width ** -0.5, Xavier classifiers).
    """

    model_type = "seqboat"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {  # see `modeling.parallel_plans`
        "embeddings.embed_tokens": "embedding_rowwise",
        "layers.*.unit.skip_proj": "colwise_gather_output",
        "layers.*.unit.in_proj": "colwise_gather_output",
        "layers.*.unit.out_proj": "rowwise_split_input",
        "layers.*.ffn.fc1": "colwise",
        "layers.*.ffn.fc2": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embeddings": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "mask"], ["hidden_states"]),
        "final_norm": (["hidden_states"], ["hidden_states"]),
    }
    attribute_map: ClassVar[dict[str, str]] = {"prenorm": "norm_first", "value_dropout": "activation_dropout"}
    former_fields: ClassVar[dict[str, str]] = {"max_position_embeddings": "distance_table_size"}
    # Activation statistics are not predictions: Trainer must not gather them during evaluation.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "activation_rate",
        "active",
        "gate_probs",
        "auxiliary_loss",
    ]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    qk_dim: int = 128
    value_dim: int | None = None
    ema_dim: int = 16
    window_size: int | None = 128
    ema_truncation: int | None = None
    attention_activation: Literal["softmax", "laplace", "relu2"] = "softmax"
    position_bias: Literal["distance", "rank", "rotary", "t5"] = "rotary"
    distance_table_size: int = 1024
    hidden_act: str = "silu"
    norm_type: Literal["layernorm", "scalenorm", "rmsnorm", "batchnorm", "syncbatchnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_first: bool = True
    final_norm_affine: bool = True
    embedding_norm: bool = False
    scale_embedding: bool = True
    embedding_size: int | None = None
    absolute_sinusoid: bool = False
    intermediate_size: int = 0
    hidden_dropout: float | int = 0.1
    activation_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    feature_dropout: bool = False
    router_init_temp_scale: float | int = 1.0
    router_act_bias: float | int = 0.0
    always_active: bool = False
    dead_layer_loss_weight: float | int = 0.0
    dead_layer_min_rate: float | int = 0.02
    output_activations: bool = False
    is_decoder: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    num_attention_heads: int = 1
    input_type: Literal["tokens", "values"] = "tokens"
    image_size: int | None = None
    pooling: Literal["mean", "first"] = "mean"
    classifier_layers: int = 1
    classifier_dim: int | None = None
    classifier_act: str = "gelu"
    classifier_dropout: float | int | None = None
    dual_encoder: bool = False
    pair_features: bool = False
    initializer_scheme: Literal["normal", "official"] = "normal"
    initializer_range: float | int = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1

    @classmethod
    def read_former_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file; with `max_position_embeddings`, the window does not count the token itself."""
        if "max_position_embeddings" in fields:
            fields["distance_table_size"] = fields.pop("max_position_embeddings")
            window = fields.get("window_size", 128)
            fields["window_size"] = None if window is None else window + 1
        return fields

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = self.take_old_spellings(kwargs)
        if self.value_dim is None:
            self.value_dim = 2 * self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def embedding_width(self) -> int:
        """Width of the embedding table."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def head_dropout(self) -> float:
        """Dropout of the classification heads."""
        return self.hidden_dropout if self.classifier_dropout is None else self.classifier_dropout

    def validate_architecture(self) -> None:
        """Checks that fields fit together; called on construction and on saving."""
        check_at_least(self, 1, _POSITIVE, _SWITCHED_OFF)
        check_at_least(
            self, 2, ["window_size"], {"window_size": "an active token sees itself and others; None lets it see all"}
        )
        check_positive(self, ["router_init_temp_scale", "norm_eps"])
        check_probabilities(self, _PROBABILITIES)
        self._check_unit()
        self._check_stack()
        self._check_heads()

    def _check_unit(self) -> None:
        if self.position_bias == "rank" and self.window_size is None:
            raise ValueError(
                "`position_bias='rank'` needs a `window_size`: its table has an entry for each distance inside the window. Set "
                "one, or choose 'distance', 't5' or 'rotary'."
            )
        if self.position_bias == "rotary" and self.qk_dim % 2:
            raise ValueError(f"`position_bias='rotary'` needs an even `qk_dim`; got {self.qk_dim}.")
        if self.num_attention_heads != 1:
            raise ValueError(f"`num_attention_heads` is always 1 in SeqBoat; got {self.num_attention_heads}.")
        if self.intermediate_size < 0:
            raise ValueError(
                f"`intermediate_size` must be a width, or 0 for no feed-forward layer; got {self.intermediate_size}."
            )
        if self.dead_layer_loss_weight < 0 or not 0 < self.dead_layer_min_rate <= 1:
            raise ValueError(
                "`dead_layer_loss_weight` must not be negative and `dead_layer_min_rate` must lie in (0, 1]; got "
                f"{self.dead_layer_loss_weight} and {self.dead_layer_min_rate}."
            )

    def _check_stack(self) -> None:
        if self.embedding_norm and self.norm_first:
            raise ValueError(
                "`embedding_norm=True` needs `norm_first=False`: with pre-norm every layer normalises its input."
            )
        if self.tie_word_embeddings and self.embedding_width != self.hidden_size:
            raise ValueError(
                f"`tie_word_embeddings=True` needs `embedding_size` = `hidden_size` = {self.hidden_size}, or None; got "
                f"{self.embedding_size}. Set `tie_word_embeddings=False`."
            )
        if self.absolute_sinusoid and self.hidden_size % 2:
            raise ValueError(f"`absolute_sinusoid=True` needs an even `hidden_size`; got {self.hidden_size}.")
        if self.input_type == "values":
            if self.is_decoder or self.embedding_size not in (None, self.hidden_size):
                raise ValueError(
                    "`input_type='values'` is defined for encoders without projected embeddings: leave `is_decoder` False "
                    "and `embedding_size` None."
                )
            return
        check_special_tokens(self)

    def _check_heads(self) -> None:
        if self.classifier_layers < 0:
            raise ValueError(f"`classifier_layers` must not be negative; got {self.classifier_layers}.")
        if self.pair_features and not self.dual_encoder:
            raise ValueError("`pair_features=True` needs `dual_encoder=True`: the features compare two texts.")


__all__ = ["SeqBoatConfig"]
