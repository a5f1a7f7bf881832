"""Show where a SeqBoat model attends: which tokens its layers activate, how much of a text, and how far they look.

    python -m hf_hybrid.recipes.inspect_activations --model_name_or_path runs/lm --prompts "To be, or not to be" \
        --output_dir runs/lm-activations
    python -m hf_hybrid.recipes.inspect_activations --model_name_or_path runs/lm --input_file texts.txt --output_dir …

Written are `activations.json` and `activations.csv` (one row per layer, padding left out), `activations.png`, and
`text_0.png`, ...: layers by tokens for the first texts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel

from ..training.activations import activation_statistics, has_routers, write_activation_statistics
from ..viz import activation_map, plot_activations
from .common import load_model, load_tokenizer, parse_arguments, set_up_logging
from .finetuning_data import check_vocabulary
from .generate import GenerateArguments, read_inputs

logger = logging.getLogger(__name__)


@dataclass
class InspectArguments:
    """Model, texts and output."""

    model_name_or_path: str = field(metadata={"help": "SeqBoat checkpoint (folder or Hub name)."})
    output_dir: str = field(metadata={"help": "Folder to write; it must not exist or be empty."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer. Default: that of the checkpoint."})
    prompts: list[str] | None = field(default=None, metadata={"help": "Texts given as words of the command line."})
    input_file: str | None = field(
        default=None, metadata={"help": "Texts: .txt with one per line, or a table (jsonl, csv, parquet ...)."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts in a table."})
    batch_size: int = field(default=4, metadata={"help": "Texts read together."})
    max_length: int = field(default=4096, metadata={"help": "Tokens of a text; longer ones are cut."})
    max_texts: int = field(default=100, metadata={"help": "Texts that the statistics are made of."})
    pictures: int = field(default=3, metadata={"help": "Texts drawn, the first ones."})
    max_drawn_tokens: int = field(default=256, metadata={"help": "Tokens of a text that are drawn."})
    device: str | None = field(default=None, metadata={"help": "Default: an accelerator where there is one."})


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `--help` for the options.

    Args:
        args: command line words, a mapping of options, or None for the words of this process.

    Returns:
        `layers`: the statistics of each layer; `mean_rate`; `pictures`: the files drawn.

    Raises:
        ValueError: an option, the texts or the checkpoint cannot be used, or the model has no routers.
        FileExistsError: the output folder is not empty.
    """
    (options,) = parse_arguments((InspectArguments,), args, __doc__)
    set_up_logging()
    output = Path(options.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"`output_dir` {output} exists and is not an empty folder. Choose a new one, or empty it."
        )
    names = ("model_name_or_path", "prompts", "input_file", "text_column", "batch_size")
    texts = read_inputs(GenerateArguments(**{name: getattr(options, name) for name in names}))[: options.max_texts]
    tokenizer = load_tokenizer(options.tokenizer or options.model_name_or_path)
    model: Any = load_model(AutoModel, options.model_name_or_path)
    model = model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    if not has_routers(model):
        raise ValueError(
            f"{options.model_name_or_path} is a {model.config.model_type} model: only those of SeqBoat have layers that activate some "
            "tokens and not others."
        )
    check_vocabulary(model, tokenizer)
    batches = [texts[start : start + options.batch_size] for start in range(0, len(texts), options.batch_size)]
    encoded = (
        {
            name: value
            for name, value in tokenizer(
                batch, return_tensors="pt", padding=True, truncation=True, max_length=options.max_length
            ).items()
            if name in ("input_ids", "attention_mask")
        }
        for batch in tqdm(batches, desc="activations", unit="batch", disable=len(batches) < 2)
    )
    layers = activation_statistics(model, encoded, max_sequences=options.max_texts)
    output.mkdir(parents=True, exist_ok=True)
    for suffix in ("json", "csv"):
        write_activation_statistics(layers, output / f"activations.{suffix}")
    pictures = [plot_activations({Path(options.model_name_or_path).name: layers}, output / "activations.png")]
    for number, text in enumerate(texts[: options.pictures]):
        path = output / f"text_{number}.png"
        activation_map(model, tokenizer, text, path, max_tokens=options.max_drawn_tokens)
        pictures.append(path)
    for layer in layers:
        state = " (dead)" if layer.is_dead else " (always on)" if layer.is_always_on else ""
        logger.info("layer %d: %.1f %% active, span %.1f tokens%s", layer.layer, 100 * layer.rate, layer.span, state)
    mean_rate = sum(layer.rate for layer in layers) / len(layers)
    return {"layers": [asdict(layer) for layer in layers], "mean_rate": mean_rate, "pictures": pictures}


if __name__ == "__main__":
    main()
