"""Refusal of checkpoints of other architectures."""

from __future__ import annotations

import os
from typing import Any


class ReadsOwnModelType:
    """For configurations: reading a file that names another `model_type` is an error.

    Transformers only warns, and the model then has random weights wherever the two architectures name things differently.
    """

    model_type: str

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the fields of a configuration.

        Raises:
            ValueError: it describes a model of another type.
        """
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        found = fields.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of the type {found!r}, but {cls.__name__} reads "
                f"{cls.model_type!r}. Load it by an Auto class, which finds the classes of every type."
            )
        return fields, unused
