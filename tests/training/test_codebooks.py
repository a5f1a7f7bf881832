"""The callback that follows codebooks: updates at step ends, logs, warnings of collapse and of nothing else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainerState, TrainingArguments

from hf_hybrid.configuration.configuration_longvq import LongVQConfig
from hf_hybrid.modeling.longvq.longvq_heads import LongVQForCausalLM
from hf_hybrid.training import codebooks
from hf_hybrid.training.codebooks import CodebookCallback
from hf_hybrid.training.trainer import HybridTrainer


class Texts(Dataset):
    def __init__(self, number: int) -> None:
        self.ids = torch.randint(3, 30, (number, 16))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def model() -> LongVQForCausalLM:
    return LongVQForCausalLM(
        LongVQConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            shared_representation_size=8,
            value_size=16,
            intermediate_size=16,
            ssm_state_size=4,
            window_size=3,
            chunk_size=4,
            codebook_size=8,
        )
    )


def train(folder: Path, network: LongVQForCausalLM, callback: CodebookCallback) -> HybridTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        report_to=[],
        save_strategy="steps",
        save_steps=3,
        use_cpu=True,
    )
    trainer = HybridTrainer(network, arguments, train_dataset=Texts(40), eval_dataset=Texts(5), callbacks=[callback])
    trainer.train()
    return trainer


def test_training_logs_the_codebooks_and_saves_them_up_to_date(tmp_path: Path) -> None:
    callback, network = CodebookCallback(), model()
    trainer = train(tmp_path, network, callback)
    quantizer = network.model.layers[0].mixer.quantizer
    assert quantizer.num_updates == 12, "one update per micro-batch"
    saved = LongVQForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert saved.model.layers[0].mixer.quantizer.num_updates == 6
    assert [entry["step"] for entry in callback.history] == [2, 4, 6]
    assert all(len(entry["perplexity"]) == 2 for entry in callback.history)
    logged = [entry for entry in trainer.state.log_history if "codebook_perplexity" in entry]
    assert len(logged) == 3 and all(1 <= entry["codebook_perplexity"] <= 8 for entry in logged)
    before = quantizer.codebook.clone()
    prediction = trainer.predict(Texts(5))
    assert prediction.predictions.shape == (5, 16, 30), "nothing but logits is gathered"
    assert torch.equal(quantizer.codebook, before)
    metrics = trainer.evaluate()
    with torch.no_grad():
        batch = trainer.eval_dataset.ids
        expected = network.eval()(batch, labels=batch).loss
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-3)


def test_warnings_of_collapse(caplog) -> None:
    callback = CodebookCallback(collapse_perplexity=2.0, grace_steps=10, patience=2)
    with caplog.at_level(logging.WARNING, logger=codebooks.__name__):
        for step in (1, 2, 3):
            callback._warn(step, [1.0, 5.0])
        assert not caplog.records, "the first steps are free"
        callback._in_danger.clear()
        callback._warn(20, [1.5, 5.0])
        callback._warn(21, [3.0, 5.0])
        callback._warn(22, [1.5, 5.0])
        assert not caplog.records, "dips pass"
        callback._warn(23, [1.5, 5.0])
        callback._warn(24, [1.5, 5.0])
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "layer 0" in message and "1.50" in message and "`commitment_loss_weight`" in message


def test_models_without_codebooks_are_left_alone() -> None:
    callback = CodebookCallback()
    logs = {"loss": 1.0}
    callback.on_step_end(None, None, None, model=torch.nn.Linear(2, 2))
    state = TrainerState()
    callback.on_log(None, state, None, model=torch.nn.Linear(2, 2), logs=logs)
    assert logs == {"loss": 1.0} and not callback.history
    assert not codebooks.has_codebooks(torch.nn.Linear(2, 2))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="`collapse_perplexity` must be at least 1"):
        CodebookCallback(collapse_perplexity=0.5)


def test_picture_of_the_codebooks(tmp_path: Path) -> None:
    from hf_hybrid.viz import codebook_usage

    network = model()
    history = [{"step": step, "perplexity": [2.0 + step, 3.0]} for step in range(3)]
    figure = codebook_usage(network, tmp_path / "pictures" / "usage.png", history=history)
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 3
    assert (tmp_path / "pictures" / "usage.png").stat().st_size > 5000
    assert len(codebook_usage(network).axes) == 1
    with pytest.raises(ValueError, match="Linear has no codebooks"):
        codebook_usage(torch.nn.Linear(2, 2))
