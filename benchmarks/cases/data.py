"""Preparation of training data."""

from __future__ import annotations

from collections.abc import Callable

from harness import Case

BATCH = 256
SENTINELS = tuple(range(31999, 30999, -1))


def _segments(input_length: int):
    import numpy

    from hf_hybrid.data.span_corruption import span_corruption_lengths

    lengths = span_corruption_lengths(input_length)
    generator = numpy.random.default_rng(0)
    return generator.integers(2, 30000, (BATCH, lengths.segment_length), dtype=numpy.int64)


def corrupt(input_length: int) -> Callable[[], object]:
    import numpy

    from hf_hybrid.data.span_corruption import corrupt_spans, sample_keys

    segments = _segments(input_length)
    keys = sample_keys(0, 0, numpy.arange(BATCH))
    return lambda: corrupt_spans(segments, sentinel_ids=SENTINELS, eos_token_id=1, keys=keys)


def check(input_length: int) -> None:
    """Input and target together hold the segment, nothing lost."""
    from hf_hybrid.data.span_corruption import restore_segment

    segments = _segments(input_length)
    inputs, labels = corrupt(input_length)()
    if inputs.shape != (BATCH, input_length):
        raise AssertionError(f"inputs have shape {inputs.shape}, expected {(BATCH, input_length)}")
    for row in range(0, BATCH, 16):
        restored = restore_segment(inputs[row], labels[row], sentinel_ids=SENTINELS)
        if list(restored) != list(segments[row]):
            raise AssertionError(f"row {row} is not restored")


def input_tokens(input_length: int) -> tuple[int, str]:
    return BATCH * input_length, "tokens"


CASES = (
    Case(
        name="span-corruption",
        timed=f"span corruption of {BATCH} packed segments, one thread; rate in input tokens",
        build="corrupt",
        sizes=({"input_length": 512}, {"input_length": 4096}),
        check="check",
        work="input_tokens",
        rate_at_least=2e6,
        threads=1,
    ),
)
