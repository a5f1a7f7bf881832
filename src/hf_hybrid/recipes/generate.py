"""Generate text with a checkpoint, in batches.

The checkpoint is an encoder-decoder or a causal language model.

    python -m hf_hybrid.recipes.generate --model_name_or_path runs/summaries --input_file articles.jsonl \
        --num_beams 4 --max_new_tokens 128 --output_file summaries.jsonl
    python -m hf_hybrid.recipes.generate --model_name_or_path runs/lm --prompts "Once upon a time" --do_sample
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..data.loading import load_table
from ..data.records import counting_left_out, read_lines
from ..training.progress import shows_bars
from .finetune_summarization import TEXT_COLUMNS
from .support.finetuning_data import check_vocabulary, require_columns, require_text
from .support.main_options import MAIN_OPTIONS
from .support.models import check_decoder_table, load_config, load_model, load_tokenizer
from .support.options import BAD_RECORD_HELP, ENCODING_HELP, parse_arguments, reading_options
from .support.runs import set_up_logging

logger = logging.getLogger(__name__)


@dataclass
class GenerateArguments:
    """Model, input and output."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint (folder or Hub name)."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer. Default: that of the checkpoint."})
    prompts: list[str] | None = field(default=None, metadata={"help": "Inputs given on the command line."})
    input_file: str | None = field(
        default=None, metadata={"help": "Inputs: .txt with one per line, or a table (jsonl, csv, parquet ...)."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the inputs in a table."})
    encoding: str | None = field(default=None, metadata={"help": ENCODING_HELP})
    on_bad_record: str = field(default="error", metadata={"help": BAD_RECORD_HELP})
    source_prefix: str = field(default="", metadata={"help": "Text before every input."})
    output_file: str | None = field(
        default=None, metadata={"help": "JSON Lines file to write. Default: standard output."}
    )
    batch_size: int = field(default=8, metadata={"help": "Inputs generated together."})
    max_input_length: int | None = field(
        default=None, metadata={"help": "Tokens of an input; longer ones are truncated."}
    )
    device: str | None = field(default=None, metadata={"help": "Default: an accelerator where there is one."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a checkpoint."})


@dataclass
class DecodingArguments:
    """How to decode; unset options keep the defaults of the checkpoint."""

    max_new_tokens: int = field(default=128, metadata={"help": "Generate at most this many tokens."})
    min_new_tokens: int | None = field(default=None, metadata={"help": "Generate at least this many tokens."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams; 1 is greedy."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the most likely token."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature of sampling."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among this many of the most likely tokens."})
    top_p: float | None = field(
        default=None, metadata={"help": "Sample among the top tokens of this total probability."}
    )
    num_return_sequences: int | None = field(default=None, metadata={"help": "Outputs per input."})
    length_penalty: float | None = field(default=None, metadata={"help": "Length penalty of beam search."})
    no_repeat_ngram_size: int | None = field(default=None, metadata={"help": "Never generate an n-gram twice."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Penalty for repeated tokens."})

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        return {name: value for name, value in vars(self).items() if value is not None}


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Generate for every input.

    Args:
        args: command-line arguments, a mapping of options, or None for `sys.argv`.

    Returns:
        `generations`: a list of {"input", "outputs"}; `seconds` and `new_tokens_per_second`; `skipped_records` where they may be.

    Raises:
        ValueError: an option, the input or the checkpoint cannot be used.
        FileExistsError: the output file exists.
    """
    arguments, decoding = parse_arguments(
        (GenerateArguments, DecodingArguments), args, __doc__, MAIN_OPTIONS["generate"]
    )
    set_up_logging()
    output = None if arguments.output_file is None else Path(arguments.output_file)
    if output is not None and output.exists():
        raise FileExistsError(f"`output_file` {output} exists. Choose another name or remove it.")
    with counting_left_out() as left_out:
        inputs = read_inputs(arguments)
    tokenizer = load_tokenizer(
        arguments.tokenizer or arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code
    )
    model = load_generator(arguments, decoding)
    check_vocabulary(model, tokenizer)
    set_seed(arguments.seed)
    start, count, generations = time.perf_counter(), 0, []
    batches = range(0, len(inputs), arguments.batch_size)
    for first in tqdm(batches, desc="generate", unit="batch", disable=len(batches) < 2 or not shows_bars()):
        texts = inputs[first : first + arguments.batch_size]
        for text, outputs, tokens in generate_batch(model, tokenizer, texts, arguments, decoding):
            generations.append({"input": text, "outputs": outputs})
            count += tokens
    seconds = time.perf_counter() - start
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in generations)
    if output is None:
        sys.stdout.write(lines)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(lines, encoding="utf-8")
    result = {"generations": generations, "seconds": seconds, "new_tokens_per_second": count / seconds}
    return result | ({"skipped_records": len(left_out)} if arguments.on_bad_record == "skip" else {})


def read_inputs(arguments: GenerateArguments) -> list[str]:
    """All inputs, prefix included.

    Raises:
        ValueError: there are no inputs, or two sources of them, or a column is missing.
    """
    if arguments.batch_size < 1:
        raise ValueError(f"`batch_size` must be positive; got {arguments.batch_size}.")
    if (arguments.prompts is None) == (arguments.input_file is None):
        raise ValueError("Pass the inputs either as `prompts` or as `input_file`.")
    if arguments.prompts is not None:
        texts = list(arguments.prompts)
    elif arguments.input_file is not None and arguments.input_file.endswith(".txt"):
        path = Path(arguments.input_file)
        if not path.is_file():
            raise ValueError(f"No such file: {path}.")
        lines = read_lines(path, **reading_options(arguments))
        texts = [line.rstrip("\r") for _, line in lines if line.strip()]
    else:
        rows: Any = load_table(arguments.input_file or "", **reading_options(arguments))
        column = arguments.text_column or next((name for name in TEXT_COLUMNS if name in rows.column_names), None)
        if column is None:
            raise ValueError(f"Name the column of the inputs with `text_column`: {', '.join(rows.column_names)}.")
        require_columns(rows, [column], "input file")
        require_text(rows, [column], "input file")
        texts = list(rows[column])
    if not texts:
        raise ValueError("There is no input to generate from.")
    return [arguments.source_prefix + text for text in texts]


def load_generator(arguments: GenerateArguments, decoding: DecodingArguments) -> PreTrainedModel:
    """The model on its device, ready to generate.

    Raises:
        ValueError: the checkpoint cannot be loaded, or its decoder has too few positions.
    """
    config = load_config(arguments.model_name_or_path, {}, trust_remote_code=arguments.trust_remote_code)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    check_decoder_table(config, decoding.max_new_tokens, "Generated texts", "max_new_tokens")
    options = {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
    model: Any = load_model(auto_class, arguments.model_name_or_path, **options)
    model.generation_config.max_length = None  # `max_new_tokens` is always given; beside both, Transformers warns
    return model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    arguments: GenerateArguments,
    decoding: DecodingArguments,
) -> Iterator[tuple[str, list[str], int]]:
    """Input, outputs and number of new tokens for each text."""
    is_causal = not model.config.is_encoder_decoder
    encoded = tokenizer(
        list(texts),
        return_tensors="pt",
        padding=True,
        padding_side="left" if is_causal else "right",
        truncation=arguments.max_input_length is not None,
        max_length=arguments.max_input_length,
        return_token_type_ids=False,
        # A causal model continues the prompt: no end-of-sequence token after it.
        add_special_tokens=not is_causal,
    ).to(model.device)
    with torch.inference_mode():
        ids = model.generate(**encoded, **decoding.options())
    new = ids[:, encoded["input_ids"].shape[1] :] if is_causal else ids[:, 1:]
    outputs = tokenizer.batch_decode(new, skip_special_tokens=True)
    pad = model.generation_config.pad_token_id
    lengths = (new != (-1 if pad is None else pad)).sum(dim=1).tolist()
    each = len(outputs) // len(texts)
    for number, text in enumerate(texts):
        rows = slice(number * each, (number + 1) * each)
        yield text, [output.strip() for output in outputs[rows]], sum(lengths[rows])


if __name__ == "__main__":
    main()
