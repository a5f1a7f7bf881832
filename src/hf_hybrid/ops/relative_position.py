"""Relative positions of attention: T5 buckets, bias vectors indexed by offset, Toeplitz matrices, rotary angles.

A relative bias depends on the offset `j - i` of key `j` from query `i` alone, so it is kept as one vector per head,
indexed by offset, and turned into a (Toeplitz) matrix only where a block of scores needs one.

Shape letters: B batch, L tokens, n heads, d head width, r radius; Z width of the vectors of a rotary bias, M positions of
a table of biases.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from .branches import transforms, uses_cpu_form, widest_float
from .diagonal_ssm import decay_powers, two_level_split
from .export_shapes import is_open
from .full_products import full_matmul


def relative_position_bucket(
    relative_position: torch.Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> torch.Tensor:
    """Bucket of every offset `j - i`, as in T5 (arXiv 1910.10683, section 2.1).

    With e exact buckets, a distance m < e has its own bucket; larger ones share buckets of logarithmic width up to
    `max_distance`, beyond which all fall in the last: `e + floor(log(m / e) / log(max_distance / e) * (h - e))`, where h
    is the number of buckets of one direction. Bidirectional: keys after the query use the upper half of the buckets.
    Causal: keys after the query count as distance 0 (they are masked anyway). The logarithms are taken in float32.

    Args:
        relative_position: integer tensor of any shape, key position minus query position.
        bidirectional: whether keys after the query are seen.
        num_buckets: rows of the bias table; at least 2, or 4 and even when bidirectional.
        max_distance: distance from which all offsets share one bucket, in tokens.

    Returns:
        int64 tensor of the same shape, entries in [0, num_buckets).

    Raises:
        ValueError: `num_buckets` or `max_distance` is too small to make one exact and one logarithmic bucket.
    """
    minimum = 4 if bidirectional else 2
    if num_buckets < minimum or (bidirectional and num_buckets % 2):
        raise ValueError(
            f"`num_buckets` must be {'an even number ' if bidirectional else ''}of at least {minimum}; got {num_buckets}."
        )
    buckets_per_side = num_buckets // 2 if bidirectional else num_buckets
    num_exact = buckets_per_side // 2
    if max_distance <= num_exact:
        raise ValueError(
            f"`max_distance` must exceed the {num_exact} exact buckets that num_buckets={num_buckets} gives; "
            f"got {max_distance}."
        )
    relative_position = relative_position.long()
    if bidirectional:
        base = torch.where(relative_position > 0, buckets_per_side, 0)
        distance = relative_position.abs()
    else:
        base = torch.zeros_like(relative_position)
        distance = (-relative_position).clamp(min=0)
    # log(0) would be -inf, with an undefined conversion to an integer; the clamped entries take the exact branch
    ratio = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (ratio * (buckets_per_side - num_exact)).long()
    logarithmic = logarithmic.clamp(max=buckets_per_side - 1)
    return base + torch.where(distance < num_exact, distance, logarithmic)


def relative_bias_vector(
    table: torch.Tensor, *, radius: int, causal: bool = False, max_distance: int = 128
) -> torch.Tensor:
    """Bias of every offset inside a window, from a table of bucket biases.

    Args:
        table: (num_buckets, n), one learned bias per bucket and head.
        radius: largest distance r inside the window, in tokens; 0 or more.
        causal: only offsets -r..0 (causal buckets) instead of -r..r (bidirectional buckets).
        max_distance: see `relative_position_bucket`.

    Returns:
        (n, 2r + 1), or (n, r + 1) when causal: entry k is the bias of offset `j - i = k - r`.
    """
    buckets = window_buckets(
        radius, causal=causal, num_buckets=table.shape[0], max_distance=max_distance, device=table.device
    )
    return F.embedding(buckets, table).transpose(0, 1)


def window_buckets(
    radius: int,
    *,
    causal: bool = False,
    num_buckets: int = 32,
    max_distance: int = 128,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Bucket of every offset inside a window: the rows of the table in `relative_bias_vector`, for modules that hold one.

    Args:
        radius: largest distance r inside the window, in tokens; 0 or more.
        causal: only offsets -r..0 (causal buckets) instead of -r..r (bidirectional buckets).
        num_buckets, max_distance: see `relative_position_bucket`.
        device: device of the result.

    Returns:
        (2r + 1,) int64, or (r + 1,) when causal. In eager mode it is computed once: it must not be changed.
    """
    if radius < 0:
        raise ValueError(f"`radius` must be a distance in tokens, 0 or more; got {radius}.")
    arguments = (radius, causal, num_buckets, max_distance, device)
    if device is None or not _can_keep(device):
        return _window_buckets(*arguments)
    with torch.inference_mode(False):
        return _kept_window_buckets(*arguments)


def _can_keep(device: torch.device) -> bool:
    """Whether a tensor made now serves later calls too: not that of a traced graph, nor one without contents."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or device.type == "meta" or transforms():
        return False
    return type(torch.empty(0, device=device)) is torch.Tensor  # `FakeTensorMode` makes others


def _window_buckets(
    radius: int, causal: bool, num_buckets: int, max_distance: int, device: torch.device | None
) -> torch.Tensor:
    offsets = torch.arange(-radius, 1 if causal else radius + 1, device=device)
    return relative_position_bucket(
        offsets, bidirectional=not causal, num_buckets=num_buckets, max_distance=max_distance
    )


_kept_window_buckets = lru_cache(maxsize=64)(_window_buckets)


def toeplitz_bias(
    vector: torch.Tensor, num_rows: int, num_columns: int, *, shift: int, fill: float = 0.0
) -> torch.Tensor:
    """Matrix of a vector indexed by offset: `T[..., a, c] = vector[..., c - a + shift]`, `fill` outside the vector.

    Args:
        vector: (..., m).
        num_rows: rows (queries) of the matrix.
        num_columns: columns (keys) of the matrix.
        shift: index in `vector` of the main diagonal; may lie outside the vector.
        fill: value where the index leaves the vector.

    Returns:
        (..., num_rows, num_columns), a new tensor; differentiable in `vector`.
    """
    if torch.compiler.is_exporting():  # graph formats know indexing, but few of them overlapping views
        columns, rows = (torch.arange(size, device=vector.device) for size in (num_columns, num_rows))
        index = columns - rows.unsqueeze(-1) + shift
        inside = (index >= 0) & (index < vector.shape[-1])
        return torch.where(inside, vector[..., index.clamp(0, vector.shape[-1] - 1)], fill)
    first = shift - (num_rows - 1)  # smallest index used, in the lower left corner
    last = shift + num_columns - 1  # largest index used, in the upper right corner
    before, after = max(0, -first), max(0, last + 1 - vector.shape[-1])
    extended = F.pad(vector, (before, after), value=fill)[..., first + before : last + 1 + before]
    matrix = extended.unfold(-1, num_columns, 1).flip(-2)
    # Its columns lie side by side in memory; on CPU whatever adds it to rows of scores would take ten times as long.
    return matrix.contiguous() if uses_cpu_form(vector) else matrix


def toeplitz_bias_gradient(gradient: torch.Tensor, vector_length: int, *, shift: int) -> torch.Tensor:
    """Gradient of `toeplitz_bias` to its vector: sums of the diagonals of `gradient`.

    Args:
        gradient: (..., rows, columns).
        vector_length: m, the length of the vector.
        shift: as given to `toeplitz_bias`.

    Returns:
        (..., m).
    """
    num_rows, num_columns = gradient.shape[-2:]
    # Rows are reversed and each is padded by `num_rows` zeros; read with rows one element shorter, row s moves s places
    # to the right, and the diagonals have become columns.
    width = num_columns + num_rows - 1
    skewed = F.pad(gradient.flip(-2), (0, num_rows)).flatten(-2)[..., : num_rows * width]
    diagonals = skewed.unflatten(-1, (num_rows, width)).sum(-2)
    first = shift - (num_rows - 1)
    before, after = max(0, first), max(0, vector_length - first - width)
    return F.pad(diagonals, (before, after))[..., max(0, -first) :][..., :vector_length]


def simple_relative_bias(table: torch.Tensor, length: int) -> torch.Tensor:
    """Learned bias of every offset between `length` tokens, read from the middle of a table (Mega's "simple" bias).

    Args:
        table: (2M - 1,); entry M - 1 + o is the bias of offset `j - i = o`.
        length: tokens, at most M.

    Returns:
        (2 length - 1,): entry length - 1 + o belongs to offset o; float32 or better.

    Raises:
        ValueError: the table is too short.
    """
    positions = (table.shape[0] + 1) // 2
    if not 1 <= length <= positions:
        raise ValueError(
            f"`length` must be at most {positions} tokens, all that the table of the simple relative bias covers; got "
            f"{length}. Raise `max_positions` (or `chunk_size`), or use the rotary bias, which has no limit."
        )
    vector = table[positions - length : positions + length - 1]
    return vector.to(torch.promote_types(table.dtype, torch.float32))


def rotary_relative_bias(alpha: torch.Tensor, beta: torch.Tensor, length: int) -> torch.Tensor:
    """Product of two learned vectors turned by rotary angles, for every offset between `length` tokens.

    With halves a, a' of `alpha`, b, b' of `beta` and angles t_k = 10000^(-2k / Z), offset `j - i = o` has the bias
    `sum_k (a_k b_k + a'_k b'_k) cos(o t_k) - (a_k b'_k - a'_k b_k) sin(o t_k)` (arXiv 2209.10655, appendix B): the kernel
    of an undamped diagonal system, in O(length) exponentials and O(length Z) products.

    Args:
        alpha, beta: (1, Z), Z even.
        length: tokens.

    Returns:
        (2 length - 1,): entry length - 1 + o belongs to offset o; float32 or better.
    """
    real, imag = _rotary_coefficients(alpha, beta)
    # K_(gC + j) = Re c q^(gC) q^j in two levels, as `diagonal_kernel`; the powers depend on nothing that is learned.
    outer_real, outer_imag, inner = _rotary_powers(alpha.shape[-1] // 2, length, real.dtype, alpha.device)
    rows = torch.addcmul(real.unsqueeze(-1) * outer_real, imag.unsqueeze(-1), outer_imag)  # (2, Z / 2, G)
    return full_matmul(rows.flatten(0, 1).mT, inner).flatten()[: 2 * length - 1]


def _rotary_powers(
    pairs: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Powers q^(gC) as factors of the coefficients, two (2, Z / 2, G), and (Z, C) powers q^(j + 1 - length).

    Where gradients are tracked the layers of a stack share those of the last length, which must not be changed; a generation keeps
    the bias itself.
    """
    is_shared = torch.is_grad_enabled() and not is_open(length) and _can_keep(device)
    return (_last_rotary_powers if is_shared else _new_rotary_powers)(pairs, length, dtype, device)


def _new_rotary_powers(
    pairs: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    angles = _rotary_angles(pairs, device)
    zeros = torch.zeros_like(angles)
    size, groups = two_level_split(2 * length - 1)
    inner_real, inner_imag = decay_powers(zeros, angles, count=size, offset=1 - length, dtype=dtype)
    real, imag = decay_powers(zeros, angles, stride=size, count=groups, dtype=dtype)  # (1, Z / 2, G)
    assert imag is not None and inner_imag is not None  # powers of complex numbers
    return torch.cat([real, -imag]), torch.cat([-imag, -real]), torch.cat([inner_real, inner_imag], dim=1)[0]


_last_rotary_powers = lru_cache(maxsize=1)(_new_rotary_powers)


def rotary_bias_at(alpha: torch.Tensor, beta: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`rotary_relative_bias` at any offsets `j - i`: integers (...) -> (...), float32 or better."""
    real, imag = _rotary_coefficients(alpha, beta)
    angles = _rotary_angles(real.shape[-1], alpha.device)
    turns = offsets.unsqueeze(-1).to(angles.dtype) * angles[0]
    return (turns.cos().to(real.dtype) @ real[0]) - (turns.sin().to(imag.dtype) @ imag[0])


def _rotary_angles(pairs: int, device: torch.device) -> torch.Tensor:
    """Angles t of the bias Re sum_k c_k exp(i o t_k), (1, Z / 2), in double precision."""
    exponents = torch.arange(pairs, device=device, dtype=widest_float(device)) / pairs
    return (10000.0**-exponents).unsqueeze(0)


def _rotary_coefficients(alpha: torch.Tensor, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients c of the bias Re sum_k c_k exp(i o t_k), a pair of (1, Z / 2)."""
    width = alpha.shape[-1]
    if alpha.shape != (1, width) or beta.shape != alpha.shape or width % 2:
        raise ValueError(
            f"`alpha` and `beta` must both be (1, Z) with an even Z; got {tuple(alpha.shape)} and {tuple(beta.shape)}."
        )
    dtype = torch.promote_types(alpha.dtype, torch.float32)
    first, second = alpha.to(dtype).chunk(2, dim=-1)
    other_first, other_second = beta.to(dtype).chunk(2, dim=-1)
    return first * other_first + second * other_second, first * other_second - second * other_first


def rotary_cos_sin(positions: torch.Tensor, head_dim: int, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary angles `position * base^(-2m / d)`, m = 0..d/2-1 (arXiv 2104.09864, Eq. 15).

    Args:
        positions: (..., L) integer positions.
        head_dim: width d of a head, even.
        base: the longest wavelength is about `2 pi base` tokens.

    Returns:
        two (..., L, d) float32 tensors; the d/2 angles are repeated for the two halves of a head.

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"`head_dim` must be even and at least 2 for rotary positions; got {head_dim}.")
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.unsqueeze(-1).float() * base**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates queries or keys so that their products depend on the difference of their positions alone.

    Component m of a head is paired with component m + d/2.

    Args:
        states: (B, n, L, d).
        cos, sin: (L, d) or (B, L, d) of `rotary_cos_sin`.

    Returns:
        (B, n, L, d) in the dtype of `states`; the rotation is computed in float32 or better.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = states.to(dtype)
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (rotated * cos.to(dtype) + turned * sin.to(dtype)).to(states.dtype)
