"""Multi-head self-attention within a window or a chunk, linear in the sequence length.

Shapes: B batch, L tokens, D hidden size, n heads, d head width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig

from ...layers.kept_results import kept_result
from ...ops.branches import uses_cpu_form
from ...ops.flex_local import Pattern, flex_local_attention
from ...ops.local_attention import cached_local_attention, chunk_attention, halo_attention, local_attention
from ...ops.relative_position import apply_rotary, rotary_cos_sin, window_buckets
from ...ops.sequence_group import SequenceGroup
from .spade_cache import SlidingRecurrentLayer


class LocalSelfAttention(nn.Module):
    """Attention of each token to its neighbours: `|i - j| < window`, or the tokens of the same chunk of `window` tokens.

    Args:
        hidden_size: D.
        num_heads: n, divides D.
        window: tokens that a query sees in one direction, itself included ("window"), or tokens per chunk ("chunk").
        attention_type: "window" or "chunk".
        is_causal: only the past and the token itself are visible.
        position_encoding: "bias" (T5 relative buckets, arXiv 1910.10683), "rotary" (arXiv 2104.09864) or "none".
        has_bias_table: the layer has a table of relative biases; without one, `forward` takes the vector of another
            layer.
        num_buckets, max_distance: bucket parameters.
        rotary_base: base of the rotary frequencies.
        dropout: probability on the attention weights.
        output_norm: optional norm of the result (NormFormer).
        scale_heads: a learned factor per head on the result, viewed as heads (NormFormer).
        config: configuration that says by `_attn_implementation` whether accelerators use FlexAttention.
    """

    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int,
        *,
        attention_type: str = "window",
        is_causal: bool = False,
        position_encoding: str = "bias",
        has_bias_table: bool = True,
        num_buckets: int = 32,
        max_distance: int = 128,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        output_norm: nn.Module | None = None,
        scale_heads: bool = False,
        config: PreTrainedConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.window = window
        self.attention_type = attention_type
        self.is_causal = is_causal
        self.position_encoding = position_encoding
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.rotary_base = rotary_base
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if position_encoding == "bias" and has_bias_table:
            self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)
        self.output_norm = output_norm
        self.head_scale = nn.Parameter(torch.ones(num_heads)) if scale_heads else None

    @property
    def reach(self) -> int:
        """Largest distance between a query and a key that it sees."""
        return self.window - 1

    def bias_vector(self, device: torch.device | None = None) -> torch.Tensor | None:
        """Bias per head and offset j - i from -reach to +reach, (n, 2 reach + 1); causal windows end at 0, (n, reach + 1)."""
        if self.position_encoding != "bias" or not hasattr(self, "relative_attention_bias"):
            return None
        buckets = window_buckets(
            self.reach,
            causal=self.is_causal,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
            device=device,
        )
        vector = self.relative_attention_bias(buckets).transpose(0, 1).contiguous()
        if (
            self.is_causal and self.attention_type == "chunk"
        ):  # chunks are indexed by both directions; the future is masked
            vector = F.pad(vector, (0, self.reach))
        return vector

    def _own_bias(self, device: torch.device, cache_layer: SlidingRecurrentLayer | None) -> torch.Tensor | None:
        """`bias_vector`, computed once in a generation."""
        table = getattr(self, "relative_attention_bias", None)
        if cache_layer is None or table is None or torch.compiler.is_compiling():
            return self.bias_vector(device)
        compute = partial(self.bias_vector, device)
        return kept_result(cache_layer.kept, self, "bias", [*table.parameters()], compute)

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        batch, length, _ = projected.shape
        return projected.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)  # (B, n, L, d)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, n, L, d) queries over (B, n, keys, d), the cached ones included."""
        batch, _, keys, _ = key.shape
        if self.sequence_group is None and self._uses_flex(query) and keys == query.shape[2] > 1:
            return self._attend_flex(query, key, value, bias, key_mask, positions)
        common: dict = {
            "bias": bias,
            "key_mask": None if key_mask is None else key_mask[:, -keys:],
            "dropout_p": self.dropout if self.training else 0.0,
        }
        if self.attention_type == "window":
            if self.sequence_group is not None and self.reach:
                return self._attend_to_neighbours(query, key, value, self.sequence_group, common)
            if keys > query.shape[2]:
                return cached_local_attention(query, key, value, radius=self.reach, **common)
            return local_attention(query, key, value, radius=self.reach, causal=self.is_causal, **common)
        # Without padding and earlier tokens, chunks are cut at the same places in every row.
        if positions is not None and (key_mask is not None or keys > query.shape[2]):
            common["positions"] = positions[:, -keys:].expand(batch, -1)
        if keys > query.shape[2]:
            return cached_local_attention(query, key, value, chunk_size=self.window, **common)
        return chunk_attention(query, key, value, chunk_size=self.window, causal=self.is_causal, **common)

    def _attend_to_neighbours(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: SequenceGroup, common: dict
    ) -> torch.Tensor:
        """Window attention of a piece of a text, whose neighbours other processes hold; one exchange on each side."""
        length, reach = query.shape[2], self.reach
        if length < reach:
            raise ValueError(
                f"Each process holds {length} tokens of the text, but a window reaches {reach} tokens on: use fewer processes, "
                "longer texts, or a smaller `window_size`."
            )
        both, mask = torch.cat([key, value], dim=-1), common.pop("key_mask")
        edges = [(both[:, :, length - reach :], 1)] if self.is_causal else [
            (both[:, :, length - reach :], 1), (both[:, :, :reach], -1)
        ]  # fmt: skip
        halos = [group.shift(edge, pieces) for edge, pieces in edges]
        both = torch.cat([halos[0], both, *halos[1:]], dim=2)
        if mask is not None or group.is_first or (group.is_last and not self.is_causal):
            own = query.new_ones(query.shape[0], length, dtype=torch.bool) if mask is None else mask
            common["key_mask"] = self._mask_of_neighbours(own, mask is not None, group)
        key, value = both.split(self.head_dim, dim=-1)
        if self.is_causal:
            return cached_local_attention(query, key, value, radius=reach, **common)
        return halo_attention(query, key, value, radius=reach, **common)

    def _mask_of_neighbours(self, own: torch.Tensor, has_padding: bool, group: SequenceGroup) -> torch.Tensor:
        """The mask of the tokens within reach; beyond the ends of the text it is False."""
        reach, numbers = self.reach, own.to(torch.uint8)
        before, behind = numbers[:, own.shape[1] - reach :], numbers[:, :reach]
        if has_padding:  # then all processes have a mask
            before = group.exchange(before, 1)
            behind = behind if self.is_causal else group.exchange(behind, -1)
        else:
            before = torch.full_like(before, not group.is_first)
            behind = torch.full_like(behind, not group.is_last)
        parts = [before.bool(), own] if self.is_causal else [before.bool(), own, behind.bool()]
        return torch.cat(parts, dim=1)

    def _uses_flex(self, query: torch.Tensor) -> bool:
        """Whether FlexAttention was asked for; CPUs have an operator that is faster, and differentiable there."""
        return getattr(self.config, "_attn_implementation", None) == "flex_attention" and not uses_cpu_form(query)

    def _attend_flex(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """`_attend` of a whole text."""
        if self.training and self.dropout > 0:
            raise ValueError(
                f"FlexAttention has no dropout of attention weights: set `attention_dropout=0` (now {self.dropout}), or "
                "`model.set_attn_implementation('sdpa')`."
            )
        pattern = Pattern(self.reach, 0 if self.is_causal else self.reach)
        if self.attention_type == "window":
            return flex_local_attention(query, key, value, pattern, bias=bias, key_mask=key_mask)
        bias = bias[:, : self.window] if self.is_causal and bias is not None else bias
        pattern = pattern._replace(chunk_size=self.window)
        positions = None if key_mask is None else positions  # which differ between rows with padding alone
        return flex_local_attention(query, key, value, pattern, bias=bias, key_mask=key_mask, positions=positions)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache_layer: SlidingRecurrentLayer | None = None,
    ) -> torch.Tensor:
        """Attends.

        Args:
            hidden_states: (B, L, D).
            key_mask: (B, keys) bool, True at real tokens, or None. `keys` is L, or with a cache at least the kept tokens plus L.
            bias: relative bias vector that layers share; None: the vector of its own table.
            positions: (1 or B, keys) int64 logical positions (real tokens counted from 0); needed for rotary positions, for
                chunks with a cache, and for chunks of rows that are padded on the left.
            cache_layer: state to continue and to extend.

        Returns:
            (B, L, D).
        """
        batch, length, width = hidden_states.shape
        query = self._split_heads(self.q_proj(hidden_states))
        key = self._split_heads(self.k_proj(hidden_states))
        value = self._split_heads(self.v_proj(hidden_states))
        if self.position_encoding == "rotary":
            if self.sequence_group is not None:  # scores depend on differences of positions alone
                places = torch.arange(length, device=hidden_states.device) + self.sequence_group.rank * length
                positions = places.unsqueeze(0)
            cos, sin = rotary_cos_sin(positions[:, -length:], self.head_dim, self.rotary_base)
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if bias is None:
            bias = self._own_bias(hidden_states.device, cache_layer)
        if cache_layer is not None:
            key, value = cache_layer.update(key, value)
        attended = self._attend(query, key, value, bias, key_mask, positions)
        attended = self.o_proj(attended.transpose(1, 2).reshape(batch, length, width))
        if self.head_scale is not None:
            attended = (attended.view(batch, length, self.num_heads, -1) * self.head_scale[:, None]).view(
                batch, length, width
            )
        return attended if self.output_norm is None else self.output_norm(attended)
