"""What one contender is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

SPAN_CORRUPTION, NEXT_TOKEN = "span corruption", "next token"
RANDOM_ROWS, RANDOM_DOCUMENTS, AS_IT_STANDS = "random rows", "random documents", "as it stands"
ORDERS = (RANDOM_ROWS, RANDOM_DOCUMENTS, AS_IT_STANDS)
OPTIMIZERS = ("adamw", "muon", "adafactor", "rms_adamw", "lion")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes, data and optimizer of a run. The defaults of the optimizer are those of pretraining with AdamW.

    Attributes:
        hidden_size, layers, decoder_layers, head_dim: width and depths; `decoder_layers` is that of encoder-decoders.
        feed_forward: inner width of the feed-forward layers of the first contender, whose number of parameters the others meet.
        window: tokens that a query sees in models with a window, itself included.
        tied: the head is the embedding matrix.
        dropout: dropout of the hidden states.
        model: further fields of the configuration of the contender.
        vocab_size: pieces of the tokenizer, without the sentinels.
        length: tokens of an input.
        noise_density, mean_span_length: noise of the training inputs; held-out inputs always have the usual 0.15 and 3.
        noise_mixture: pairs of these two, of which each batch has one; empty: always that above.
        order: one of `ORDERS`: rows in random order, documents in random order and each read through, or the text as its files have it.
        deduplicated: without lines that occurred before; see `without_repeated_lines`.
        batch_size: rows of a step.
        batch_growth: how many times as many rows the last third of the steps has; the second third has the geometric mean.
        optimizer: one of `OPTIMIZERS`; "adamw" and "muon" are those of the library, "adafactor" that of Transformers with
            steps relative to the size of the weights, as T5 has it, "rms_adamw" AdamW with such steps, "lion" Lion.
        learning_rate, matrix_learning_rate, ssm_learning_rate: of everything, of the matrices of the blocks (Muon), of state
            spaces (None: as everything).
        rounded_moments: the averages that the optimizer keeps are rounded to bfloat16 after every step.
        schedule: name of a schedule of Transformers, with `warmup` as a share of the steps.
        decay: share of the steps in which the schedule "warmup_stable_decay" falls to zero.
        compile: `torch.compile` of the model.
        bf16: bfloat16 autocast.
    """

    hidden_size: int = 128
    layers: int = 4
    decoder_layers: int = 4
    head_dim: int = 32
    feed_forward: int = 384
    window: int = 128
    tied: bool = True
    dropout: float = 0.0
    model: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int = 4000
    length: int = 256
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    noise_mixture: tuple[tuple[float, float], ...] = ()
    order: str = RANDOM_ROWS
    deduplicated: bool = False
    batch_size: int = 16
    batch_growth: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    matrix_learning_rate: float | None = None
    ssm_learning_rate: float | None = 1e-3
    weight_decay: float = 0.01
    beta2: float = 0.98
    rounded_moments: bool = False
    schedule: str = "linear"
    warmup: float = 0.05
    decay: float = 0.3
    max_grad_norm: float = 1.0
    compile: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}.")
        if self.order not in ORDERS:
            raise ValueError(f"`order` must be one of {', '.join(ORDERS)}; got {self.order!r}.")
        if (self.optimizer == "muon") != (self.matrix_learning_rate is not None):
            raise ValueError(
                "`matrix_learning_rate` is the learning rate of the matrices under `optimizer='muon'`, which needs it; got "
                f"{self.matrix_learning_rate} with {self.optimizer!r}."
            )
        if self.hidden_size % self.head_dim:
            raise ValueError(f"`head_dim` must divide `hidden_size` ({self.hidden_size}); got {self.head_dim}.")

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.hidden_size // self.head_dim

    def batch_sizes(self, steps: int) -> list[int]:
        """Rows of each step."""
        sizes = [round(self.batch_size * self.batch_growth ** (third / 2)) for third in range(3)]
        return [sizes[3 * step // steps] for step in range(steps)]

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """The same with other values.

        Raises:
            ValueError: there is no such setting.
        """
        known = {item.name for item in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"There is no setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        return type(self)(**{**{name: getattr(self, name) for name in known}, **changes})
