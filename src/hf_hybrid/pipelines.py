"""Pipelines that Transformers 5 lacks: text-to-text generation, summarization, extractive question answering.

`import hf_hybrid` registers them under new names, because Transformers rejects the names `summarization`,
`text2text-generation` and `question-answering`:

    pipeline("seq2seq-summarization", model="runs/summaries")("A long article ...")
    pipeline("seq2seq-text2text", model="runs/en-de")(["one text", "another"], batch_size=2, num_beams=4)
    pipeline("extractive-question-answering", model="runs/qa")({"question": "Who?", "context": "A long document ..."})

Nothing is truncated silently: texts beyond `max_input_length` are rejected unless `truncation=True` is passed, and
documents of any length are searched in overlapping windows.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.pipelines.base import ChunkPipeline, Pipeline

from .compatibility import generation_options
from .configuration.lengths import max_source_length

logger = logging.getLogger(__name__)

# `model_max_length` of a tokenizer without a limit is an integer above this.
_NO_LIMIT = 10**9


def _require_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string; got {type(value).__name__}.")
    if not value.strip():
        raise ValueError(f"{what} is empty: there is nothing to read. Leave such rows out.")
    return value


def _input_limit(model: Any, tokenizer: Any) -> int | None:
    """The largest number of tokens that the model and the tokenizer accept; None without a limit."""
    limits = (tokenizer.model_max_length, max_source_length(model.config))
    return min((limit for limit in limits if limit is not None and 0 < limit < _NO_LIMIT), default=None)


class Seq2SeqText2TextPipeline(Pipeline):
    """Text-to-text generation with an encoder-decoder: translation, rewriting, span corruption.

    Call it with a text or a list of texts. Options of the constructor or of a call: `prefix` (text before every input),
    `max_input_length` (tokens; default: the limit of the tokenizer, else none), `truncation` (truncate longer inputs,
    with a warning, instead of rejecting them), `clean_up_tokenization_spaces`, `skip_special_tokens`, and those of
    `generate`.

    A text gives a list of one mapping {"generated_text": ...} per returned sequence.
    """

    return_name = "generated_text"

    _load_tokenizer = True
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=128)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not (self.model.config.is_encoder_decoder and self.model.can_generate()):
            raise ValueError(
                f"{type(self).__name__} needs an encoder-decoder that generates; got {type(self.model).__name__}. Load the "
                "checkpoint with AutoModelForSeq2SeqLM, or use the pipeline `text-generation` for a causal model."
            )

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Generate for a text, a list of texts, a generator or a data set of texts.

        Raises:
            ValueError: an empty list or text, a text beyond the limit, or an option out of range.
        """
        if isinstance(inputs, (list, tuple)):
            inputs = [_require_text(text, f"Input {number}") for number, text in enumerate(inputs)]
            if not inputs:
                raise ValueError("There is no input to generate from.")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        prefix: str | None = None,
        max_input_length: int | None = None,
        truncation: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        skip_special_tokens: bool | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if max_input_length is not None and max_input_length < 1:
            raise ValueError(f"`max_input_length` must be a positive number of tokens; got {max_input_length}.")
        read = {"prefix": prefix, "max_input_length": max_input_length, "truncation": truncation}
        write = {
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
            "skip_special_tokens": skip_special_tokens,
        }
        given = [{name: value for name, value in group.items() if value is not None} for group in (read, write)]
        return given[0], generate_kwargs, given[1]

    def preprocess(
        self, text: str, prefix: str = "", max_input_length: int | None = None, truncation: bool = False
    ) -> dict[str, torch.Tensor]:
        """Token ids of a text.

        Raises:
            ValueError: the text is empty, not a string, or longer than the limit.
        """
        text = prefix + _require_text(text, "The input")
        encoded = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False, verbose=False)
        limit = _input_limit(self.model, self.tokenizer) if max_input_length is None else max_input_length
        length = encoded["input_ids"].shape[1]
        if limit is None or length <= limit:
            return dict(encoded)
        if not truncation:
            raise ValueError(
                f"The input has {length} tokens, but the limit is {limit}. Pass `max_input_length={length}` or more where "
                "the model was trained on such lengths, or `truncation=True` to cut the end off."
            )
        logger.warning("The input has %d tokens; the last %d are cut off.", length, length - limit)
        encoded = self.tokenizer(
            text, return_tensors="pt", return_token_type_ids=False, truncation=True, max_length=limit
        )
        return dict(encoded)

    def _forward(self, model_inputs: Mapping[str, torch.Tensor], **generate_kwargs: Any) -> dict[str, torch.Tensor]:
        generated = self.model.generate(**model_inputs, **generation_options(self, generate_kwargs))
        ids = generated if isinstance(generated, torch.Tensor) else generated.sequences
        batch = model_inputs["input_ids"].shape[0]
        return {"output_ids": ids.view(batch, ids.shape[0] // batch, -1)}

    def postprocess(
        self,
        model_outputs: Mapping[str, torch.Tensor],
        clean_up_tokenization_spaces: bool = False,
        skip_special_tokens: bool = True,
    ) -> list[dict[str, str]]:
        """One mapping per returned sequence."""
        texts = self.tokenizer.batch_decode(
            model_outputs["output_ids"][0],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
        )
        return [{self.return_name: text.strip()} for text in texts]


class Seq2SeqSummarizationPipeline(Seq2SeqText2TextPipeline):
    """Summaries with an encoder-decoder; see `Seq2SeqText2TextPipeline` for calls and options.

    A text gives a list of one mapping {"summary_text": ...} per returned sequence.
    """

    return_name = "summary_text"


class ExtractiveQuestionAnsweringPipeline(ChunkPipeline):
    """Extractive question answering: the span of a document that answers a question.

    Call it with {"question": ..., "context": ...}, a list of such mappings, or `question=..., context=...`. The document may have
    any length: it is read in windows of `max_seq_length` tokens (question included; default: the limit of the model, at most
    4,096) that overlap by `doc_stride` tokens (default: a quarter of a window, or less for a long question), and the best spans
    of all windows are compared.

    Options: `top_k` (number of answers; default 1), `max_answer_length` (tokens; default 30), `max_question_length`
        (tokens; a
    longer question is rejected; default: half a window).

    The answer is {"answer", "score", "start", "end"}: `answer == context[start:end]`, and the score is the probability of the span
    among all allowed spans of all windows, proportional to exp(start logit + end logit). A token that lies in two
    windows counts in the one where its shorter context is longer, so no span counts twice. With `top_k` above 1 the
    result is a list.
    """

    _load_tokenizer = True
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if "start_positions" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"{type(self).__name__} needs a question-answering head; {type(self.model).__name__} has none. Load the "
                "checkpoint with AutoModelForQuestionAnswering."
            )
        if self.tokenizer is None or not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{type(self).__name__} needs a tokenizer that reports offsets (a fast one).")

    def __call__(self, inputs: Any = None, *, question: Any = None, context: Any = None, **kwargs: Any) -> Any:
        """Answer one question or several.

        Raises:
            ValueError: no question, no context, one of them empty, or an option out of range.
        """
        if inputs is None:
            if isinstance(question, (list, tuple)) and isinstance(context, str):
                context = [context] * len(question)
            if isinstance(question, (list, tuple)) and isinstance(context, (list, tuple)):
                if len(question) != len(context):
                    raise ValueError(f"There are {len(question)} questions but {len(context)} contexts.")
                inputs = [{"question": one, "context": other} for one, other in zip(question, context)]
            else:
                inputs = {"question": question, "context": context}
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            raise ValueError("There is no question to answer.")
        for number, item in enumerate(inputs if isinstance(inputs, list) else [inputs]):
            if isinstance(inputs, (list, Mapping)):
                self._check_input(item, f" of input {number}" if isinstance(inputs, list) else "")
        return super().__call__(inputs, **kwargs)

    @staticmethod
    def _check_input(item: Any, where: str) -> None:
        if not isinstance(item, Mapping) or not {"question", "context"} <= item.keys():
            raise ValueError(
                f"An input must be a mapping with `question` and `context`; got {type(item).__name__}{where}."
            )
        _require_text(item["question"], f"The question{where}")
        _require_text(item["context"], f"The context{where}")

    def _sanitize_parameters(
        self,
        max_seq_length: int | None = None,
        doc_stride: int | None = None,
        max_question_length: int | None = None,
        max_answer_length: int | None = None,
        top_k: int | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"Unknown options {sorted(unknown)}; known are max_seq_length, doc_stride, max_question_length, "
                "max_answer_length, top_k and batch_size."
            )
        options = {
            "max_seq_length": max_seq_length,
            "doc_stride": doc_stride,
            "max_question_length": max_question_length,
            "max_answer_length": max_answer_length,
            "top_k": top_k,
        }
        for name, value in options.items():
            if value is not None and value < (0 if name == "doc_stride" else 1):
                raise ValueError(f"`{name}` must be positive; got {value}.")
        given = {name: value for name, value in options.items() if value is not None}
        read = {
            name: given.pop(name) for name in ("max_seq_length", "doc_stride", "max_question_length") if name in given
        }
        return read, {}, given

    def preprocess(
        self,
        inputs: Mapping[str, str],
        max_seq_length: int | None = None,
        doc_stride: int | None = None,
        max_question_length: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The windows of a document, each after the question.

        Raises:
            ValueError: the question leaves no room for the document.
        """
        self._check_input(inputs, "")
        question, context = inputs["question"].strip(), inputs["context"]
        limit = _input_limit(self.model, self.tokenizer)
        if max_seq_length is None:
            max_seq_length = 4096 if limit is None else min(limit, 4096)
        elif limit is not None and max_seq_length > limit:
            raise ValueError(f"`max_seq_length` {max_seq_length} exceeds the limit of the model, {limit} tokens.")
        asked = len(self.tokenizer(question, add_special_tokens=False)["input_ids"])
        allowed = max_seq_length // 2 if max_question_length is None else max_question_length
        room = max_seq_length - asked - self.tokenizer.num_special_tokens_to_add(pair=True)
        if asked > allowed or room < 1:
            raise ValueError(
                f"The question has {asked} tokens, but at most {allowed} are allowed and a window holds {max_seq_length}. "
                "Shorten it, or raise `max_seq_length` or `max_question_length`."
            )
        overlap = min(max_seq_length // 4, room - 1) if doc_stride is None else doc_stride
        if overlap >= room:
            raise ValueError(
                f"`doc_stride` must be below the {room} tokens of the document in a window; got {overlap}."
            )
        windows = self._windows(question, context, max_seq_length, overlap)
        for number, window in enumerate(windows):
            yield {**window, "context": context, "is_last": number + 1 == len(windows)}

    def _windows(self, question: str, context: str, max_seq_length: int, overlap: int) -> list[dict[str, Any]]:
        encoded = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_seq_length,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=False,
        )
        windows = []
        for number, ids in enumerate(encoded["input_ids"]):
            offsets = [
                pair if source == 1 else None
                for pair, source in zip(encoded["offset_mapping"][number], encoded.sequence_ids(number))
            ]
            inputs = {
                "input_ids": torch.tensor([ids]),
                "attention_mask": torch.tensor([encoded["attention_mask"][number]]),
            }
            windows.append({**inputs, "offsets": offsets})
        for window, kept in zip(windows, _shares([window["offsets"] for window in windows])):
            window["kept"] = kept
        return windows

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: model_inputs[name] for name in ("input_ids", "attention_mask")}
        output = self.model(**inputs)
        others = {name: value for name, value in model_inputs.items() if name not in inputs}
        return {"start": output.start_logits, "end": output.end_logits, "mask": inputs["attention_mask"], **others}

    def postprocess(
        self, model_outputs: Sequence[Mapping[str, Any]], top_k: int = 1, max_answer_length: int = 30
    ) -> Any:
        """The best spans of all windows."""
        spans: list[tuple[float, int, int]] = []
        normalizers = []
        for window in model_outputs:
            found, normalizer = _best_spans(window, top_k, max_answer_length)
            spans += found
            normalizers.append(normalizer)
        total = torch.logsumexp(torch.stack(normalizers), dim=0)
        answers = []
        context = model_outputs[0]["context"]
        for logit, start, end in sorted(spans, key=lambda span: (-span[0], span[1], span[2]))[:top_k]:
            text = context[start:end]
            start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
            score = float(torch.exp(torch.tensor(logit, dtype=torch.float64) - total))
            answers.append({"score": score, "start": start, "end": end, "answer": context[start:end]})
        return answers[0] if top_k == 1 and answers else answers


def _shares(windows: Sequence[Sequence[tuple[int, int] | None]]) -> list[list[bool]]:
    """For every window, the tokens at which spans may *start*; each token belongs to exactly one window.

    A token goes to the window in which the smaller of its contexts, left or right within the window, is largest.
    """
    best: dict[tuple[int, int], tuple[int, int]] = {}
    for number, offsets in enumerate(windows):
        places = [place for place, pair in enumerate(offsets) if pair is not None and pair[0] < pair[1]]
        for rank, place in enumerate(places):
            room = min(rank, len(places) - 1 - rank)
            pair = offsets[place]
            assert pair is not None
            if pair not in best or room > best[pair][0]:
                best[pair] = (room, number)
    return [
        [pair is not None and best.get(pair, (0, -1))[1] == number for pair in offsets]
        for number, offsets in enumerate(windows)
    ]


def _best_spans(
    window: Mapping[str, Any], top_k: int, max_answer_length: int
) -> tuple[list[tuple[float, int, int]], torch.Tensor]:
    """Best spans of one window as (logit, first character, last character + 1), and the log of the sum over all its spans."""
    offsets = window["offsets"]
    inside = torch.tensor([pair is not None and pair[0] < pair[1] for pair in offsets])
    real = window["mask"][0].bool()  # a batch may be padded on either side
    start, end = (window[name][0][real].double() for name in ("start", "end"))
    start = start.masked_fill(~(inside & torch.tensor(window["kept"])), -torch.inf)
    end = end.masked_fill(~inside, -torch.inf)
    length = len(offsets)
    reach = min(max_answer_length, length)
    # scores[w, i]: the span of w + 1 tokens that starts at token i
    scores = torch.full((reach, length), -torch.inf, dtype=torch.float64)
    for width in range(reach):
        scores[width, : length - width] = start[: length - width] + end[width:]
    values, places = scores.flatten().topk(min(top_k, scores.numel()))
    found = []
    for value, place in zip(values.tolist(), places.tolist()):
        width, first = divmod(place, length)
        if value > -torch.inf:
            found.append((value, offsets[first][0], offsets[first + width][1]))
    return found, torch.logsumexp(scores.flatten(), dim=0)
