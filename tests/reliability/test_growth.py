"""What if a process runs for days: nothing is kept from step to step, from token to token, from length to length."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import Case, all_variants, parametrize
from transformers import StoppingCriteria, StoppingCriteriaList

MEGABYTE = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
# The allocators of torch and C keep freed memory and hand it out in pieces; what leaks in every step exceeds this within 500 steps.
NOISE = 16 * MEGABYTE
CASES = [case for case in all_variants() if case.variant == "default"]
every_architecture = pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)


def tensors() -> tuple[int, int]:
    """Number and bytes of the tensors that Python can reach."""
    gc.collect()
    found = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    # By the address of the object, not of its data: tensors that other tests traced have none.
    storages = {item.untyped_storage()._cdata: item.untyped_storage().nbytes() for item in found}
    return len(found), sum(storages.values())


def resident() -> int:
    """Bytes of memory of the process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def check_loop(step: Callable[[int], None], count: int) -> None:
    """Runs `step(0)`, `step(1)` and so on; the last four fifths leave nothing behind.

    `step(0)` comes last both times: what a model keeps of its last call depends on the length of that call.
    """
    for index in (*range(count // 5), 0):
        step(index)
    before, memory = tensors(), resident()
    for index in (*range(count // 5, count), 0):
        step(index)
    after = tensors()
    assert after[0] <= before[0], f"{after[0] - before[0]} more tensors after {count} steps"
    assert after[1] <= before[1], f"{after[1] - before[1]} more bytes in tensors after {count} steps"
    assert resident() - memory < NOISE


def check_training(case: Case, count: int) -> None:
    model = case.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(index: int) -> None:
        inputs = case.inputs(2, 5 + index % 13, 4)
        model(**inputs, **case.labels(inputs)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    check_loop(step, count)


def check_lengths(case: Case, count: int) -> None:
    """The longest input first: later ones need no more."""
    model = case.model()

    def step(index: int) -> None:
        length = count if index == 0 else index
        with torch.no_grad():
            model(**case.inputs(1, length, max(1, length // 4)))

    check_loop(step, count)


class Measure(StoppingCriteria):
    """Counts tensors after some of the generated tokens, and stops nothing."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.found = lengths, {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] in self.lengths:
            self.found[input_ids.shape[1]] = (*tensors(), resident())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def check_decoding(case: Case, count: int) -> None:
    """A state of constant size stays so; keys and values that grow with the text are given back at its end."""
    model = case.model()
    inputs = case.inputs(2, 6)
    prompt = {"decoder_input_ids": inputs.pop("decoder_input_ids")} if case.is_seq2seq else {}
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(**inputs, **prompt, max_new_tokens=3, **options)
    before = tensors()
    first, last = count // 5, count
    measure = Measure(first, last)
    output = model.generate(
        **inputs, **prompt, max_new_tokens=count, stopping_criteria=StoppingCriteriaList([measure]), **options
    )
    assert output.shape[1] >= count
    early, late = measure.found[first], measure.found[last]
    # Keys and values that grow take their spare space when the first is full; a leak would be a tensor in every step.
    assert late[0] - early[0] <= 16, f"{late[0] - early[0]} more tensors"
    stack = model.get_decoder() if case.is_seq2seq else model.base_model
    cache = stack.build_cache()
    if getattr(getattr(cache, "self_attention_cache", cache), "kept_tokens", None) is not None:
        ids = 8 * len(output) * (last - first)
        assert late[1] - early[1] <= 2 * ids + 4096, f"{late[1] - early[1]} more bytes in the state"
    assert late[2] - early[2] < NOISE
    del output, measure, early, late, cache
    after = tensors()
    assert after[0] <= before[0] and after[1] <= before[1]


@parametrize(CASES, kept=[case for case in CASES if case.model_type in ("spade", "seqboat")])
def test_a_few_steps_tokens_and_lengths(case: Case) -> None:
    check_training(case, 15)
    check_lengths(case, 20)
    check_decoding(case, 40)


@pytest.mark.slow
@every_architecture
def test_training(case: Case) -> None:
    check_training(case, 500)


@pytest.mark.slow
@every_architecture
def test_lengths(case: Case) -> None:
    check_lengths(case, 500)


@pytest.mark.slow
@every_architecture
def test_decoding(case: Case) -> None:
    check_decoding(case, 2000)
