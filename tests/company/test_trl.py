"""TRL: heads fused with the loss compute what `forward` computes, or are refused; its trainers open folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clean_process import run_without_package
from factories import Case, all_variants, parametrize, random_ids
from word_tokenizer import word_tokenizer
from works_with import working

from hf_hybrid.hub import export_remote_code

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

pytestmark = pytest.mark.company

CAUSAL = working("TRL, `SFTTrainer`", all_variants("AutoModelForCausalLM"))
FIRST = [case for case in CAUSAL if case.variant == "default"]
# Fields that make a model fit for a fused head, and what says why it is not without them.
FIT: dict[str, dict[str, Any]] = {
    "mega": {"add_lm_hidden_dense_layer": False, "adaptive_cutoffs": None},
    "longvq": {"commitment_loss_weight": 0.0},
    "seqboat": {"dead_layer_loss_weight": 0.0},
    "spade_lm": {"adaptive_cutoffs": None},
}
UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("mega", {"add_lm_hidden_dense_layer": True}, "the dense layer before the head"),
    ("longvq", {"commitment_loss_weight": 0.1}, "`commitment_loss_weight` weighs"),
    ("seqboat", {"dead_layer_loss_weight": 0.1}, "`dead_layer_loss_weight` weighs"),
    ("spade_lm", {"adaptive_cutoffs": [12, 25]}, "the adaptive softmax"),
]


def fit(case: Case) -> dict[str, Any]:
    return FIT.get(case.model_type, {})


@parametrize(CAUSAL)
def test_a_fused_head_is_the_forward_pass(case: Case) -> None:
    model = case.model(**fit(case))
    ids = random_ids(2, 24)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        plain = model(ids, labels=labels)
        add_fused_lm_head(model)
        fused = model(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-5)
    scores = plain.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(fused.log_probs[counted], scores[counted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_type", "fields", "reason"), UNFIT, ids=[entry[0] for entry in UNFIT])
def test_a_head_that_would_lose_a_term_is_refused(model_type: str, fields: dict[str, Any], reason: str) -> None:
    case = next(case for case in FIRST if case.model_type == model_type)
    model = case.model(**fields)
    with pytest.raises(ValueError, match=f"cannot take a head that is fused with its loss: .*{reason}"):
        add_fused_lm_head(model)
    assert "forward" not in vars(model)


def texts() -> Any:
    return datasets.Dataset.from_list(
        [{"text": " ".join(f"w{3 + (3 * row + 7 * place) % 30}" for place in range(5 + 4 * row))} for row in range(6)]
    )


LAYOUTS = {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}, "packed": {"packing": True}}


@pytest.mark.parametrize("layout", LAYOUTS)
@parametrize(FIRST)
def test_supervised_fine_tuning_logs_the_loss_of_forward(case: Case, layout: str, tmp_path: Path) -> None:
    """Three steps from a folder: each logged loss is that of the model on the batch, documents kept apart."""
    case.model(**fit(case)).save_pretrained(tmp_path / "model")
    word_tokenizer(ends=True).save_pretrained(tmp_path / "model")
    args = trl.SFTConfig(
        str(tmp_path / "run"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        **{"max_length": 24, **LAYOUTS[layout]},
    )
    found: list[float] = []

    class Recorder(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
            plain = {name: value for name, value in inputs.items() if name != "labels"}
            was_training = model.training
            with torch.no_grad():
                loss = type(model).forward(model.eval(), **plain, labels=inputs["labels"], use_cache=False).loss
            model.train(was_training)
            found.append(float(loss))
            return super().training_step(model, inputs, *rest)

    trainer = Recorder(model=str(tmp_path / "model"), args=args, train_dataset=texts())
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert type(trainer.model) is case.model_class and len(logged) == 3
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(found), rtol=1e-3, atol=1e-3)


WITHOUT_PACKAGE = """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
answer = {}
for name, folder in arguments["folders"].items():
    args = SFTConfig(
        f"{folder}-run", report_to=[], use_cpu=True, bf16=False, max_steps=1, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=2, model_init_kwargs={"trust_remote_code": True}, disable_tqdm=True,
    )
    trainer = SFTTrainer(model=folder, args=args, train_dataset=Dataset.from_list(arguments["rows"]))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    answer[name] = [type(trainer.model).__module__.split(".")[0], type(trainer.model).__name__, *losses]
"""


def test_exports_are_fine_tuned_without_the_package(tmp_path: Path) -> None:
    folders = {}
    for case in FIRST:
        folders[case.model_type] = str(tmp_path / case.model_type)
        export_remote_code(case.model(**fit(case)), folders[case.model_type], word_tokenizer(ends=True))
    arguments = {"folders": folders, "rows": texts().to_list()}
    (tmp_path / "modules").mkdir()
    found = run_without_package(WITHOUT_PACKAGE, tmp_path / "modules", arguments)
    for case in FIRST:
        module, name, loss = found[case.model_type]
        assert (module, name) == ("transformers_modules", case.model_class.__name__)
        assert 0 < loss < 10
