"""Low-rank adapters (LoRA, arXiv 2106.09685) with the library `peft`: modules to adapt, saving and loading.

An adapter folder holds what PEFT writes (`adapter_config.json`, `adapter_model.safetensors`) and two more files: the
configuration of the adapted model, whose labels may differ from those of the base checkpoint, and its generation
settings.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..auto import find_architecture
from ..remote_code import check_export
from .run_folder import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, check_checkpoint

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTED_CONFIG_FILE = "adapted_config.json"

# Auto class -> task type of PEFT; heads without a task type in PEFT get its general model.
TASK_TYPES = {
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def require_peft() -> None:
    """Checks that PEFT is installed.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError('Adapters need the library peft: pip install "hf_hybrid[peft]".') from error


def lora_target_modules(model: PreTrainedModel | PreTrainedConfig) -> list[str] | str:
    """Names of the linear maps that LoRA adapts.

    Args:
        model: model (gives the names that occur in it) or configuration (gives all names of the architecture).

    Returns:
        A list for `LoraConfig(target_modules=...)`; "all-linear" for architectures of other libraries.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    architecture = find_architecture(config.model_type)
    if architecture is None:
        return "all-linear"
    if isinstance(model, PreTrainedConfig):
        return list(architecture.lora_targets)
    there = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name in architecture.lora_targets if name in there]


def state_modules(model: PreTrainedModel | PreTrainedConfig) -> list[str]:
    """Names of the recurrent parts (state space layers, moving averages), for `modules_to_save`.

    Low-rank updates cannot train them: they are not linear maps.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    architecture = find_architecture(config.model_type)
    return [] if architecture is None else list(architecture.state_modules)


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that a task adds to the backbone, trained in full; none for language and bare models.

    A pooler inside the backbone is one of them: it is not part of pretraining.
    """
    prefix = model.base_model_prefix
    if model.can_generate() or model.get_output_embeddings() is not None or not hasattr(model, prefix):
        return []
    heads = sorted({name.partition(".")[0] for name, _ in model.named_parameters()} - {prefix})
    poolers = {name for name, _ in model.named_modules() if name.rpartition(".")[2] == "pooler"}
    return heads + sorted(poolers)


def _modules_with_statistics(model: PreTrainedModel) -> list[str]:
    """Batch normalisations and codebooks, which training changes without gradients; saved with the adapter."""
    architecture = find_architecture(model.config.model_type)
    named = () if architecture is None else architecture.statistics_modules
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.modules.batchnorm._BatchNorm) or name.rpartition(".")[2] in named)
        and not getattr(module, "frozen", False)
    ]


def lora_task_type(model: PreTrainedModel) -> str | None:
    """Task type of PEFT for the head of a model; None if there is none."""
    from transformers.models.auto import modeling_auto

    for auto_name, task_type in TASK_TYPES.items():
        classes = getattr(modeling_auto, auto_name)._model_mapping.get(type(model.config), ())
        if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            return task_type
    return None


def add_lora(
    model: PreTrainedModel,
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    modules_to_save: Sequence[str] = (),
    untrained: Iterable[str] = (),
) -> PeftModel:
    """Freezes a model and adds trainable low-rank updates to its linear maps; the outputs are unchanged at first.

    Args:
        model: a pretrained model, which is changed in place. Its head is trained in full.
        rank: rank r of the updates.
        alpha: scale of the updates, which are multiplied by alpha / r; default 2 r.
        dropout: dropout probability of the inputs of the updates.
        target_modules: names of linear maps; default `lora_target_modules`.
        modules_to_save: names of further modules that are trained in full, e.g. `state_modules(model)`.
        untrained: names of parameters that the checkpoint does not contain.

    Raises:
        ValueError: a value is out of range, a name does not occur, or untrained parameters would stay frozen.
        ImportError: PEFT is not installed.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    check_lora_options(rank, alpha, dropout)
    targets = lora_target_modules(model) if target_modules is None else list(target_modules)
    _check_rank(model, rank, targets)
    names = [name for name, _ in model.named_modules()]
    for option, wanted in (("target_modules", targets), ("modules_to_save", modules_to_save)):
        for name in [] if isinstance(wanted, str) else wanted:
            if not any(_is_named(module, name) for module in names):
                raise ValueError(
                    f"`{option}` names {name!r}, but {type(model).__name__} has no such module. Linear maps: "
                    f"{', '.join(lora_target_modules(model.config))}; recurrent parts: {', '.join(state_modules(model))}."
                )
    in_full = list(dict.fromkeys([*head_modules(model), *_modules_with_statistics(model), *modules_to_save]))
    frozen = sorted(key for key in untrained if not any(_is_inside(key, name) for name in in_full))
    if frozen:
        raise ValueError(
            f"The checkpoint has no weights for {len(frozen)} tensors of {type(model).__name__} ({', '.join(frozen[:3])} ...); "
            "LoRA would freeze them at random values. Start from a checkpoint that contains them, or fine-tune in "
            "full (without `lora_rank`)."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=in_full or None,
        task_type=lora_task_type(model),  # type: ignore[arg-type]
    )
    return get_peft_model(model, config)  # type: ignore[return-value]


def check_lora_options(rank: int, alpha: float | None, dropout: float) -> None:
    """Rejects values out of range.

    Raises:
        ValueError: a value is out of range; the message names the option.
    """
    if rank < 1:
        raise ValueError(f"`lora_rank` must be positive; got {rank}. Usual ranks are 4 to 64.")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"`lora_alpha` must be positive; got {alpha}. Leave it out for twice the rank.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`lora_dropout` must be at least 0 and below 1; got {dropout}.")


def _check_rank(model: PreTrainedModel, rank: int, targets: str | Sequence[str]) -> None:
    """Refuses a rank above that of every map to adapt, before its updates are allocated."""
    ranks = [
        min(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (isinstance(targets, str) or any(_is_named(name, end) for end in targets))
    ]
    if ranks and rank > max(ranks):
        raise ValueError(
            f"`lora_rank` is {rank}, but no linear map to adapt has a rank above {max(ranks)}: usual ranks are 4 to 64, and training in "
            "full is without `lora_rank`."
        )


def _is_named(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _is_inside(parameter: str, name: str) -> bool:
    return f".{name}." in f".{parameter}"


# ------------------------------------------------------------------------------------------------ saving and loading


def is_adapted(model: Any) -> bool:
    """Whether a model is wrapped by PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: Any) -> PreTrainedModel:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model


def save_adapted_config(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes the configuration and generation settings of an adapted model next to its adapter.

    The configuration is not called `config.json`, because `from_pretrained` would then expect the whole model in the
    folder.
    """
    inner = base_model(model)
    config = copy.deepcopy(inner.config)
    config.architectures = [type(inner).__name__]
    config.to_json_file(os.path.join(folder, ADAPTED_CONFIG_FILE))
    if inner.can_generate():
        inner.generation_config.save_pretrained(folder)  # type: ignore[union-attr]


def adapter_folder(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The local folder of an adapter, downloaded if given as a Hub name; None if this is not an adapter."""
    if os.path.isdir(name_or_path):
        return Path(name_or_path) if (Path(name_or_path) / ADAPTER_CONFIG_FILE).is_file() else None
    from transformers.utils import is_peft_available
    from transformers.utils.peft_utils import find_adapter_config_file

    if not is_peft_available():
        return None
    try:
        found = find_adapter_config_file(str(name_or_path))
    except (OSError, ValueError):
        return None
    if found is None:
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name_or_path)))


def adapted_config(folder: Path) -> PreTrainedConfig:
    """Configuration of the adapted model: the one saved with the adapter, else that of the base checkpoint.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = folder / ADAPTED_CONFIG_FILE
    if not path.is_file():
        return config_below(folder)
    try:
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"The file {path} is corrupt: {error}. Copy it again.") from error


def base_name(folder: Path) -> str:
    """Name or path of the base checkpoint of an adapter.

    Raises:
        ValueError: the adapter does not name it.
    """
    path = folder / ADAPTER_CONFIG_FILE
    name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{path} does not name the base checkpoint: add it as `base_model_name_or_path`.")
    return name


def config_below(folder: Path) -> PreTrainedConfig:
    """Configuration of the base checkpoint of an adapter.

    Raises:
        ValueError: the checkpoint cannot be loaded.
    """
    name = base_name(folder)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The adapter {folder} belongs to the checkpoint {name!r}, which cannot be loaded ({error}). Restore it, "
            "run from the folder in which the adapter was trained, or write its new path into "
            f"{folder / ADAPTER_CONFIG_FILE} (`base_model_name_or_path`)."
        ) from error


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike[str], *, is_trainable: bool = False) -> PeftModel:
    """Attaches a saved adapter to its base model.

    Args:
        model: the base checkpoint, loaded with the same head; changed in place.
        folder: folder of the adapter.
        is_trainable: whether its weights get gradients.

    Raises:
        ValueError: the folder is damaged, or the adapter was trained for another model.
        ImportError: PEFT is not installed.
    """
    require_peft()
    from peft import PeftModel

    check_checkpoint(folder)
    path = Path(folder) / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not an adapter: {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE} are expected.")
    problems = _misfits(model, _tensor_shapes(path))
    if problems:
        raise ValueError(
            f"The adapter {folder} was made for another model than this {type(model).__name__}: {problems[0]}"
            + (f" ({len(problems)} tensors do not fit)" if len(problems) > 1 else "")
            + ". Load the checkpoint that `base_model_name_or_path` in its adapter_config.json names, with the same head."
        )
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _misfits(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Parts of an adapter without a counterpart in a model, one phrase each."""
    modules, tensors = dict(model.named_modules()), model.state_dict()
    problems = []
    for key, shape in shapes.items():
        name = key.removeprefix("base_model.model.")
        module_name, is_lora, rest = name.partition(".lora_")
        if not is_lora:
            if name not in tensors:
                problems.append(f"it holds {name}, which the model does not have")
            elif tuple(tensors[name].shape) != shape:
                problems.append(f"it holds {name} of shape {shape}, but the model has {tuple(tensors[name].shape)}")
            continue
        module = modules.get(module_name)
        if module is None:
            problems.append(f"it adapts {module_name}, which the model does not have")
        elif isinstance(module, nn.Linear):
            side, have = (shape[1], module.in_features) if rest.startswith("A") else (shape[0], module.out_features)
            if side != have:
                what = "inputs" if rest.startswith("A") else "outputs"
                problems.append(f"{module_name} has {have} {what}, but the adapter expects {side}")
    return problems


def load_adapted_model(auto_class: Any, name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """The base checkpoint of an adapter with the adapter merged into it: an ordinary model.

    Args:
        auto_class: Auto class of the head.
        name_or_path: folder of the adapter, or its Hub name.
        kwargs: arguments of `from_pretrained`, including fields of the configuration.

    Raises:
        ValueError: this is not an adapter, a file is missing or damaged, or the adapter was trained for another model.
        ImportError: PEFT is not installed.
    """
    require_peft()
    folder = adapter_folder(name_or_path)
    if folder is None:
        raise ValueError(f"{str(name_or_path)!r} is not an adapter: it has no {ADAPTER_CONFIG_FILE}.")
    check_export(folder)
    check_checkpoint(folder)
    name = base_name(folder)
    check_export(name)
    config, below = adapted_config(folder), config_below(folder)
    if os.path.isdir(name):
        check_checkpoint(name)
    if below.model_type != config.model_type:
        raise ValueError(
            f"The adapter {folder} was made for another model: for a {config.model_type}, but {name!r} holds a "
            f"{below.model_type}."
        )
    for field in [field for field in kwargs if field != "dtype" and hasattr(config, field)]:
        setattr(config, field, kwargs.pop(field))
    try:
        model = auto_class.from_pretrained(name, config=config, **kwargs)
    except RuntimeError as error:
        raise ValueError(
            f"The adapter {folder} was made for another model than {name!r} holds, with other sizes: {error}"
        ) from error
    merged: Any = load_adapter(model, folder).merge_and_unload()
    if merged.can_generate() and (folder / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(str(folder))
    return merged


def architecture_auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that loads the model class a configuration names.

    Raises:
        ValueError: no Auto class loads it.
    """
    from transformers.models.auto import modeling_auto

    wanted = config.architectures[0] if config.architectures else None
    for name in sorted(name for name in vars(modeling_auto) if name.startswith("AutoModel")):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        classes = mapping.get(type(config), ()) if mapping is not None else ()
        if wanted in [found.__name__ for found in (classes if isinstance(classes, tuple) else (classes,))]:
            return getattr(modeling_auto, name)
    raise ValueError(f"No Auto class loads {wanted!r} for the model type {config.model_type!r}.")


def check_resumable(model: Any, checkpoint: Path) -> None:
    """Rejects resuming from a checkpoint whose adapter is not that of the run.

    Raises:
        ValueError: only one of them has an adapter, or their adapters differ in rank or targets.
    """
    saved = (checkpoint / ADAPTER_CONFIG_FILE).is_file()
    if saved != is_adapted(model):
        there, here = ("an adapter", "without") if saved else ("a whole model", "with")
        raise ValueError(
            f"{checkpoint} holds {there}, but this run is {here} `lora_rank`: resume with the same options."
        )
    if not saved:
        return
    from peft import get_peft_model_state_dict

    expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    found = _tensor_shapes(checkpoint / ADAPTER_WEIGHTS_FILE)
    if expected != found:
        name = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise ValueError(
            f"{checkpoint} holds another adapter than this run trains: {name} has the shape {found.get(name)} there and "
            f"{expected.get(name)} here. Resume with the same `lora_rank`, `lora_targets` and `lora_modules_to_save`."
        )
