"""Stacks cut into pipeline stages by Transformers (`DistributedConfig(pp_size=...)`): each process runs some of the layers.

Transformers takes the layers of other stages out of `layers` and passes hidden states on as `inputs_embeds`. What it knows by name
alone, embeddings and last norm, and what layers share beside hidden states, is put in place here.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class RunsInStages:
    """Base of the stacks that can be cut into stages.

    Attributes:
        is_first_stage, is_last_stage: which ends of the stack this process holds; both of one that is not cut. A later stage is
            given hidden states as `inputs_embeds`, an earlier one returns them as `last_hidden_state`.
        embedding_modules: names of the modules that make hidden states of inputs.
        final_modules: names of those behind the last layer.
    """

    is_first_stage: bool = True
    is_last_stage: bool = True
    embedding_modules: tuple[str, ...] = ("embed_tokens",)
    final_modules: tuple[str, ...] = ("norm",)
    layers: nn.ModuleList
    config: Any

    @property
    def own_layers(self) -> list[nn.Module]:
        """The layers that this process runs."""
        if self.is_first_stage and self.is_last_stage:
            return list(self.layers)
        return [layer for layer in self.layers if hasattr(layer, "layer_idx")]

    def obstacle_to_stages(self) -> str | None:
        """Why a model with this configuration cannot be cut, with the remedy; None if it can."""
        if getattr(self.config, "adaptive_cutoffs", None) is not None:
            return "its head is an adaptive softmax with tables of the embeddings. Set `adaptive_cutoffs=None`"
        return None

    def become_stage(self, first_layer: nn.Module, *, is_first: bool, is_last: bool, keeps_embeddings: bool) -> None:
        """Leaves out what other stages hold.

        Args:
            first_layer: the first layer of the whole stack, without values yet.
            is_first, is_last: which ends of the stack this stage holds.
            keeps_embeddings: whether the head of this stage is tied to the embeddings.
        """
        self.is_first_stage, self.is_last_stage = is_first, is_last
        if not is_first and not keeps_embeddings:
            for name in self.embedding_modules:
                if getattr(self, name, None) is not None:
                    setattr(self, name, None)
        if not is_last:
            for name in self.final_modules:
                if getattr(self, name, None) is not None:
                    setattr(self, name, nn.Identity())


def cut_into_stages(model: Any, first_layer: nn.Module) -> None:
    """Completes the stage that Transformers has made of a model: see `RunsInStages.become_stage`."""
    stage, stack, prefix = model._pp_stage, model.base_model, model.base_model_prefix
    is_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    stack.become_stage(
        first_layer,
        is_first=stage.pp_is_first_stage,
        is_last=stage.pp_is_last_stage,
        keeps_embeddings=is_tied and stage.pp_is_last_stage,
    )
    known = stage.find_rank_for_key
    owners = {f"{prefix}.{name}.": 0 for name in stack.embedding_modules}
    owners |= {f"{prefix}.{name}.": stage.pp_size - 1 for name in stack.final_modules}

    def find_rank_for_key(key: str, num_layers: int, base_model_prefix: str) -> int | None:
        """The stage that owns a tensor of the checkpoint."""
        owner = next((rank for name, rank in owners.items() if key.startswith(name)), None)
        if owner is None and not key.startswith(f"{prefix}."):  # of the head
            return stage.pp_size - 1
        return known(key, num_layers, base_model_prefix) if owner is None else owner

    stage.find_rank_for_key = find_rank_for_key
