"""Configuration of the Block-State Transformer (arXiv 2306.09539)."""

# No `from __future__ import annotations` here: `@strict` checks types only where they are not strings.
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.utils import logging

from .checks import check_at_least, check_positive, check_probabilities, check_special_tokens, check_step_sizes
from .hybrid_config import HybridConfig

logger = logging.get_logger(__name__)

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "intermediate_size",
    "block_size",
    "num_context_states",
)
_PROBABILITIES = ("hidden_dropout", "attention_dropout", "final_dropout", "classifier_dropout")
_EVEN = {
    "ssm_state_size": "its modes come in conjugate pairs",
    "ssm_filter_emb_dim": "half of the features are sines and half cosines",
}


@strict
class BstConfig(HybridConfig):
    """Configuration of all Block-State Transformers: a causal Transformer with local attention, some of whose layers also
    attend to context states that a state space model computes from the whole past.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, use_cache: as in any
            Transformers model; the feed-forward layer has no gate and no bias.
        head_dim: width of a head; heads times width need not be `hidden_size`.
        block_size: tokens per block and per window, W.
        bst_layers: layers with context states, counted from 0, or from the end if negative. None: the first layer, the
            middle one and the one at two thirds, [0, 6, 8] of 12.
        context_variant: "sh" (single head): a token attends to the outputs of one filter at the tokens of its block so far;
            "mh" (multi head): each head has its own filter; "mf" (multi filter): all tokens of a block attend to the
            outputs of many filters at the end of the previous block.
        num_context_states: filters S of "mf".
        ssm_type: "s4d" (diagonal), "s4" (diagonal plus low rank) or "unstructured" (explicit filters).
        ssm_state_size: N, even; the filters of a channel span at most N dimensions, so "mf" wants N >= S.
        ssm_dt_min, ssm_dt_max: range of the initial step sizes.
        ssm_filter_length: reach of explicit filters in tokens, whatever the length of the text.
        ssm_filter_emb_dim, ssm_filter_emb_base: number of sinusoids of the lag that make up an explicit filter, and
            base of their frequencies.
        local_attention: what a token of a layer with context states sees: its "block", or a "sliding_window" of
            `block_size` tokens. The other layers always have sliding windows.
        qk_norm, qk_norm_eps: normalise queries and keys, with a learned scale per head.
        relative_attention_num_buckets, relative_attention_max_distance: relative position bias as in T5, one table per layer.
        norm_eps: epsilon of all other norms.
        logits_scaling: divisor of the logits; None: sqrt(hidden_size).
        tie_word_embeddings: the language model head is the embedding matrix.
        hidden_dropout: dropout of the input of attention and filters, and of the output of the feed-forward layer.
        attention_dropout: dropout of attention weights, also of those for context states.
        final_dropout: dropout of the output of the last norm.
        classifier_dropout: dropout of the classification heads.
        embedding_init_std: standard deviation of the initial embeddings.
    """

    model_type = "bst"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {  # see `modeling.parallel_plans`
        "layers.*.attn.q_proj": "colwise_gather_output",
        "layers.*.attn.k_proj": "colwise_gather_output",
        "layers.*.attn.v_proj": "colwise_gather_output",
        "layers.*.attn.o_proj": "rowwise_split_input",
        "layers.*.context.q_proj": "colwise_gather_output",
        "layers.*.context.k_proj": "colwise_gather_output",
        "layers.*.context.v_proj": "colwise_gather_output",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "passage"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "logit_divisor": "logits_scaling",
        "rms_norm_eps": "norm_eps",
    }  # the names in earlier checkpoints

    vocab_size: int = 32128
    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 4096
    hidden_act: str = "relu"
    block_size: int = 512
    bst_layers: list[int] | None = None
    context_variant: Literal["sh", "mh", "mf"] = "sh"
    num_context_states: int = 32
    ssm_type: Literal["s4d", "s4", "unstructured"] = "s4d"
    ssm_state_size: int = 64
    ssm_dt_min: float | int = 1e-3
    ssm_dt_max: float | int = 1e-1
    ssm_filter_length: int = 4096
    ssm_filter_emb_dim: int = 64
    ssm_filter_emb_base: float | int = 10000.0
    local_attention: Literal["block", "sliding_window"] = "block"
    qk_norm: bool = True
    qk_norm_eps: float | int = 1e-6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    norm_eps: float | int = 1e-6
    logits_scaling: float | int | None = None
    tie_word_embeddings: bool = True
    hidden_dropout: float | int = 0.05
    attention_dropout: float | int = 0.05
    final_dropout: float | int = 0.05
    classifier_dropout: float | int = 0.0
    embedding_init_std: float | int = 1.0
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = self.take_old_spellings(kwargs)
        depth = self.num_hidden_layers
        if self.bst_layers is None:
            self.bst_layers = sorted({0, depth // 2, 2 * depth // 3}) if depth > 0 else []
        if all(-depth <= layer < depth for layer in self.bst_layers):
            self.bst_layers = sorted(layer % depth for layer in self.bst_layers)
        super().__post_init__(**kwargs)
        if self.logits_scaling is None:
            # Stored as a number: programs that compute logits themselves read it from the file.
            self.logits_scaling = max(self.hidden_size, 1) ** 0.5
        is_short = self.ssm_type != "unstructured" and self.ssm_state_size < self.num_context_states
        if self.context_variant == "mf" and self.bst_layers and is_short:
            logger.warning(
                f"`num_context_states` = {self.num_context_states} filters share a state of `ssm_state_size` = "
                f"{self.ssm_state_size} numbers per channel, so their outputs are linearly dependent. Raise "
                "`ssm_state_size`, or lower `num_context_states`."
            )

    @property
    def num_filters(self) -> int:
        """Filters per channel of a layer with context states."""
        return {"sh": 1, "mh": self.num_attention_heads, "mf": self.num_context_states}[self.context_variant]

    def validate_architecture(self) -> None:
        """Checks that fields fit together; called on construction and on saving."""
        check_at_least(self, 1, _POSITIVE)
        check_probabilities(self, _PROBABILITIES)
        check_positive(
            self, ("qk_norm_eps", "norm_eps", "logits_scaling", "ssm_filter_emb_base", "embedding_init_std")
        )
        self._check_filters()
        self._check_attention()
        check_special_tokens(self)

    def _check_filters(self) -> None:
        depth = self.num_hidden_layers
        wrong = [layer for layer in self.bst_layers if not 0 <= layer < depth]
        if wrong or len(set(self.bst_layers)) < len(self.bst_layers):
            problem = f"{wrong[0]} is out of range" if wrong else "one is named twice"
            raise ValueError(
                f"`bst_layers` must name different layers of {depth} (`num_hidden_layers`): 0 to {depth - 1}, or -{depth} "
                f"to -1 from the end; got {self.bst_layers}, where {problem}."
            )
        for name, reason in _EVEN.items():
            value = getattr(self, name)
            if value < 2 or value % 2:
                raise ValueError(f"`{name}` must be even and at least 2 ({reason}); got {value}.")
        check_step_sizes(self)
        if self.ssm_filter_length < 2:
            raise ValueError(f"`ssm_filter_length` must be at least 2 tokens; got {self.ssm_filter_length}.")

    def _check_attention(self) -> None:
        buckets = self.relative_attention_num_buckets
        if buckets < 2 or self.relative_attention_max_distance <= buckets // 2:
            raise ValueError(
                "`relative_attention_num_buckets` must be at least 2 and `relative_attention_max_distance` larger than half of "
                f"it; got {buckets} and {self.relative_attention_max_distance}."
            )


__all__ = ["BstConfig"]
