"""Random calls of `generate`, right and wrong ones, and what they must end with.

A call is a small record without tensors, so that hypothesis prints it and `check_generation(Generation(...))` replays it.
"""

from __future__ import annotations

import copy
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from factories import GENERATIVE_HEADS, VOCABULARY, Case, random_ids
from fuzz_calls import cases_of, models_of
from fuzz_oracle import check_documented
from fuzz_values import FAULTS, MASKS, random_mask, spoil_tensor, wrong_cache, wrong_encoder_outputs
from hypothesis import strategies as st
from transformers import set_seed
from transformers.modeling_outputs import BaseModelOutput

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "beam": {"num_beams": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "assistant": {},  # by a model of the same kind
}
SPECULATIVE = ("lookup", "assistant")  # tries several tokens and takes some back
# Options that change scores; those of a second tuple count what stands in the prompt, padding included.
PROCESSORS: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (1, 2, 3),
    "bad_words_ids": ([[5]], [[6, 7], [8]]),
    "min_new_tokens": (0, 3, 20),
    "suppress_tokens": ([4, 5, 6],),
    "begin_suppress_tokens": ([3, 4],),
    "forced_bos_token_id": (4,),
    "forced_eos_token_id": (1, [1, 2]),
    "exponential_decay_length_penalty": ((2, 1.2),),
    "sequence_bias": ([[[5], 2.0], [[6, 7], -3.0]],),
    "renormalize_logits": (True,),
    "remove_invalid_values": (True,),
    "repetition_penalty": (0.7, 1.5),
    "encoder_repetition_penalty": (1.5,),
    "encoder_no_repeat_ngram_size": (2,),
    "guidance_scale": (1.5,),
    "min_length": (0, 7),
}
OF_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (0.3, 2.0),
    "top_k": (1, 5, 1000),
    "top_p": (0.3, 1.0),
    "min_p": (0.1,),
    "typical_p": (0.5,),
    "epsilon_cutoff": (0.02,),
    "eta_cutoff": (0.02,),
}
OF_BEAMS: dict[str, tuple[Any, ...]] = {"length_penalty": (-1.0, 0.0, 2.0), "early_stopping": (True, False, "never")}
OF_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_hidden_states", "output_attentions")
EMPTY = ("no_tokens", "one_row_empty")  # masks with rows of nothing but padding, whose text means nothing
NUMBERS = (0, -1, None)
# Wrong values by argument; of all others they are tensors. Where Transformers does not look at the type of an option, neither do these.
WRONG: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": NUMBERS,
    "max_length": (*NUMBERS, 2, 10**9),
    "num_beams": (0, -1),
    "num_return_sequences": (0, -1, 7),
    "prefill_chunk_size": NUMBERS,
    "cache_implementation": ("quantized", "offloaded", "paged", "nonsense", "dynamic"),
    "use_cache": ("no", 7, None),
    "pad_token_id": (None, -1, VOCABULARY),
    "eos_token_id": (-1, VOCABULARY, [1, VOCABULARY]),
    "bos_token_id": (None, VOCABULARY),
    "decoder_start_token_id": (None, VOCABULARY, -1),
    "return_dict_in_generate": (None,),
}
TENSORS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "token_type_ids",
)


@dataclass(frozen=True)
class Generation:
    """A call of `generate`, with everything that it is made of.

    Attributes:
        model_type, head, variant: of a `Case`.
        batch: rows.
        prompt: tokens of the prompt, or of the target of an encoder-decoder; 0 for none.
        source: tokens of the source of an encoder-decoder.
        seed: of all random numbers.
        mask, source_mask: kind of padding, one of `MASKS`.
        inputs: "ids", "embeds", or "encoder_outputs" (of an encoder-decoder).
        strategy: one of `STRATEGIES`.
        new_tokens: `max_new_tokens`.
        ends: `eos_token_id`.
        options: further arguments.
        faults: arguments that are replaced by something wrong, and by what.
    """

    model_type: str
    head: str
    variant: str
    batch: int
    prompt: int
    source: int
    seed: int
    mask: str = "none"
    source_mask: str = "none"
    inputs: str = "ids"
    strategy: str = "greedy"
    new_tokens: int = 5
    ends: int | tuple[int, ...] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    faults: tuple[tuple[str, Any], ...] = ()

    @property
    def case(self) -> Case:
        return Case(self.model_type, self.head, self.variant)

    @property
    def is_ordinary(self) -> bool:
        """Whether nothing about it may be refused."""
        is_padded = self.mask in ("right", "both", "gaps") or (self.mask in EMPTY and self.case.is_seq2seq)
        return not (self.faults or is_padded or self.strategy in SPECULATIVE or "guidance_scale" in dict(self.options))


@st.composite
def generations(draw: st.DrawFn, model_type: str) -> Generation:
    """Calls of `generate` of an architecture: two thirds of them without a deliberate fault."""
    case = draw(st.sampled_from([case for case in cases_of(model_type) if case.auto_name in GENERATIVE_HEADS]))
    strategy = draw(st.sampled_from((*STRATEGIES, "greedy", "greedy")))
    allowed = dict(PROCESSORS)
    if "sample" in strategy:
        allowed |= OF_SAMPLING
    if "beam" in strategy:
        allowed |= OF_BEAMS
    names = draw(st.lists(st.sampled_from(sorted(allowed)), max_size=2, unique=True))
    options = {name: draw(st.sampled_from(allowed[name])) for name in names}
    ends = draw(st.sampled_from((None, 1, (1, 5, 9))))
    if ends is None:
        options.pop("exponential_decay_length_penalty", None)  # which needs an end
    for name in OF_OUTPUTS:
        if draw(st.integers(0, 3)) == 0:
            options[name] = True
    faults = []
    if draw(st.integers(0, 2)) == 0:
        name = draw(st.sampled_from((*TENSORS, *WRONG, "past_key_values", "encoder_outputs")))
        faults.append((name, draw(st.sampled_from(WRONG.get(name) or FAULTS.get(name, FAULTS["tensor"])))))
    return Generation(
        model_type,
        case.auto_name,
        case.variant,
        batch=draw(st.integers(1, 3)),
        prompt=draw(st.sampled_from((0, 1, 2, 4, 5, 9, 13, 18))),
        source=draw(st.sampled_from((1, 2, 5, 9, 12))),
        seed=draw(st.integers(0, 10**6)),
        mask=draw(st.sampled_from((*MASKS, "left", "left"))),
        source_mask=draw(st.sampled_from(MASKS)),
        inputs=draw(st.sampled_from(("ids", "ids", "embeds", "encoder_outputs")[: 4 if case.is_seq2seq else 3])),
        strategy=strategy,
        new_tokens=draw(st.sampled_from((1, 2, 5, 8, 11))),
        ends=ends,
        options=tuple(options.items()),
        faults=tuple(faults),
    )


# ----------------------------------------------------------------------------------------------- from a record to arguments


def inputs_of(call: Generation) -> dict[str, Any]:
    """The tensors of a call, floating numbers in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(call.seed)
        given = _source(call) if call.case.is_seq2seq else _text(call, "", call.prompt, call.mask)
        if call.case.is_seq2seq and call.prompt:
            given |= _text(call, "decoder_", call.prompt, call.mask)
            if call.seed % 2:  # else `generate` puts the start token in front
                given["decoder_input_ids"][:, 0] = call.case.config().decoder_start_token_id
        return given


def _text(call: Generation, prefix: str, length: int, kind: str) -> dict[str, Any]:
    """Ids or embeddings with their mask; nothing for a text of no tokens, which `generate` begins itself."""
    if length == 0:
        return {}
    ids, mask = random_ids(call.batch, length), random_mask(kind, call.batch, length)
    given: dict[str, Any] = {f"{prefix}input_ids": ids}
    if call.inputs == "embeds" and not prefix:
        with torch.no_grad():
            given = {"inputs_embeds": models_of(call.case)[torch.float64].get_input_embeddings()(ids)}
    if getattr(call.case.config(), "add_token_type_embeddings", False) and not prefix and call.seed % 3:
        given["token_type_ids"] = torch.randint(2, ids.shape)
    return given if mask is None else given | {f"{prefix}attention_mask": mask}


def _source(call: Generation) -> dict[str, Any]:
    given = _text(call, "", call.source, call.source_mask)
    if call.inputs == "encoder_outputs":
        mask = given.get("attention_mask")
        with torch.no_grad():
            states = models_of(call.case)[torch.float64].get_encoder()(given["input_ids"], attention_mask=mask)
        given = {"encoder_outputs": BaseModelOutput(states.last_hidden_state)}
        given |= {} if mask is None else {"attention_mask": mask}
    return given


def options_of(call: Generation) -> dict[str, Any]:
    """The settings of a call."""
    ends = list(call.ends) if isinstance(call.ends, tuple) else call.ends
    options = {"max_new_tokens": call.new_tokens, "eos_token_id": ends, "pad_token_id": 0, "bos_token_id": 2}
    options |= copy.deepcopy(STRATEGIES[call.strategy] | dict(call.options))
    if call.strategy == "assistant":
        options["assistant_model"] = copy.deepcopy(models_of(call.case)[torch.float64])
    return options


def spoil(call: Generation, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the faults of the call."""
    arguments = dict(arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(call.seed + 1)
        for name, kind in call.faults:
            if name in WRONG:
                arguments[name] = kind
            elif name == "past_key_values":
                arguments[name] = wrong_cache(kind, *_caches(call)) if kind != "none" else None
            elif name == "encoder_outputs":
                states = torch.randn(call.batch, call.source, call.case.config().hidden_size, dtype=torch.float64)
                arguments[name] = wrong_encoder_outputs(kind, states)
            else:
                arguments[name] = spoil_tensor(_sound(call, arguments, name), kind)
    return arguments


def _sound(call: Generation, arguments: dict[str, Any], name: str) -> torch.Tensor:
    """The argument of the call, or one that could be."""
    if name in arguments:
        return arguments[name]
    length = call.source if call.case.is_seq2seq and not name.startswith("decoder_") else max(call.prompt, 1)
    if name.endswith("embeds"):
        return torch.randn(call.batch, length, call.case.config().hidden_size, dtype=torch.float64)
    return torch.ones(call.batch, length, dtype=torch.long)


def _caches(call: Generation) -> tuple[Any, Any]:
    """An empty cache of the model, and one that a batch with another row has filled."""
    model = models_of(call.case)[torch.float64]
    stack = model.get_decoder() if call.case.is_seq2seq else model.base_model
    with torch.no_grad():
        other = model(**call.case.inputs(call.batch + 1, 4, 4), use_cache=True).past_key_values
    return stack.build_cache(), other


# ------------------------------------------------------------------------------------------------------------------ the check


def run(
    call: Generation, arguments: dict[str, Any], dtype: torch.dtype = torch.float64, **others: Any
) -> torch.Tensor:
    """The ids that a call generates, (rows, prompt and new tokens).

    Raises:
        AssertionError: logits that are not finite, ids outside of the vocabulary, or more of them than were asked for.
    """
    model = models_of(call.case)[dtype]
    own = {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64
        else copy.deepcopy(value)
        for name, value in (arguments | others).items()
    }
    if dtype == torch.float32 and isinstance(own.get("encoder_outputs"), BaseModelOutput):
        own["encoder_outputs"] = BaseModelOutput(own["encoder_outputs"].last_hidden_state.float())
    settings = model.generation_config.to_dict()
    set_seed(call.seed)
    outputs = model.generate(**own, **{"return_dict_in_generate": True, "output_logits": True})
    assert model.generation_config.to_dict() == settings, "`generate` changes the settings of the model"
    for step in outputs.logits or ():
        assert step.isfinite().all(), "logits are not finite"
    ids = outputs.sequences
    assert ids.dtype == torch.int64 and bool(((ids >= 0) & (ids < VOCABULARY)).all()), ids
    return ids


def check_generation(call: Generation) -> str:
    """Runs a call with and without a cache, in pieces and by rows.

    Returns:
        "refused" or "computed".

    Raises:
        AssertionError: an error that explains nothing, the refusal of a call with nothing unusual, logits that are not finite, or
            other ids without a cache, with a prompt in chunks, or without the other rows of the batch.
    """
    arguments = spoil(call, inputs_of(call) | options_of(call))
    arguments = {name: value for name, value in arguments.items() if name not in ("return_dict_in_generate",)}
    try:
        expected = run(call, arguments)
    except Exception as error:  # whatever it is: the oracle judges it
        if isinstance(error, AssertionError):
            raise
        if not is_explained_by_generate(error):
            check_documented(error)
        assert not call.is_ordinary, f"refused: {error!r}"
        return "refused"
    if call.faults:
        return "computed"
    _check_shape(call, arguments, expected)
    run(call, arguments, torch.float32, **_assistant(call, torch.float32))
    if call.strategy not in ("lookup", "assistant"):  # which Transformers offers with a cache only
        uncached = run(call, arguments, use_cache=False)
        assert is_same(call, arguments, uncached, expected), (
            f"without a cache {uncached.tolist()}, with it {expected.tolist()}"
        )
    if call.mask == "gaps":  # no cache is continued behind a gap, so that pieces may be refused
        pass
    elif not call.case.is_seq2seq and "input_ids" in arguments:
        for size in (1, 3):
            chunked = run(call, arguments, prefill_chunk_size=size)
            assert is_same(call, arguments, chunked, expected), (
                f"by {size} tokens {chunked.tolist()}, at once {expected.tolist()}"
            )
    if "sample" not in call.strategy and call.batch > 1 and "input_ids" in arguments:
        _check_rows(call, arguments, expected)
    return "computed"


def is_same(call: Generation, arguments: dict[str, Any], first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two texts are equal in rows with tokens. The others may end later, so that padding follows."""
    mask = None if call.case.is_seq2seq else arguments.get("attention_mask")
    if mask is None or bool(mask.any(-1).all()):
        return torch.equal(first, second)
    rows = mask.any(-1).repeat_interleave(len(first) // len(mask))
    length = min(first.shape[1], second.shape[1])
    rest = (first[rows, length:], second[rows, length:])
    return torch.equal(first[rows, :length], second[rows, :length]) and all(is_filler(call, part) for part in rest)


def is_filler(call: Generation, ids: torch.Tensor) -> bool:
    """Whether ids are what follows a text that has ended; the beam search of Transformers takes the end token where padding is 0."""
    first = call.ends[0] if isinstance(call.ends, tuple) else call.ends
    return bool(((ids == 0) | (ids == (first or 0))).all())


def is_explained_by_generate(error: Exception) -> bool:
    """Whether `generate` of Transformers raised it on purpose, as it does for options and modes that do not fit together."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    is_raised = place.line.startswith("raise ") and "/transformers/generation/" in place.filename
    return is_raised and isinstance(error, (ValueError, TypeError, NotImplementedError))


def _assistant(call: Generation, dtype: torch.dtype) -> dict[str, Any]:
    return {"assistant_model": copy.deepcopy(models_of(call.case)[dtype])} if call.strategy == "assistant" else {}


def _check_shape(call: Generation, arguments: dict[str, Any], ids: torch.Tensor) -> None:
    """As many rows as were asked for, which begin with the prompt."""
    copies = arguments.get("num_return_sequences", 1)
    prompt = arguments.get("decoder_input_ids" if call.case.is_seq2seq else "input_ids")
    if prompt is None:
        rows, length = call.batch if call.case.is_seq2seq or "inputs_embeds" in arguments else 1, 0
    else:
        rows, length = prompt.shape
        start = ids.shape[1] - length
        assert len(ids) == rows * copies, ids.shape
        wanted = prompt.repeat_interleave(copies, 0)
        place = 1 if call.case.is_seq2seq and not torch.equal(ids[:, :length], wanted) else 0
        padding = torch.zeros(len(ids), dtype=torch.long)
        mask = arguments.get("decoder_attention_mask") if place else None
        if mask is not None:  # a start token stands between padding and text
            padding = (mask.cumsum(1) == 0).sum(1).repeat_interleave(copies, 0)
        for row, text, skipped in zip(ids.tolist(), wanted.tolist(), padding.tolist()):
            begin = row[:skipped] + row[skipped + place : length + place]
            assert begin == text, (row, text)
        assert start >= 0
    assert len(ids) == rows * copies, ids.shape
    assert ids.shape[1] <= length + call.new_tokens + 1


def _check_rows(call: Generation, arguments: dict[str, Any], expected: torch.Tensor) -> None:
    """Each row gives what it gives alone, and padding after its end."""
    copies = len(expected) // call.batch
    mask = arguments.get("attention_mask")
    for row in range(call.batch):
        if mask is not None and not bool(mask[row].any()):
            continue
        own = {
            name: value[row : row + 1] if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        alone = run(call, own)
        together = expected[row * copies : (row + 1) * copies]
        length = alone.shape[1]
        is_equal = torch.equal(together[:, :length], alone) and is_filler(call, together[:, length:])
        assert is_equal, f"row {row} alone {alone.tolist()}, in the batch {together.tolist()}"
