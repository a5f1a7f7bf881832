"""Classifiers on the encoders of T5 and LongT5 with the heads of SPADE, so that only the encoders differ.

Transformers has no classifier for LongT5, and that of T5 reads the decoder. Model types `t5_encoder` and `longt5_encoder`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LongT5Config,
    LongT5EncoderModel,
    T5Config,
    T5EncoderModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_hybrid.modeling.spade.spade_layers import PairText, SpadeClassificationHead, SpadePairHead


class T5ClassifierConfig(T5Config):
    """`T5Config` with the fields of the heads of SPADE."""

    model_type = "t5_encoder"
    classifier_dropout: float = 0.1
    dual_encoder: bool = False


class LongT5ClassifierConfig(LongT5Config):
    """`LongT5Config` with the fields of the heads of SPADE."""

    model_type = "longt5_encoder"
    classifier_dropout: float = 0.1
    dual_encoder: bool = False


class _Classifier:
    """The encoder of a peer, which the class beside it brings, and a head of SPADE."""

    config: Any
    encoder: nn.Module
    shared: nn.Embedding
    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.classifier = (SpadePairHead if config.dual_encoder else SpadeClassificationHead)(config)
        self.post_init()  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and any(module is part for part in self.classifier.modules()):
            nn.init.normal_(module.weight, std=0.02)  # as SPADE
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _read(self, ids: torch.Tensor, mask: torch.Tensor) -> PairText:
        embeddings = self.shared(ids)
        states = self.encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        return PairText(embeddings, states, mask.bool())

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pair_input_ids: torch.Tensor | None = None,
        pair_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels) of texts (B, L), or of pairs with a second text (B, M); `labels` (B,)."""
        text = self._read(input_ids, attention_mask)
        if pair_input_ids is not None:
            logits = self.classifier(text, self._read(pair_input_ids, pair_attention_mask))
        else:
            weights = text.mask.to(text.output.dtype).unsqueeze(-1)
            logits = self.classifier((text.output * weights).sum(1) / weights.sum(1))
        loss = None
        if labels is not None and self.num_labels == 1:
            loss = nn.functional.mse_loss(logits.squeeze(-1).float(), labels.float())
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class T5EncoderForSequenceClassification(_Classifier, T5EncoderModel):
    """T5."""

    config_class = T5ClassifierConfig


class LongT5EncoderForSequenceClassification(_Classifier, LongT5EncoderModel):
    """LongT5."""

    config_class = LongT5ClassifierConfig


PEERS = {
    "t5": (T5ClassifierConfig, T5EncoderForSequenceClassification),
    "longt5": (LongT5ClassifierConfig, LongT5EncoderForSequenceClassification),
}
for _config, _model in PEERS.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForSequenceClassification.register(_config, _model)


def as_classifier(checkpoint: Path, folder: Path) -> Path:
    """A folder with the weights and the tokenizer of a peer, which `AutoModelForSequenceClassification` opens as its classifier.

    Raises:
        ValueError: the checkpoint is of another model type.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] not in PEERS:
        raise ValueError(f"{checkpoint} holds a {config['model_type']!r}; known are {', '.join(PEERS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors" or file.name.startswith("tokenizer"):
            shutil.copy(file, folder / file.name)
    config |= {"model_type": PEERS[config["model_type"]][0].model_type}
    config.pop("architectures", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
