"""The stack of LongVQ layers: a decoder, or a bidirectional encoder (arXiv 2404.11163).

Shapes: B batch, L new tokens, D hidden size, H heads, E width of values over all heads, N state size, S codewords, w window.
"""

from typing import Any, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ...configuration.configuration_longvq import LongVQConfig
from ...layers.ema import MultiDimensionalDampedEma
from ...layers.kept_results import FreezableModel
from ...layers.value_embedding import ValueEmbedding
from ...ops.branches import takes_plain_form
from ..argument_types import checks_types
from ..cache import StateCache
from ..call_cache import cache_of_call, check_cache, count_tokens
from ..inputs import note_missing_attentions, read_inputs
from ..packed_documents import separates_documents
from ..parallel_plans import ParallelPlans
from ..pipeline_stages import RunsInStages
from ..sequence_pieces import ReadsPieces
from .longvq_cache import CodeMemoryLayer, check_codebooks
from .longvq_layers import LongVQLayer, LongVQMixer, build_norm
from .longvq_outputs import LongVQModelOutput
from .quantizer import VectorQuantizer, update_quantizers
from .s4d import ActivatedS4D


class LongVQPreTrainedModel(ParallelPlans, FreezableModel, PreTrainedModel):
    """Weight initialisation, the codebooks, and the interface to Transformers, for all LongVQ models."""

    config: LongVQConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongVQLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Patterns: state spaces and codebooks; the number of updates is an integer and stays one.
    _keep_in_fp32_modules_strict = [r"ssm\.\w+", r"quantizer\.(?!num_updates)\w+"]
    _is_stateful = True  # a state space cannot be rolled back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (MultiDimensionalDampedEma, ActivatedS4D, VectorQuantizer)):
            module.initialize(init)
        elif isinstance(module, LongVQMixer):
            # With normalised queries and keys the scale of gamma is irrelevant, but must not be near that of epsilon.
            init.normal_(module.qk_gamma, mean=0.0, std=1.0 if module.qk_norm else std)
            init.zeros_(module.qk_beta)
            init.normal_(module.window_bias, mean=0.0, std=std)
        elif isinstance(module, ValueEmbedding):
            init.normal_(module.weight, mean=0.0, std=1.0)
            init.normal_(module.bias, mean=0.0, std=0.1)

    def _quantizers(self) -> list[VectorQuantizer]:
        return [layer.mixer.quantizer for layer in self.base_model.own_layers]

    def apply_codebook_updates(self) -> None:
        """Applies the pending codebook update of the last training step; the next training step does so by itself.

        In a distributed run all processes must call it.
        """
        update_quantizers(self._quantizers())

    def codebook_stats(self) -> list[dict[str, Any]]:
        """Health of the codebooks of each layer; see `VectorQuantizer.report`.

        Watch the perplexity. A small commitment loss or relative error is not a sign of health: keys that have all
        become equal are quantised without error.
        """
        return [quantizer.report() for quantizer in self._quantizers()]

    def _apply_updates_of_one_process(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            self.apply_codebook_updates()

    def train(self, mode: bool = True) -> Self:
        """As in PyTorch; in a run of one process, the change to evaluation applies the pending codebook update: what is
        evaluated is what `save_pretrained` writes."""
        if self.training and not mode:
            self._apply_updates_of_one_process()
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; in a run of one process, the pending codebook update is applied first."""
        self._apply_updates_of_one_process()
        return super().save_pretrained(*args, **kwargs)


class LongVQModel(RunsInStages, ReadsPieces, LongVQPreTrainedModel):
    """The bare stack.

    A causal one keeps a cache of constant size: per layer the state of the moving average, (B, D, N) (or of the state space,
    (B, D, N / 2, 2)); codes (B, H, w - 1), values (B, H, w - 1, E / H) and mask (B, w - 1) of the last tokens; counts
    (B, H, S) and mean values (B, H, S, E / H) of all earlier ones by code. It belongs to the codebooks it was made
    with.
    """

    _can_record_outputs = {"hidden_states": OutputRecorder(LongVQLayer, index=0)}
    _per_document_outputs = ("codebook_perplexity",)

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__(config)
        if config.input_type == "values":
            self.value_embeddings: ValueEmbedding = ValueEmbedding(config.hidden_size)
        else:
            self.embed_tokens: nn.Embedding = nn.Embedding(
                config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
            )
        self.layers: nn.ModuleList = nn.ModuleList(
            LongVQLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm: nn.Module = build_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.value_embeddings if self.config.input_type == "values" else self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self, "value_embeddings" if self.config.input_type == "values" else "embed_tokens", value)

    def piece_multiple(self) -> int:
        return self.config.attention_chunk

    # ------------------------------------------------------------------------------------------------------- cache

    def _cache_layout(self) -> dict[str, object]:
        names = (
            "hidden_size",
            "value_size",
            "num_attention_heads",
            "ssm_type",
            "ssm_state_size",
            "window_size",
            "codebook_size",
        )
        return {name: getattr(self.config, name) for name in names}

    def build_cache(self) -> Cache:
        """Empty cache, which will stay of constant size."""
        layout = self._cache_layout()
        return StateCache([CodeMemoryLayer(layout, learns=not self.config.freeze_codebook) for _ in self.layers])

    def check_cache(self, cache: Cache) -> None:
        """Raises ValueError for a cache of a model with other settings or, unless traced, other codebooks."""
        check_cache(cache, CodeMemoryLayer, len(self.layers), self._cache_layout())
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not (is_traced or takes_plain_form()):
            versions: dict[Any, Any] = {layer.layer_idx: layer.mixer.quantizer.version() for layer in self.own_layers}
            check_codebooks(cache, [versions.get(index) for index in range(len(self.layers))])

    # ------------------------------------------------------------------------------------------------------ forward

    @checks_types
    @separates_documents
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        input_values: torch.Tensor | None = None,
        output_quantization: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVQModelOutput:
        """Runs over a text, or over its next tokens. In training it first applies the pending codebook update.

        Args:
            input_ids: (B, L), L >= 1, with or without a cache; or `inputs_embeds` (B, L, D).
            attention_mask: (B, past + L), 1 at real tokens; either side may be padded.
            past_key_values: cache of an earlier call; causal models only.
            use_cache: return the cache; default `config.use_cache` outside training, for causal models.
            input_values: (B, L) real numbers, instead of ids, for models with `input_type="values"`.
            output_quantization: return `commitment_loss` and `codebook_perplexity`, as in training. (Pipelines split
                every tensor of an output into the rows of the batch.)

        Raises:
            ValueError: empty input, ids outside the vocabulary, a mask of another shape, a cache of another model or of other
                codebooks.
        """
        config = self.config
        note_missing_attentions(self, kwargs)
        slot: int = kwargs.pop("codebook_slot", 0)  # type: ignore[typeddict-item] # number of the text in the step
        if slot == 0 and self.training and torch.is_grad_enabled() and not config.freeze_codebook:
            self.apply_codebook_updates()
        past_key_values = cache_of_call(self, past_key_values, use_cache, is_causal=config.is_decoder)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        read = read_inputs(
            config,
            input_ids,
            input_values,
            inputs_embeds,
            attention_mask,
            width=config.hidden_size,
            cache=past_key_values,
        )
        mask = None if read.mask is None else read.mask[:, past:]
        self.check_piece(read.length, mask)

        hidden_states = self.get_input_embeddings()(read.values) if inputs_embeds is None else inputs_embeds
        inputs_device = hidden_states.device  # layers may lie on several
        commitments, perplexities = [], []
        output_quantization = self.training or bool(output_quantization)
        measures = output_quantization or read.length > 1  # a token says nothing about its codebooks
        for layer in self.own_layers:
            hidden_states, commitment, perplexity = layer(
                hidden_states, mask, slot, measures, past_key_values=past_key_values, **kwargs
            )
            if commitment is not None:
                commitments.append(commitment.to(inputs_device))
                perplexities.append(perplexity.to(inputs_device))
        count_tokens(past_key_values, read.length)
        return LongVQModelOutput(
            last_hidden_state=self.norm(hidden_states) if self.is_last_stage else hidden_states,
            past_key_values=past_key_values,
            commitment_loss=torch.stack(commitments).mean() if output_quantization else None,
            codebook_perplexity=torch.stack(perplexities) if output_quantization else None,
        )


__all__ = ["LongVQModel", "LongVQPreTrainedModel"]
