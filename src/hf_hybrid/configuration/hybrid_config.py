"""What the configurations of all architectures share: refusal of other model types, and the lengths that a model accepts."""

# No `from __future__ import annotations` here: `@strict` checks types only where they are not strings.
import os
from dataclasses import fields
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from .checks import check_num_labels, check_numbers, check_switch

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class HybridConfig(PreTrainedConfig):
    """Base of the configurations of this library.

    A model accepts inputs and targets of any length unless its configuration says otherwise through the methods below.
    None has a field named `max_position_embeddings`, because other programs take it for the longest input.

    One word means one thing in all of them. A window (`window_size`, w) counts the tokens that a query sees, itself included: it
    sees itself and the w - 1 tokens before it, and where it sees the future also the w - 1 after it. Former spellings are read
    through `attribute_map`; fields whose meaning has changed are translated by `read_former_fields`, in arguments and in files.
    """

    # Former fields with another meaning than their successors: {former: successor}.
    former_fields: ClassVar[dict[str, str]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = self.take_old_spellings(kwargs)
        check_num_labels(kwargs.get("num_labels"))
        super().__post_init__(**kwargs)

    def validate_all_numbers(self) -> None:
        """Checks every number by itself; called, in the order of names, before the architecture's own checks."""
        check_numbers(self)

    def validate_labels(self) -> None:
        """Checks what classifiers are trained for."""
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"`problem_type` must be one of {', '.join(map(repr, PROBLEM_TYPES))}, or None; got {self.problem_type!r}."
            )

    def validate_outputs(self) -> None:
        """Checks what forward passes return, whose types Transformers does not check."""
        for name in ("return_dict", "output_hidden_states", "output_attentions"):
            check_switch(name, getattr(self, name, None))

    def take_old_spellings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Sets fields that were given under a former name, before others are derived from them; returns the rest."""
        for old, new in self.attribute_map.items():
            if old in kwargs:
                setattr(self, new, kwargs.pop(old))
        former = {name: kwargs.pop(name) for name in self.former_fields if name in kwargs}
        if former:
            values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
            given = {item.name: values[item.name] for item in fields(self) if values[item.name] != item.default}  # type: ignore[arg-type]
            for name, value in self.read_former_fields(given | former).items():
                if value != values[name]:
                    setattr(self, name, value)
        return kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a configuration from the fields of a file, which may be of an earlier version."""
        return super().from_dict(cls.read_former_fields(dict(config_dict)), **kwargs)

    @classmethod
    def read_former_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file, with those of earlier versions translated."""
        return fields

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the fields of a configuration.

        Transformers only warns about a file that names another `model_type`, and the model then has random weights
        wherever the two architectures name things differently.

        Raises:
            ValueError: the file describes a model of another type.
        """
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = fields.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {found!r}, but {cls.__name__} reads "
                f"{cls.model_type!r}. Load it with an Auto class, which finds the class for every type."
            )
        return fields, unused

    def source_limits(self) -> dict[str, int]:
        """The fields that limit an input, each with the number of tokens that it allows; empty without a limit."""
        return {}

    def target_limits(self) -> dict[str, int]:
        """The same for the text that a decoder writes: the target of an encoder-decoder, prompt and continuation of a causal model."""
        return {} if self.is_encoder_decoder else self.source_limits()

    def max_source_length(self) -> int | None:
        """Largest number of tokens in an input; None: no limit."""
        return min(self.source_limits().values(), default=None)

    def max_target_length(self) -> int | None:
        """Largest number of tokens that a decoder writes, a prompt included; None: no limit."""
        return min(self.target_limits().values(), default=None)
