"""Documents packed into a row, marked by positions that restart, are documents in rows of their own."""

from __future__ import annotations

import inspect

import pytest
import torch
from factories import Case, all_heads, all_variants, main_output, parametrize, random_ids
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

EXACT = {"rtol": 1e-5, "atol": 1e-5}
PER_TOKEN = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForTextEncoding",
)


def reads_packed(case: Case) -> bool:
    return case.auto_name in PER_TOKEN and not case.is_seq2seq


HEADS = [case for case in dict.fromkeys(all_heads() + all_variants()) if reads_packed(case)]
LANGUAGE_MODELS = [case for case in all_variants("AutoModelForCausalLM") if reads_packed(case)]


def flatten(documents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """(L_i) ids of each document to one row, as the collator of Transformers makes it."""
    return DataCollatorWithFlattening()([{"input_ids": document.tolist()} for document in documents])


@parametrize(HEADS)
@torch.no_grad()
def test_packed_documents_are_separate_documents(case: Case) -> None:
    model = case.model()
    ids = random_ids(1, 40)[0]

    @given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
    def check(lengths: list[int]) -> None:
        documents = list(ids[: sum(lengths)].split(lengths))
        batch = flatten(documents)
        packed = main_output(model(batch["input_ids"], position_ids=batch["position_ids"]))
        separate = [main_output(model(document.unsqueeze(0)))[0] for document in documents]
        torch.testing.assert_close(packed[0], torch.cat(separate), **EXACT)

    check()


@parametrize(HEADS)
@torch.no_grad()
def test_padding_between_and_around_documents(case: Case) -> None:
    """Rows with different documents, padding on both sides and between them, one row of padding alone."""
    model = case.model()
    ids = random_ids(3, 16)
    mask = torch.zeros(3, 16, dtype=torch.long)
    position_ids = torch.zeros(3, 16, dtype=torch.long)
    spans = [(0, slice(0, 5)), (0, slice(5, 12)), (1, slice(2, 8)), (1, slice(10, 16))]
    for row, span in spans:
        mask[row, span] = 1
        position_ids[row, span] = torch.arange(span.stop - span.start)
    outputs = main_output(model(ids, attention_mask=mask, position_ids=position_ids))
    assert outputs.isfinite().all()
    for row, span in spans:
        alone = main_output(model(ids[row : row + 1, span]))[0]
        torch.testing.assert_close(outputs[row, span], alone, **EXACT)


@parametrize(LANGUAGE_MODELS)
def test_loss_and_gradients(case: Case) -> None:
    """No token predicts the beginning of the next document, whether or not the labels say so."""
    model = case.model().double().train()
    documents = [random_ids(1, length)[0] for length in (7, 3, 1, 6)]
    batch = flatten(documents)
    batch["labels"] = batch["input_ids"].clone()
    rows = torch.zeros(4, 7, dtype=torch.long)
    mask = torch.zeros(4, 7, dtype=torch.long)
    for row, document in enumerate(documents):
        rows[row, : len(document)] = document
        mask[row, : len(document)] = 1
    labels = rows.masked_fill(mask == 0, -100)

    def loss_and_gradients(**inputs: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(**inputs).loss
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    separate = loss_and_gradients(input_ids=rows, attention_mask=mask, labels=labels)
    torch.testing.assert_close(loss_and_gradients(**batch), separate, rtol=1e-9, atol=1e-9)


@parametrize(LANGUAGE_MODELS[:1])
@torch.no_grad()
def test_states_are_packed_as_well(case: Case) -> None:
    model = case.model()
    batch = flatten([random_ids(1, 5)[0], random_ids(1, 3)[0]])
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "output_hidden_states": True}
    outputs = model(**inputs)
    assert outputs.past_key_values is None
    assert {state.shape[:2] for state in outputs.hidden_states} == {(1, 8)}
    as_tuple = model(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], outputs.logits)


@parametrize(HEADS)
@torch.no_grad()
def test_positions_that_do_not_restart_change_nothing(case: Case) -> None:
    model = case.model()
    ids = random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = main_output(model(ids, attention_mask=mask))
    torch.testing.assert_close(main_output(model(ids, attention_mask=mask, position_ids=position_ids)), expected)


@parametrize(LANGUAGE_MODELS[:1])
def test_what_cannot_be_packed(case: Case) -> None:
    model = case.model()
    batch = flatten([random_ids(1, 5)[0], random_ids(1, 3)[0]])
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with pytest.raises(ValueError, match="`position_ids` restart within a row.*use_cache=False"):
        model(**inputs, use_cache=True)
    with pytest.raises(ValueError, match=r"`position_ids` has shape \(1, 7\), but the input needs \(1, 8\)"):
        model(**inputs | {"position_ids": batch["position_ids"][:, :-1]})
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(1, 7\)"):
        model(**inputs, attention_mask=torch.ones(1, 7))


@parametrize([case for case in all_heads() if case.auto_name == "AutoModel" and not case.is_seq2seq])
@torch.no_grad()
def test_what_has_a_row_for_each_document_keeps_it(case: Case) -> None:
    """Documents of two tokens in two rows: of rates of two layers the sizes alone would say that these are tokens.

    The record and the stack name the same outputs, and every other one has a value per token.
    """
    model = case.model()
    per_document = case.architecture.per_document_outputs
    assert getattr(model, "_per_document_outputs", ()) == per_document
    ids, places = random_ids(2, 4), torch.tensor([[0, 1, 0, 1]] * 2)
    optional = {name for name in inspect.signature(model.forward).parameters if name.startswith("output_")}
    wanted = dict.fromkeys(optional, True)
    packed = model(ids, position_ids=places, **wanted)
    separate = model(ids.view(4, 2), use_cache=False, **wanted)
    assert set(per_document) <= packed.keys()
    for name, value in packed.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            expected = separate[name] if name in per_document else separate[name].view(2, 4, *separate[name].shape[2:])
            torch.testing.assert_close(value, expected, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@parametrize([case for case in all_heads() if reads_packed(case) or case.is_seq2seq])
@torch.no_grad()
def test_documents_that_other_arguments_separate(case: Case) -> None:
    """They are refused: ignored, they would let documents see each other. Beside positions they change nothing."""
    model, inputs = case.model(), case.inputs(length=9)
    rows = [{"input_ids": row.tolist()} for row in inputs["input_ids"]]
    for options in ({"return_seq_idx": True}, {"return_flash_attn_kwargs": True}):
        marks = DataCollatorWithFlattening(return_position_ids=False, **options)(rows)
        del marks["input_ids"], marks["labels"]
        with pytest.raises(ValueError, match=f"`{next(iter(marks))}` separates .* `position_ids`"):
            model(**inputs, **marks)
        if not case.is_seq2seq:
            batch = DataCollatorWithFlattening(**options)(rows)
            del batch["labels"]
            packed = main_output(model(**batch))
            torch.testing.assert_close(packed[0], main_output(model(**inputs)).flatten(0, 1), **EXACT)
