"""Models that read one text in pieces, each in a process of its own, against the same models in one process.

python -m tests.distributed.pieces_of_texts PROCESSES FOLDER [MODEL_TYPE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_hybrid.ops.sequence_group import SequenceGroup
from hf_hybrid.training.context_parallel import context_parallel, reduce_gradients, set_sequence_group, split_batch

from ..modeling.factories import Case, random_ids
from .alike import run_alike

CLOSE = {
    "rtol": 1e-7,
    "atol": 1e-8,
}  # float64: the order of sums differs, and the shares of the labels are rounded to float32
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
CHUNKED: dict[str, Any] = {"truncation": None}
LEARNING: dict[str, Any] = {"commitment_loss_weight": 0.3}
# A layer with few active tokens, and a penalty for it.
RARE: dict[str, Any] = {"router_act_bias": 1.0, "dead_layer_loss_weight": 0.3, "dead_layer_min_rate": 0.9}

# Head, variant and further settings of each model.
CASES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "spade": [
        ("SpadeEncoderModel", "default", {}),
        ("SpadeEncoderModel", "chunk_gated", {}),
        ("SpadeEncoderModel", "rotary_add", {}),
        ("SpadeEncoderModel", "stack_s4", {}),
        ("AutoModelForTokenClassification", "default", {}),
        ("AutoModelForSeq2SeqLM", "default", {}),
        ("AutoModelForSeq2SeqLM", "local_decoder_chunk", {}),
    ],
    "spade_lm": [
        ("AutoModelForCausalLM", "default", {}),
        ("AutoModelForCausalLM", "official", {}),
        ("AutoModelForCausalLM", "chunk_gated", {}),
        ("AutoModelForCausalLM", "rotary_add", {}),
        ("AutoModelForCausalLM", "stack_s4", {}),
        ("AutoModelForCausalLM", "attention_only", {}),
    ],
    "mega": [
        ("AutoModelForCausalLM", "chunk_softmax_simple", {}),
        ("AutoModelForCausalLM", "chunk_laplace", CHUNKED),
        ("AutoModelForMaskedLM", "chunk_laplace", CHUNKED),
        ("AutoModelForMaskedLM", "chunk_relu2_adaptive", {"adaptive_cutoffs": None}),
    ],
    "bst": [
        ("AutoModelForCausalLM", "default", {}),
        ("AutoModelForCausalLM", "mf", {}),
        ("AutoModelForCausalLM", "mh_sliding", {}),
        ("AutoModelForCausalLM", "mf_unstructured", {}),
        ("AutoModelForCausalLM", "sh_unstructured", {}),
        ("AutoModelForCausalLM", "mh_s4", {}),
    ],
    "seqboat": [
        ("AutoModelForCausalLM", "default", {}),
        ("AutoModelForCausalLM", "relu2_distance", {"ema_truncation": None}),
        ("AutoModelForCausalLM", "laplace_rank", RARE),
        ("AutoModelForMaskedLM", "default", {}),
        ("AutoModelForMaskedLM", "laplace_rank", {"window_size": 30}),
        ("AutoModelForMaskedLM", "always_active", RARE),
        ("AutoModelForTokenClassification", "relu2_distance", {"ema_truncation": None}),
    ],
    "longvq": [
        ("AutoModelForCausalLM", "default", LEARNING),
        ("AutoModelForCausalLM", "heads_s4d", {"far_key_gradient": False}),
        ("AutoModelForCausalLM", "plain_keys", {}),
        ("AutoModelForMaskedLM", "default", LEARNING),
        ("AutoModelForMaskedLM", "heads_s4d", {}),
    ],
}


def build(model_type: str, head: str, variant: str, settings: dict[str, Any]) -> nn.Module:
    if head != "SpadeEncoderModel":
        return Case(model_type, head, variant).model(**settings).train()
    from hf_hybrid import SpadeEncoderModel

    from ..modeling.factories import perturb

    torch.manual_seed(0)
    return perturb(SpadeEncoderModel(Case(model_type, "AutoModelForSeq2SeqLM", variant).config(**settings))).train()


def batch_of(model: nn.Module, head: str, length: int, padded: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    batch = {"input_ids": random_ids(2, length)}
    if padded:
        batch["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        batch["attention_mask"][1, length // 3 :] = 0
    if head == "AutoModelForSeq2SeqLM":
        batch["labels"] = random_ids(2, 7)
        batch["labels"][1, 4:] = -100
    elif head != "SpadeEncoderModel":
        highest = model.config.num_labels if head == "AutoModelForTokenClassification" else 40
        batch["labels"] = torch.randint(0, highest, (2, length))
        if padded:
            batch["labels"][batch["attention_mask"] == 0] = -100
    return batch


def run(model: nn.Module, inputs: dict[str, Any], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The output per token and the loss, after a backward pass; without labels, the mean over `number` tokens of something."""
    outputs = model(**inputs)
    if "loss" in outputs:
        loss, states = outputs.loss, outputs.logits
    else:
        states = outputs.last_hidden_state
        mask = inputs.get("attention_mask")
        counted = states if mask is None else states * mask.unsqueeze(-1)
        loss = counted.tanh().pow(2).sum() / number
    loss.backward()
    return states, loss.detach()


def check(
    case: tuple[str, str, str, dict[str, Any]], group: SequenceGroup, length: int, padded: bool, **how: Any
) -> int:
    """Compares one model; returns the bytes that this process sent."""
    dtype = how.get("dtype", torch.float64)
    model = build(*case).to(dtype)
    if how.get("checkpointed"):
        model.gradient_checkpointing_enable()
    batch = batch_of(model, case[1], length, padded)
    expected, expected_loss = run(model, batch, batch["input_ids"].numel())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    sent = group.bytes_sent
    with context_parallel(model, group):
        piece = split_batch(batch, group, model)
        states, loss = run(model, piece, batch["input_ids"].numel())
    sent = group.bytes_sent - sent
    reduce_gradients(model, group)
    close = CLOSE if dtype == torch.float64 else SINGLE
    total = group.reduce(loss)
    torch.testing.assert_close(total, expected_loss, **close)
    if case[1] == "AutoModelForSeq2SeqLM":  # every process decodes all targets
        torch.testing.assert_close(states, expected, **close)
    elif states is not None:
        size = states.shape[1]
        expected = expected[:, group.rank * size : (group.rank + 1) * size]
        states = states[:, : expected.shape[1]]
        if padded:
            real = piece["attention_mask"][:, : expected.shape[1]].unsqueeze(-1)
            states, expected = states * real, expected * real
        torch.testing.assert_close(states, expected, **close)
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
        torch.testing.assert_close(parameter.grad, wanted, msg=lambda text, name=name: f"{name}: {text}", **close)
    return sent


def check_refusals(group: SequenceGroup) -> None:
    """What cannot read pieces says so by name."""
    refused = [
        (Case("seqboat", "AutoModelForCausalLM", "unlimited_relu2"), {}, "Set `window_size`"),
        (Case("seqboat", "AutoModelForCausalLM", "relu2_distance"), {}, "ema_truncation=None"),
        (Case("seqboat", "AutoModelForSequenceClassification", "default"), {}, "read the whole input at once"),
        (Case("mega", "AutoModelForCausalLM", "default"), {}, "use_chunking=True"),
        (Case("mega", "AutoModelForCausalLM", "chunk_laplace"), {}, "truncation=None"),
        (
            Case("mega", "AutoModelForSeq2SeqLM", "chunk_softmax_simple"),
            {},
            "MegaForConditionalGeneration cannot read",
        ),
        (Case("spade", "AutoModelForSequenceClassification", "default"), {}, "read the whole input at once"),
    ]
    for case, settings, words in refused:
        try:
            set_sequence_group(case.model(**settings), group)
        except ValueError as error:
            assert words in str(error), f"{case}: {error}"
        else:
            raise AssertionError(f"{case} was not refused")
    model = build("spade_lm", "AutoModelForCausalLM", "default", {})
    piece = split_batch({"input_ids": random_ids(1, 16)}, group, model)
    with context_parallel(model, group):
        for further, words in (
            ({"use_cache": True}, "use_cache=False"),
            ({"position_ids": torch.arange(16 // group.size).unsqueeze(0)}, "position_ids"),
        ):
            try:
                model(**piece, **further)
            except ValueError as error:
                assert words in str(error)
            else:
                raise AssertionError(f"{further} was not refused")
        try:
            model(input_ids=random_ids(1, 2))
        except ValueError as error:
            assert "a window reaches 3 tokens" in str(error)
        else:
            raise AssertionError("a short piece was not refused")
    assert model(input_ids=random_ids(1, 2), use_cache=True).past_key_values is not None  # whole texts again


def check_trainer(folder: str, processes: int) -> None:
    """Training on pieces equals training on other texts in every process, with the same batch: weights, losses, tokens."""
    from transformers import default_data_collator

    from hf_hybrid.training.arguments import HybridTrainingArguments
    from hf_hybrid.training.trainer import HybridTrainer

    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 40, (20,), generator=generator).tolist() for _ in range(4 * processes)]
    data = [{"input_ids": row, "labels": row[:-3] + [-100] * 3, "attention_mask": [1] * 20} for row in rows]
    results = []
    for pieces in sorted({1, 2, processes}):
        model = Case("spade_lm", "AutoModelForCausalLM", "default").model()
        arguments = HybridTrainingArguments(
            output_dir=f"{folder}/run{pieces}", use_cpu=True, max_steps=3, learning_rate=1e-2, report_to="none",
            per_device_train_batch_size=pieces, per_device_eval_batch_size=4 * pieces, save_strategy="no", logging_steps=1,
            train_sampling_strategy="sequential", context_parallel_size=pieces, disable_tqdm=True,
        )  # fmt: skip
        trainer = HybridTrainer(
            model, arguments, train_dataset=data, eval_dataset=data, data_collator=default_data_collator
        )
        trained = trainer.train().training_loss
        assert trainer.get_cp_size() == pieces and trainer.num_data_groups == processes // pieces
        results.append((trained, trainer.evaluate()["eval_loss"], trainer.state.num_input_tokens_seen, model))
    train_loss, eval_loss, tokens, expected = results[0]
    assert tokens == 3 * processes * 20, f"{tokens} tokens"
    for found_train, found_eval, found_tokens, found in results[1:]:
        assert found_tokens == tokens, f"{found_tokens} tokens instead of {tokens}"
        assert abs(found_train - train_loss) < 1e-5 and abs(found_eval - eval_loss) < 1e-5, f"{results}"
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def check_all(kind: str, folder: Path) -> None:
    """Everything of a model type, what is refused (`refusals`), or training (`trainer`)."""
    if kind == "trainer":
        return check_trainer(str(folder), dist.get_world_size())
    group = SequenceGroup()
    if kind == "refusals":
        return check_refusals(group)
    for index, rest in enumerate(CASES[kind]):
        case = (kind, *rest)
        check(case, group, 40 if index else 43, padded=index % 2 == 0)
        if index == 0:
            short, long = (check(case, group, 60 * times, padded=False, checkpointed=True) for times in (1, 2))
            assert short == long > 0, f"{short} bytes for a short text, {long} for one of twice the length"
            check(case, group, 60, padded=False, dtype=torch.float32)
    return None


if __name__ == "__main__":
    number, place, *kinds = sys.argv[1:]
    run_alike(check_all, ["refusals", *(kinds or [*CASES, "trainer"])], place, int(number))
