"""What `HybridTrainer` adds: groups, orders that survive resuming, throughput, refusal of a lost loss, the time limit."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_hybrid.compatibility import device_without_number
from hf_hybrid.training.arguments import HybridTrainingArguments, PretrainingArguments, SyntheticTrainingArguments
from hf_hybrid.training.best_metric import NamedMetrics
from hf_hybrid.training.callbacks import EpochCallback, TimeLimitCallback
from hf_hybrid.training.divergence import DivergedError
from hf_hybrid.training.trainer import EpochLengthSampler, HybridTrainer


class Numbers(Dataset):
    """Rows whose value depends on the epoch."""

    def __init__(self, value: float = 1.0) -> None:
        self.epochs: list[int] = []
        self.value = value

    def __len__(self) -> int:
        return 8

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": torch.full((4,), self.value), "labels": torch.tensor(float(index))}


class Model(nn.Module):
    """A linear model with one state space tensor."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.ssm = nn.ParameterDict({"C": nn.Parameter(torch.ones(2, 2))})

    def forward(self, input_ids, labels):
        predicted = self.linear(input_ids)[:, 0] * self.ssm["C"].mean()
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


def arguments(tmp_path, **options) -> HybridTrainingArguments:
    base = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "save_strategy": "no"}
    return HybridTrainingArguments(output_dir=str(tmp_path / "run"), **{**base, **options})


def test_the_optimizer_has_our_groups_and_the_schedule_keeps_them(tmp_path):
    args = arguments(tmp_path, learning_rate=1e-2, ssm_learning_rate=1e-3, weight_decay=0.1, max_steps=3)
    trainer = HybridTrainer(model=Model(), args=args, train_dataset=Numbers())
    trainer.train()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert [group["initial_lr"] for group in groups.values()] == [1e-2, 1e-2, 1e-3]
    assert [group["weight_decay"] for group in groups.values()] == [0.1, 0.0, 0.0]
    assert all(group["lr"] == pytest.approx(0.0) for group in groups.values())


def test_a_cpu_has_no_number_while_an_optimizer_is_loaded(tmp_path):
    args = arguments(tmp_path)
    args.__dict__["_setup_devices"] = torch.device("cpu", 0)  # what Accelerate sets where several processes train
    with pytest.raises(KeyError), device_without_number(args):
        assert args.device == torch.device("cpu")
        raise KeyError
    assert args.device == torch.device("cpu", 0)


@pytest.mark.parametrize(
    ("wanted", "options", "known"),
    [
        ("acuracy", {}, "eval_loss, .*, eval_accuracy: choose"),
        ("accuracy", {"prediction_loss_only": True}, "eval_loss, eval_runtime"),
        ("accuracy", {"sets": True}, "eval_a_loss, .*eval_b_accuracy"),
    ],
)
def test_a_best_metric_that_nothing_measures(tmp_path, wanted, options, known):
    sets = options.pop("sets", False)
    args = arguments(tmp_path, max_steps=1, metric_for_best_model=wanted, eval_strategy="steps", **options)
    trainer = HybridTrainer(
        model=Model(),
        args=args,
        train_dataset=Numbers(),
        eval_dataset={"a": Numbers(), "b": Numbers()} if sets else Numbers(),
        compute_metrics=NamedMetrics(lambda prediction: {"accuracy": 1.0}, lambda: ["accuracy"]),
    )
    with pytest.raises(ValueError, match=f"`metric_for_best_model` is '{wanted}', .* measure {known}"):
        trainer.train()
    for right in ("eval_a_accuracy", "b_loss") if sets else ("loss", "eval_runtime"):
        args.metric_for_best_model = right
        trainer.train()
    trainer.compute_metrics = lambda prediction: {"accuracy": 1.0}  # of somebody who does not name what it measures
    args.metric_for_best_model = "b_accuracy" if sets else "runtime"
    trainer.train()


def test_a_best_metric_of_an_evaluation_of_ones_own(tmp_path):
    class Measured(HybridTrainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_distance": 2.0}

    args = arguments(tmp_path, max_steps=1, metric_for_best_model="distance", eval_strategy="steps", eval_steps=1)
    trainer = Measured(model=Model(), args=args, train_dataset=Numbers(), eval_dataset=Numbers())
    trainer.train()
    assert trainer.state.global_step == 1


def test_muon_trains_the_matrices(tmp_path):
    args = arguments(tmp_path, learning_rate=1e-3, muon_learning_rate=1e-2, max_steps=3)
    model = Model()
    model.linear.weight.data.fill_(0.5)
    trainer = HybridTrainer(model=model, args=args, train_dataset=Numbers())
    trainer.train()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert [group["initial_lr"] for group in groups.values()] == [1e-2, 1e-3, 1e-3]
    assert "momentum_buffer" in trainer.optimizer.state[model.linear.weight]
    assert "exp_avg" in trainer.optimizer.state[model.linear.bias]
    assert not torch.equal(model.linear.weight, torch.full((1, 4), 0.5))


def test_muon_is_an_optimizer(tmp_path):
    """By its name, by its learning rate, and what records hold of it."""
    chosen = arguments(tmp_path, optim="muon")
    assert (chosen.muon_learning_rate, chosen.optim) == (5e-3, arguments(tmp_path).optim)
    assert arguments(tmp_path, optim="muon", muon_learning_rate=2e-2).muon_learning_rate == 2e-2
    assert arguments(tmp_path).muon_learning_rate is None
    again = HybridTrainingArguments(
        **{name: chosen.to_dict()[name] for name in ("output_dir", "optim", "muon_learning_rate")}
    )
    assert (again.optim, again.muon_learning_rate) == (chosen.optim, 5e-3)
    pretraining = {"output_dir": str(tmp_path), "use_cpu": True}
    assert PretrainingArguments(**pretraining).muon_learning_rate == 5e-3
    for other in ("adamw_torch", "adafactor"):
        assert PretrainingArguments(**pretraining, optim=other).muon_learning_rate is None
    assert SyntheticTrainingArguments(**pretraining).muon_learning_rate is None


def test_muon_beside_another_optimizer_is_refused(tmp_path):
    args = arguments(tmp_path, muon_learning_rate=1e-2, optim="sgd", max_steps=1)
    with pytest.raises(ValueError, match="`optim` is 'sgd': use `optim='muon'`"):
        HybridTrainer(model=Model(), args=args, train_dataset=Numbers()).train()


def test_optimizers_with_their_own_groups_still_work(tmp_path):
    trainer = HybridTrainer(
        model=Model(), args=arguments(tmp_path, optim="adafactor", max_steps=1), train_dataset=Numbers()
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_plain_training_arguments_are_accepted(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no")
    HybridTrainer(model=Model(), args=args, train_dataset=Numbers()).train()


def test_the_data_set_hears_of_every_epoch(tmp_path):
    data = Numbers()
    HybridTrainer(model=Model(), args=arguments(tmp_path, num_train_epochs=3), train_dataset=data).train()
    assert sorted(set(data.epochs)) == [0, 1, 2]


def test_throughput_is_logged(tmp_path):
    trainer = HybridTrainer(model=Model(), args=arguments(tmp_path, logging_steps=1), train_dataset=Numbers())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 for entry in logged)
    assert logged[-1]["num_input_tokens_seen"] == 3 * 8 * 4


def test_a_lost_loss_stops_the_run(tmp_path):
    trainer = HybridTrainer(
        model=Model(), args=arguments(tmp_path, logging_steps=1), train_dataset=Numbers(float("nan"))
    )
    with pytest.raises(DivergedError, match="diverged at step 1: the loss is nan.*no checkpoint.*`learning_rate`"):
        trainer.train()


def test_length_batches_depend_on_seed_and_epoch_alone():
    lengths = torch.randint(1, 50, (64,)).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochLengthSampler(4, lengths=lengths, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(torch.randint(1, 5, ()).item())  # the global generator does not matter
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)
    assert sorted(order(3, 0)) == list(range(64))


def test_evaluation_keeps_the_order_of_the_rows(tmp_path):
    args = arguments(tmp_path, train_sampling_strategy="group_by_length", max_steps=1)
    trainer = HybridTrainer(model=Model(), args=args, train_dataset=Numbers(), eval_dataset=Numbers())
    assert trainer.predict(Numbers()).label_ids.tolist() == list(range(8))


def test_the_time_limit_asks_for_a_checkpoint(tmp_path):
    callback = TimeLimitCallback(1e-9)
    args = arguments(tmp_path, save_strategy="steps")
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    control = callback.on_step_end(args, TrainerState(), TrainerControl())
    assert control.should_training_stop and control.should_save
    assert callback.elapsed_fraction > 1
    with pytest.raises(ValueError, match="`max_minutes` must be positive"):
        TimeLimitCallback(0)


def test_the_schedule_follows_the_time():
    limit = types.SimpleNamespace(elapsed_fraction=0.0)
    factor = HybridTrainer._follow_time(lambda step: 1 - step / 100, 100, limit)
    assert factor(10) == pytest.approx(0.9)
    limit.elapsed_fraction = 0.5
    assert factor(10) == pytest.approx(0.5) and factor(70) == pytest.approx(0.3)
    limit.elapsed_fraction = 2.0
    assert factor(10) == pytest.approx(0.0)


def test_objects_without_epochs_are_ignored():
    assert EpochCallback(object(), None).targets == []
