"""Plans by which Transformers cuts a model over processes (`DistributedConfig`): matrices by `tp_plan`, layers by `pp_plan`.

Feed-forward layers are cut along their inner width, with one sum at the end. All other wide matrices are cut along their
outputs, which are gathered, or along their inputs: between them stand recurrences, single-head attention, biases and
norms that need whole states. Configurations hold the rules of a stack as `base_model_tp_plan`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .pipeline_stages import RunsInStages, cut_into_stages

GATHER, SPLIT = "colwise_gather_output", "rowwise_split_input"


class ParallelPlans:
    """Base of all models: keeps the rules that a model has a matrix for, and refuses what it cannot be cut by."""

    _fsdp_plan: dict[str, str] | None = None
    _tp_plan: dict[str, str] | None = {"lm_head": GATHER, "mlm_head": GATHER}  # often tied to the embeddings

    def init_parallel_plans(self) -> None:
        """Collects the plans; options of a configuration leave out some of the matrices that it names, and the plan of all
        Transformers models for FSDP2 names modules that few have."""
        super().init_parallel_plans()  # type: ignore[misc]
        modules = {
            re.sub(r"\.\d+(?=\.|$)", ".*", name): module
            for name, module in self.named_modules()  # type: ignore[attr-defined]
        }
        matrices = {name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Embedding))}
        self._tp_plan = {rule: style for rule, style in (self._tp_plan or {}).items() if rule in matrices}
        self._fsdp_plan = {rule: style for rule, style in (self._fsdp_plan or {}).items() if rule in modules}

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers.

        Raises:
            ValueError: pipeline stages of a model that has no plan for them.
        """
        is_mapping = isinstance(distributed_config, dict)
        stages = distributed_config.get("pp_size") if is_mapping else getattr(distributed_config, "pp_size", None)
        if (stages or 1) > 1 and not getattr(cls, "runs_in_stages", False):
            raise ValueError(
                f"{cls.__name__} cannot be cut into pipeline stages (`pp_size={stages}`): Transformers passes the hidden states of one "
                "stack from stage to stage, to the head of a causal language model. Use `tp_size` or `fsdp_size`."
            )
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """As in Transformers.

        Raises:
            ValueError: pipeline stages of a model whose configuration does not allow them, or with too few layers.
        """
        stages = 1 if mesh_manager is None else distributed_config.pp_size
        if stages == 1:
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]
        stack = model.base_model
        if isinstance(stack, RunsInStages):
            obstacle = stack.obstacle_to_stages()
        else:
            obstacle = f"{type(stack).__name__} is not made for it. Derive it from `RunsInStages`"
        if obstacle is None and len(stack.layers) < stages:
            obstacle = f"it has {len(stack.layers)} layers. Choose a `pp_size` of at most so many"
        if obstacle is not None:
            raise ValueError(
                f"{cls.__name__} cannot be cut into pipeline stages (`pp_size={stages}`): {obstacle}, or use `tp_size` or `fsdp_size`."
            )
        first_layer = stack.layers[0]
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]
        cut_into_stages(model, first_layer)
        return model

    def gather_sharded_state_dict_for_save(
        self, model_to_save: Any, state_dict: dict[str, Any], distributed_config: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in Transformers, but tied tensors, which it gathers one by one, are saved once."""
        gather = super().gather_sharded_state_dict_for_save  # type: ignore[misc]
        state = gather(model_to_save, state_dict, distributed_config, **kwargs)
        if distributed_config is None:
            return state
        tied = getattr(model_to_save, "all_tied_weights_keys", None) or {}
        return {name: tensor for name, tensor in state.items() if tied.get(name) not in state}
