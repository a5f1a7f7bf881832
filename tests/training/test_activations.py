"""Activation statistics, their files, the callback that follows them in training, and their pictures."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.modeling.seqboat.seqboat_heads import SeqBoatForCausalLM
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer
from hf_hybrid.training.activations import (
    ActivationCallback,
    activation_statistics,
    has_routers,
    record_activations,
    sparse_units,
    write_activation_statistics,
)
from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.trainer import HybridTrainer
from hf_hybrid.viz import (
    activation_map,
    draw_activation_map,
    draw_image_activations,
    draw_waveform_activations,
    plot_activations,
)

PNG = b"\x89PNG\r\n"
CONFIG = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "qk_dim": 8,
    "window_size": 5,
    "is_decoder": True,
}


def make_model() -> SeqBoatForCausalLM:
    """A model whose second layer activates nothing."""
    model = SeqBoatForCausalLM(SeqBoatConfig(**CONFIG))
    with torch.no_grad():
        model.model.layers[0].unit.router.weight.mul_(10)
        model.model.layers[1].unit.router.bias.copy_(torch.tensor([9.0, -9.0]))
    return model


def rows(number: int = 12) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 300, (number, 15))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize(
    ("trainer_class", "arguments"), [(Trainer, TrainingArguments), (HybridTrainer, HybridTrainingArguments)]
)
def test_training_logs_rates_and_warns_of_dead_layers(trainer_class, arguments, tmp_path, caplog) -> None:
    model = make_model()
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 2, "report_to": "none"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-4}
    callbacks = [ActivationCallback(every=1, patience=3)] if trainer_class is Trainer else []
    trainer = trainer_class(
        model=model, args=arguments(output_dir=str(tmp_path), **settings), train_dataset=rows(), callbacks=callbacks
    )
    if trainer_class is HybridTrainer:
        trainer._activations.every, trainer._activations.patience = 1, 3
    with caplog.at_level(logging.WARNING, logger="hf_hybrid.training.activations"):
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert 0 < entry["activation_rate/layer_0"] <= 1 and entry["activation_span/layer_0"] > 0
        assert entry["activation_rate/layer_1"] == 0 and entry["activation_span/layer_1"] == 0
        assert entry["activation_rate/mean"] == pytest.approx(entry["activation_rate/layer_0"] / 2, abs=1e-4)
    warnings = [
        record.getMessage() for record in caplog.records if "no longer activates any token" in record.getMessage()
    ]
    assert len(warnings) == 1 and "Layer 1" in warnings[0] and "dead_layer_loss_weight" in warnings[0]
    assert not model.model.layers[0].unit.router._forward_hooks


def test_callback_refuses_bad_intervals() -> None:
    with pytest.raises(ValueError, match="`every` and `patience` must be at least 1; got 0 and 5"):
        ActivationCallback(every=0)


def test_statistics_and_files(tmp_path: Path) -> None:
    model = make_model()
    batches = [{"input_ids": torch.randint(3, 300, (4, 15))} for _ in range(3)]
    layers = activation_statistics(model, batches, max_sequences=8)
    assert [layer.sequences for layer in layers] == [8, 8] and model.training
    assert layers[1].is_dead and layers[1].saving == 1.0 and layers[1].tokens_per_window is None
    assert not layers[0].is_dead and layers[0].max_span >= layers[0].span > 0 and 0.5 < layers[0].gate <= 1
    assert layers[0].tokens_per_window == pytest.approx(4 / layers[0].rate)
    written = json.loads(write_activation_statistics(layers, tmp_path / "a.json").read_text())
    assert written[0]["rate"] == layers[0].rate and written[1]["is_dead"] is True
    with write_activation_statistics(layers, tmp_path / "deep" / "a.csv").open() as file:
        assert [row["layer"] for row in csv.DictReader(file)] == ["0", "1"]
    with pytest.raises(ValueError, match=r"must end in .json or .csv; got 'a.txt'"):
        write_activation_statistics(layers, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="`batches` is empty"):
        activation_statistics(model, [])


def test_models_without_routers_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    assert not has_routers(model) and has_routers(make_model())
    with pytest.raises(ValueError, match="Linear has no layers with a router"):
        sparse_units(model)


def test_recording_ends_with_the_block() -> None:
    model = make_model()
    ids = torch.randint(3, 300, (2, 7))
    with record_activations(model) as gates:
        model(ids)
    model(ids)
    assert [len(layer) for layer in gates] == [1, 1] and gates[0][0].shape == (2, 7)


def test_pictures(tmp_path: Path) -> None:
    model, tokenizer = make_model().train(), byte_tokenizer()
    figure = activation_map(model, tokenizer, "a $ in\na text of 40 characters, or so it is", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(PNG) and model.training
    drawn = figure.axes[0].images[0].get_array()
    with record_activations(model.eval()) as gates:
        model(tokenizer("a $ in\na text of 40 characters, or so it is", return_tensors="pt")["input_ids"])
    torch.testing.assert_close(torch.tensor(drawn), torch.stack([layer[0][0] for layer in gates]), check_dtype=False)
    long = draw_activation_map(torch.rand(2, 30).numpy(), ["x"] * 30, tokens_per_line=12)
    assert [image.images[0].get_array().shape for image in long.axes[:3]] == [(2, 12), (2, 12), (2, 6)]
    with pytest.raises(ValueError, match="`labels` must name each of the 30 tokens.*got 2"):
        draw_activation_map(torch.rand(2, 30).numpy(), ["x", "y"])
    gates = torch.rand(2, 3, 12)
    draw_image_activations(torch.rand(2, 3, 4).numpy(), gates.unflatten(2, (3, 4)).numpy(), tmp_path / "images.png")
    draw_waveform_activations(torch.randn(12).numpy(), gates[0].numpy(), tmp_path / "sound.png", sampling_rate=4)
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(PNG) for name in ("images", "sound"))
    with pytest.raises(ValueError, match=r"`images` must be \(N, H, W\)"):
        draw_image_activations(torch.rand(2, 3, 4).numpy(), gates.unflatten(2, (4, 3)).numpy())
    with pytest.raises(ValueError, match=r"`samples` must be \(12,\)"):
        draw_waveform_activations(torch.randn(11).numpy(), gates[0].numpy())
    layers = activation_statistics(model, [{"input_ids": torch.randint(3, 300, (4, 15))}])
    assert plot_activations({"bytes": layers}, tmp_path / "rates.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="at least one layer"):
        plot_activations({}, tmp_path / "none.png")
