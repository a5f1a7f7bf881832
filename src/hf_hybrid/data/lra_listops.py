"""ListOps: nested lists of digits with an operator each, and their value (arXiv 1804.06028, arXiv 2011.04006).

    expression := digit | operator expression expression+ ]        [MAX 4 [SM 7 8 ] 1 ]  ->  5

`[MIN` and `[MAX` are the smallest and largest argument, `[SM` the sum modulo 10, and `[MED` the median (for an even
number of arguments, the mean of the two middle ones, rounded down).

A tree is sampled from the root (depth 1): a node is an operator with probability 1/4 unless it is at `max_depth`, and has 2 to
`max_args` arguments, uniformly; all digits and operators are equally likely. Trees outside the range of lengths are drawn
again and duplicate trees are left out, as in the published procedure, which fixes no seed; here tree number i depends
only on (seed, i).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from .parallel import map_blocks

END = "]"
FUNCTIONS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: _median(sorted(values)),
    "[SM": lambda values: sum(values) % 10,
}
OPERATORS = tuple(FUNCTIONS)
DIGITS = tuple("0123456789")
TOKENS = (*OPERATORS, END, *DIGITS)

_OPERATOR_PROBABILITY = 0.25
_MAX_ATTEMPTS = 1_000_000
_MAX_FRUITLESS = 50  # rounds in which every tree is a duplicate


def _median(ordered: list[int]) -> int:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


@dataclass(frozen=True)
class ListOpsSettings:
    """Shape of the trees; the defaults are those of the Long Range Arena.

    Args:
        max_depth: maximum number of nodes on a path from the root; there are only digits at this depth.
        max_args: maximum number of arguments of an operator.
        longer_than, shorter_than: bounds, exclusive, of the number of tokens.

    Raises:
        ValueError: no tree satisfies the bounds.
    """

    max_depth: int = 10
    max_args: int = 10
    longer_than: int = 500
    shorter_than: int = 2000

    def __post_init__(self) -> None:
        if self.max_depth < 1 or self.max_args < 2:
            raise ValueError(
                f"`max_depth` must be at least 1 and `max_args` at least 2; got {self.max_depth} and {self.max_args}."
            )
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = 2 + self.max_args * longest
        if self.shorter_than - self.longer_than < 2 or longest <= self.longer_than:
            raise ValueError(
                f"No tree has more than `longer_than` = {self.longer_than} and fewer than `shorter_than` = {self.shorter_than} "
                f"tokens; at this depth the longest has {longest}."
            )


SHORT = ListOpsSettings(max_depth=6, max_args=6, longer_than=30, shorter_than=200)


def listops_tokens(source: str) -> list[str]:
    """Tokens of an expression; the notation of the published files (parentheses, `X` for `]`) is also accepted."""
    tokens = source.replace("(", " ").replace(")", " ").split()
    return [END if token == "X" else token for token in tokens]


def evaluate_listops(source: str | Sequence[str]) -> int:
    """Value of an expression, 0 to 9.

    Args:
        source: the text, or its tokens.

    Raises:
        ValueError: the source is not exactly one complete expression; the message says where it fails.
    """
    tokens = listops_tokens(source) if isinstance(source, str) else source
    open_lists: list[tuple[str, list[int]]] = []
    result: int | None = None
    for place, token in enumerate(tokens):
        if result is not None:
            raise ValueError(f"The expression is complete before token {place}, {token!r}.")
        if token in FUNCTIONS:
            open_lists.append((token, []))
            continue
        if token == END:
            if not open_lists or not open_lists[-1][1]:
                raise ValueError(f"Token {place}, {END!r}, closes {'an empty list' if open_lists else 'no list'}.")
            operator, arguments = open_lists.pop()
            value = FUNCTIONS[operator](arguments)
        elif token in DIGITS:
            value = int(token)
        else:
            raise ValueError(f"Token {place} is {token!r}; accepted are {' '.join(TOKENS)}.")
        if open_lists:
            open_lists[-1][1].append(value)
        else:
            result = value
    if result is None:
        raise ValueError(f"The expression ends inside {len(open_lists)} open lists." if tokens else "No expression.")
    return result


class _TooLong(Exception):
    pass


def _below(draw: Random, bound: int) -> int:
    # Only the method `random()` of `Random` guarantees the same numbers in every version of Python.
    return int(draw.random() * bound)


def _grow(draw: Random, settings: ListOpsSettings, depth: int, tokens: list[str]) -> int:
    """Appends a random expression to the tokens and returns its value."""
    if len(tokens) >= settings.shorter_than:
        raise _TooLong
    if depth == settings.max_depth or draw.random() > _OPERATOR_PROBABILITY:
        digit = _below(draw, 10)
        tokens.append(DIGITS[digit])
        return digit
    place = len(tokens)
    tokens.append("")
    count = 2 + _below(draw, settings.max_args - 1)
    values = [_grow(draw, settings, depth + 1, tokens) for _ in range(count)]
    tokens[place] = OPERATORS[_below(draw, len(OPERATORS))]
    tokens.append(END)
    return FUNCTIONS[tokens[place]](values)


def sample_listops(index: int, *, seed: int = 0, settings: ListOpsSettings | None = None) -> tuple[list[str], int]:
    """Tree number `index`: its tokens and its value, a function of (seed, index, settings).

    Raises:
        ValueError: a million consecutive trees are outside the range of lengths.
    """
    settings = settings or ListOpsSettings()
    draw = Random(f"listops {seed} {index}")
    for _ in range(_MAX_ATTEMPTS):
        tokens: list[str] = []
        try:
            value = _grow(draw, settings, 1, tokens)
        except _TooLong:
            continue
        if settings.longer_than < len(tokens) < settings.shorter_than:
            return tokens, value
    raise ValueError(f"Hardly any tree fits {settings}: widen the range of lengths.")


def _sample_block(indices: range, seed: int, settings: ListOpsSettings) -> list[tuple[str, int, int]]:
    rows = []
    for index in indices:
        tokens, value = sample_listops(index, seed=seed, settings=settings)
        rows.append((" ".join(tokens), value, len(tokens)))
    return rows


def generate_listops(
    count: int,
    *,
    seed: int = 0,
    settings: ListOpsSettings | None = None,
    num_processes: int = 1,
    progress: bool = False,
) -> dict[str, list]:
    """Different random expressions with their values.

    Args:
        count: number of rows.
        seed: seed of the trees. The rows of a larger `count` begin with those of a smaller one.
        settings: shape of the trees; None for those of the Long Range Arena.
        num_processes: see `map_blocks`; the rows do not depend on it.
        progress: show a progress bar.

    Returns:
        Columns `source` (tokens separated by spaces), `target` (0 to 9) and `length` (number of tokens).

    Raises:
        ValueError: there are fewer than `count` different trees, or a setting is out of range.
    """
    settings = settings or ListOpsSettings()
    rows: dict[str, tuple[str, int, int]] = {}  # keeps the order of first occurrence
    make = partial(_sample_block, seed=seed, settings=settings)
    drawn = fruitless = 0
    while (missing := count - len(rows)) > 0:
        before = len(rows)
        indices = range(drawn, drawn + max(missing, 100 if drawn else 0))
        options = {"num_processes": num_processes, "progress": progress, "description": "ListOps"}
        for block in map_blocks(make, indices, **options):  # type: ignore[arg-type]
            for row in block:
                rows.setdefault(row[0], row)
        drawn = indices.stop
        fruitless = fruitless + 1 if len(rows) == before else 0
        if fruitless == _MAX_FRUITLESS:
            raise ValueError(f"{drawn} draws gave only {len(rows)} different trees, fewer than `count` = {count}.")
    sources, targets, lengths = zip(*list(rows.values())[:count]) if count else ((), (), ())
    return {"source": list(sources), "target": list(targets), "length": list(lengths)}
