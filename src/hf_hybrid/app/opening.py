"""The checkpoints that a page has open: each is loaded once, however many people use it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from ..auto import ARCHITECTURES, find_architecture
from ..recipes.support.finetuning_data import check_vocabulary
from ..recipes.support.models import load_config, load_model, load_tokenizer
from ..training.activations import has_routers

# What a head does with a text; any other head only reads.
_TASKS = {
    "AutoModelForSeq2SeqLM": "rewrite",
    "AutoModelForCausalLM": "continue",
    "AutoModelForMaskedLM": "guess",
}


@dataclass
class OpenCheckpoint:
    """A model that is ready to use.

    Attributes:
        name: folder or Hub name.
        model: model in evaluation mode, on its device.
        tokenizer: its tokenizer; None for models of images and sounds.
        task: "rewrite" (encoder-decoder), "continue" (causal model), "guess" (masked words), or "read" (other heads).
        lock: to be held while the model computes: kept kernels, hooks and random numbers belong to one call at a time.
    """

    name: str
    model: Any
    tokenizer: Any
    task: str
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def reads_text(self) -> bool:
        return self.tokenizer is not None

    @property
    def has_routers(self) -> bool:
        return has_routers(self.model)

    @property
    def depth(self) -> int:
        """Number of layers of the stack that has routers, or of the encoder."""
        return int(getattr(self.model.config, "num_hidden_layers", 0))

    def describe(self) -> str:
        """What it is, in a line."""
        config = self.model.config
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        width = getattr(config, "hidden_size", None)
        size = f"{self.depth} layers of width {width}" if width else f"{self.depth} layers"
        return f"{self.name}: {type(self.model).__name__}, {millions:.1f} M parameters, {size}, on {self.model.device}"

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> Any:
        """Token ids and mask of a text, on the device of the model.

        Args:
            text: a text.
            add_special_tokens: whether the end of the text is marked.
            max_tokens: largest number of tokens that the caller accepts; None: only the limit of the model.

        Raises:
            ValueError: there is no text, it is too long, or the model reads no text.
        """
        if self.tokenizer is None:
            raise ValueError(f"{type(self.model).__name__} reads images or sounds, not text.")
        if not text.strip():
            raise ValueError("There is no text yet: type or paste one.")
        encoded = self.tokenizer(
            text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=add_special_tokens
        )
        limits = (max_tokens, getattr(self.model.config, "max_source_length", lambda: None)())
        limit = min((size for size in limits if size is not None), default=None)
        length = encoded["input_ids"].shape[1]
        if limit is not None and length > limit:
            raise ValueError(f"The text has {length:,} tokens, but at most {limit:,} are accepted here: shorten it.")
        return encoded.to(self.model.device)


def open_checkpoint(name: str, *, trust_remote_code: bool = False, device: str | None = None) -> OpenCheckpoint:
    """Loads a checkpoint with the head that its configuration names.

    Args:
        name: folder or Hub name.
        trust_remote_code: run model code that comes with a checkpoint of an unknown architecture.
        device: device to compute on; None: an accelerator where there is one.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it is not one of this library.
    """
    name = name.strip()
    if not name:
        raise ValueError("There is no checkpoint: type the name of a folder, or of a model on the Hub.")
    if find_architecture(name) is not None and not Path(name).exists():
        raise ValueError(
            f"{name} is an architecture, not a checkpoint: type the name of a folder, or of a model on the Hub."
        )
    config = load_config(name, {}, trust_remote_code=trust_remote_code)
    auto_name = _auto_class_of(config, name, trust_remote_code)
    auto_class = getattr(transformers, auto_name)
    model: Any = load_model(auto_class, name, trust_remote_code=trust_remote_code)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.max_length = None  # the page gives `max_new_tokens`; beside both, Transformers warns
    tokenizer = None
    if getattr(config, "input_type", "tokens") == "tokens":
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        check_vocabulary(model, tokenizer)
    return OpenCheckpoint(name, model, tokenizer, _TASKS.get(auto_name, "read"))


def _auto_class_of(config: PreTrainedConfig, name: str, trusts_code: bool) -> str:
    """Name of the Auto class that opens a checkpoint.

    Raises:
        ValueError: its architecture or its head is not known.
    """
    head = (config.architectures or [""])[0]
    architecture = find_architecture(config.model_type)
    heads = None if architecture is None else architecture.heads
    if heads is None and trusts_code:
        code = getattr(config, "auto_map", None) or {}
        heads = {auto: target.rpartition(".")[2] for auto, target in code.items() if auto.startswith("AutoModel")}
    if not heads:
        accepted = ", ".join(item.model_type for item in ARCHITECTURES)
        raise ValueError(
            f"{name} holds a model of the type {config.model_type!r}; accepted are {accepted}, and with "
            "`trust_remote_code` models that come with their code."
        )
    found = next((auto for auto, class_name in heads.items() if class_name == head), None)
    if found is None:
        raise ValueError(f"config.json of {name} names the class {head!r}; accepted are {', '.join(heads.values())}.")
    return found


class Shelf:
    """Open checkpoints by name; the one that was not used for longest makes room for a new one.

    Args:
        size: number of checkpoints to keep in memory.
        trust_remote_code, device: as in `open_checkpoint`.
    """

    def __init__(self, size: int = 2, *, trust_remote_code: bool = False, device: str | None = None) -> None:
        self.size = size
        self.options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "device": device}
        self.opened: OrderedDict[str, OpenCheckpoint] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, name: str) -> OpenCheckpoint:
        """The checkpoint of this name, loaded if it is not open; errors as in `open_checkpoint`."""
        with self.lock:
            if name not in self.opened:
                self.opened[name] = open_checkpoint(name, **self.options)
            self.opened.move_to_end(name)
            while len(self.opened) > self.size:
                self.opened.popitem(last=False)
            return self.opened[name]
