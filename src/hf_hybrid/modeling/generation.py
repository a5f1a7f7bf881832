"""`generate` for models with a state of their own: the cache that it starts with, and checks before it computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache
from transformers.generation import CompileConfig, GenerationConfig, GenerationMixin

from ..layers.decoding_linear import few_rows
from ..ops.branches import uses_cpu_form
from .argument_types import check_types
from .call_cache import reorder_targets
from .fixed_steps import FixedState, FixedSteps, announce_length, has_own_state, released_states

# Arguments with a row for each source; the beams and samples of a source share it.
_SOURCE_ARGUMENTS = ("attention_mask", "encoder_outputs", "inputs_embeds", "token_type_ids")


class StateGenerationMixin(GenerationMixin):
    """`GenerationMixin` that begins with `build_cache()` of the stack."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if _is_sharded(self) and "_generate" not in vars(self):
            # The encoder is called by itself, whose embeddings and norms FSDP2 gathers for calls of the whole model only:
            # generating has to count as one.
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self, "_generate")  # type: ignore[arg-type]
        with released_states():
            outputs = self._generate(*args, **kwargs)
            cache = getattr(outputs, "past_key_values", None)
            if isinstance(cache, FixedState):
                outputs.past_key_values = cache.release()
        return outputs

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
        compiles = kwargs.get("compile_config", getattr(config, "compile_config", None)) is not None
        with few_rows(model) if uses_cpu_form(model.device) and not compiles else nullcontext():
            return super().generate(*args, **kwargs)

    def _refuse_cache(self, name: str) -> NoReturn:
        raise ValueError(
            f"`cache_implementation={name!r}` is not available for {type(self).__name__}: such a cache cannot hold its recurrent "
            "states, which are of constant size already. Leave `cache_implementation` unset, or set it to 'static'."
        )

    def _check_cache_implementation(self, name: str) -> None:
        """Raises ValueError for a kind of cache that cannot hold the state; here all but the model's own."""
        self._refuse_cache(name)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """The first that `generate` does with the arguments of the forward pass."""
        check_types(self, model_kwargs)
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, str, dict[str, Any]]:
        """Reads the prompt, or the source of an encoder-decoder, under whichever name.

        Raises:
            TypeError, ValueError: `inputs` is not a tensor of token ids (batch, length).
        """
        check_types(self, {"input_ids": inputs})
        tensor, name, model_kwargs = super()._prepare_model_inputs(inputs, *args, **kwargs)
        for argument, ids in ((name, tensor), ("decoder_input_ids", model_kwargs.get("decoder_input_ids"))):
            if ids is not None and argument.endswith("input_ids"):
                _check_prompt_ids(ids, argument)
        beside = model_kwargs.get("input_ids")
        if name == "inputs_embeds" and beside is not None and len(beside) != len(tensor):
            raise ValueError(
                f"`input_ids` has {len(beside)} rows, `inputs_embeds` {len(tensor)}: pass one of them, or both of the same rows."
            )
        return tensor, name, model_kwargs

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        """Reads the options of `generate`.

        Raises:
            ValueError: a number of beams or of texts is not positive, which Transformers finds out by a division.
        """
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        for name in ("num_beams", "num_return_sequences"):
            value = getattr(generation_config, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1; got {value!r}.")
        return generation_config, model_kwargs

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """The target prompts, with the start token that is missing put between padding and text, not in front of the padding.

        New tokens alone, with the mask of the whole target, continue one that has begun: they get none.
        """
        given, cache = model_kwargs.get("decoder_input_ids"), model_kwargs.get("past_key_values")
        mask = model_kwargs.get("decoder_attention_mask")
        if given is not None and mask is not None and mask.shape[1] > given.shape[1] and cache is not None:
            if cache.get_seq_length():
                del model_kwargs["decoder_input_ids"]
                return given, model_kwargs
        ids, model_kwargs = super()._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, *args, **kwargs
        )
        mask = model_kwargs.get("decoder_attention_mask")
        if given is not None and mask is not None and mask.shape == ids.shape and ids.shape[1] > given.shape[1]:
            ids, model_kwargs["decoder_attention_mask"] = _with_padding_in_front(ids, mask)
        return ids, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        model: Any = self
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        _check_prompt(model_kwargs.get(f"{prefix}attention_mask"), f"{prefix}attention_mask")
        size = generation_config.prefill_chunk_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"`prefill_chunk_size` must be a number of tokens, at least 1, or None; got {size!r}.")
        name = generation_config.cache_implementation
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is False:
            return
        elif name in (None, "dynamic", "static"):
            stack = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
            model_kwargs["past_key_values"] = stack.build_cache()
        else:
            self._check_cache_implementation(name)
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Whether steps are compiled (`fixed_steps`): where `compile_config` asks for it, on any device; on accelerators, as in
        Transformers, also with `cache_implementation="static"`.

        Raises:
            ValueError: `compile_config` asks for what cannot be compiled.
        """
        cache = model_kwargs.get("past_key_values")
        if generation_config.disable_compile:
            return False
        if cache is not None and not has_own_state(cache):  # a cache of Transformers, of full attention
            return super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        obstacle = "generates here without a cache" if cache is None else _obstacle_to_compiling(self)
        if generation_config.compile_config is None:
            is_static = generation_config.cache_implementation == "static"
            model: Any = self
            return is_static and obstacle is None and not uses_cpu_form(model.device)
        if obstacle is not None:
            raise ValueError(
                f"`compile_config` needs the state of a generation on one device, but {type(self).__name__} {obstacle}. Leave "
                "`compile_config` unset."
            )
        return True

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """What `generate` calls for its steps: `FixedSteps` of this model."""
        model: Any = self
        if "_fixed_steps" not in self.__dict__:
            self._fixed_steps = FixedSteps()
        steps = self._fixed_steps.compiled(compile_config or model._default_compile_config())

        def call(**inputs: Any) -> Any:
            if has_own_state(inputs.get("past_key_values")):
                return steps(self, **inputs)
            return super(StateGenerationMixin, self).get_compiled_call(compile_config)(**inputs)  # type: ignore[misc]

        return call

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeats each target `expand_size` times, for beams and samples; a source is not repeated: they share it."""
        source: dict[str, Any] = {}
        if is_encoder_decoder and expand_size > 1:
            if model_kwargs.get("encoder_outputs") is None:
                raise ValueError(
                    "`encoder_outputs` are missing: the source has to be encoded before targets share it."
                )
            source = {name: model_kwargs.pop(name) for name in _SOURCE_ARGUMENTS if name in model_kwargs}
            source["targets_per_source"] = model_kwargs.pop("targets_per_source", 1) * expand_size
        ids, expanded = super()._expand_inputs_for_generation(expand_size, False, input_ids, **model_kwargs)
        return ids, expanded | source

    def _reorder_cache(self, past_key_values: Cache, beam_idx: torch.LongTensor) -> Cache:
        """Called by beam search, whose beams only take the place of others with the same source."""
        reorder_targets(past_key_values, beam_idx)
        return past_key_values

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Reads the prompt; of a text that is continued, only what the cache does not hold.

        Raises:
            ValueError: the text is not longer than what the cache holds.
        """
        model: Any = self
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        if past:
            embeds = None if prefix else model_kwargs.get("inputs_embeds")
            mask = model_kwargs.get(f"{prefix}attention_mask")
            mask_length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            is_whole = embeds is not None or mask_length == input_ids.shape[1] or (bool(prefix) and mask is None)
            length = input_ids.shape[1] if embeds is None else embeds.shape[1]
            if is_whole and length <= past:
                name = f"{prefix}input_ids" if embeds is None else "inputs_embeds"
                raise ValueError(
                    f"`{name}` has {length} tokens, but `past_key_values` holds {past} already: pass the whole text, or "
                    f"`{prefix}attention_mask` of the whole text with its new tokens alone."
                )
            if prefix and mask is None:
                model_kwargs["decoder_attention_mask"] = torch.ones_like(input_ids)
        announce_length(cache, input_ids, model_kwargs, generation_config.max_length)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching keeps pages of keys and values, which hold no recurrent state.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"Continuous batching (`generate_batch`, `cache_implementation='paged'`) is not available for {type(self).__name__}: "
            "pages of keys and values cannot hold its state. Use `generate` with a batch that is padded on the left."
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, see `init_continuous_batching`."""
        self.init_continuous_batching()

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, see `init_continuous_batching`."""
        self.init_continuous_batching()


def _is_sharded(model: Any) -> bool:
    """Whether FSDP2 has sharded the model (`fully_shard`), by whichever engine."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def _with_padding_in_front(ids: torch.Tensor, mask: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Ids and mask (B, T) with the first token of each row behind the padding that follows it."""
    padding = (mask[:, 1:].cumsum(1) == 0).sum(1, keepdim=True)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    sources = torch.where(places < padding, places + 1, torch.where(places == padding, 0, places))
    return ids.gather(1, sources), mask.gather(1, sources)


def _check_prompt_ids(ids: torch.Tensor, name: str) -> None:
    """Raises ValueError for a prompt, or a source, that is not a batch of token ids."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.numel() == 0:
        raise ValueError(
            f"`{name}` must hold token ids (int64 or int32) of shape (batch, length), at least one row of one token; got "
            f"{ids.dtype} of shape {tuple(ids.shape)}."
        )


def _check_prompt(mask: torch.Tensor | None, name: str) -> None:
    """Raises ValueError for rows that end with padding. Called once per text, so a synchronisation is affordable."""
    if mask is None or mask.dim() != 2 or mask.is_meta:
        return
    if bool(((mask[:, -1] == 0) & (mask != 0).any(-1)).any()):
        raise ValueError(
            f"`{name}` ends with padding, but generation goes on from the last position of every row: pad the prompts on the left "
            "(`tokenizer.padding_side = 'left'`)."
        )


def _obstacle_to_compiling(model: Any) -> str | None:
    """What keeps the steps of a model with a state of its own from being compiled; None if nothing does."""
    quantizer, places = getattr(model, "hf_quantizer", None), set(getattr(model, "hf_device_map", {}).values())
    if quantizer is not None and not quantizer.is_compileable:
        return "is quantised in a way that does not compile"
    return "is offloaded to the CPU or the disk in part" if len(places) > 1 and places & {"cpu", "disk"} else None
