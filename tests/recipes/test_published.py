"""The option files of published experiments: settings that exist, models of the published size, runs on stand-ins."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from factories import TINY_OVERRIDES

from hf_hybrid.auto import find_architecture, load_config_class
from hf_hybrid.recipes import reproduce
from hf_hybrid.recipes.support import published
from hf_hybrid.recipes.support.experiment_files import experiment_names
from hf_hybrid.recipes.support.models import parse_overrides
from hf_hybrid.recipes.support.options import describe_options

PAPERS = ("bst", "longvq", "mega", "mega-chunk", "seqboat", "spade")
LRA = ("listops", "text", "retrieval", "image", "pathfinder", "path-x")


def some(*kept: str) -> list:
    """All experiments; those not named are wide."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.wide) for name in experiment_names()]


def test_every_paper_has_its_experiments() -> None:
    names = set(experiment_names())
    assert {name.partition("/")[0] for name in names} == set(PAPERS)
    assert {f"{paper}/{task}" for paper in PAPERS[1:] for task in LRA} <= names
    for name in (
        "mega/enwik8",
        "seqboat/enwik8",
        "mega/wikitext-103",
        "spade/wikitext-103",
        "bst/pg19-sh",
        "mega/wmt16-en-de",
    ):
        assert name in names


def test_files_hold_options_of_their_recipe() -> None:
    """And say what the paper reports, and what it leaves open."""
    for name in experiment_names():
        found = published.load_experiment(name)
        known = {option.name for option in describe_options(published.training_recipe_of(found).arguments)}
        assert set(found.options) <= known, name
        architecture = find_architecture(found.options["arch"])
        config = load_config_class(architecture)
        assert set(found.overrides) <= {item.name for item in fields(config)}, name
        assert found.unknown and found.title and found.metric and found.data, name
        assert found.arxiv == architecture.paper.arxiv, name
        assert "optim" in found.options or not found.recipe.startswith("pretrain"), name  # that of the recipe is Muon
        assert found.parameters is None or found.parameters_of, name
        assert (found.tolerance == 0) == (found.difference is None), name
        assert (found.data_format is None) == (found.data == "generated"), name


@pytest.mark.parametrize("name", some("mega/listops", "mega/enwik8", "seqboat/listops", "seqboat/retrieval"))
def test_models_have_the_published_size(name: str) -> None:
    found = published.load_experiment(name)
    model = published.published_model(found)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert model.config.model_type == found.options["arch"] and number > 100_000
    if found.parameters is not None:
        assert abs(number / found.parameters - 1) <= found.tolerance, f"{number:,} instead of {found.parameters:,}"


SMALLER = {
    "bst": {"bst_layers": [0, 1], "num_context_states": 4},
    "mega": {"decoder_layers": 1},
    "seqboat": {"classifier_dim": 16},
    "spade": {"decoder_layers": 1},
}
SHORT = {
    "train_lra": {"longer_than": 3, "shorter_than": 30, "max_depth": 4, "max_args": 3, "num_train": 4, "num_validation": 2}
    | {"num_test": 0, "max_length": 64, "resolution": 32, "num_processes": 1},
    "pretrain_clm": {"block_length": 64, "max_validation_segments": 2},
    "finetune_translation": {"max_source_length": 32, "max_target_length": 8, "max_train_samples": 4, "max_eval_samples": 2},
    "classify_audio": {"max_seconds": 0.01, "max_train_samples": 4, "max_eval_samples": 2},
}  # fmt: skip


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stand-ins")


@pytest.mark.parametrize("name", some("mega/listops", "seqboat/enwik8"))
def test_two_steps_on_a_stand_in(
    name: str, options: dict, tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting of the paper except sizes and lengths."""
    found = published.load_experiment(name)
    if found.data_format is not None:  # written once for all experiments
        folder = stand_ins / found.data_format
        made = reproduce.write_stand_in(
            found.data_format, folder, rows=16, length=min(found.build.get("longest", 0), 1024)
        )
        shutil.copytree(made, f"{options['output_dir']}-data")
    arch = found.options["arch"]
    smaller = {**parse_overrides(TINY_OVERRIDES[arch]), **SMALLER.get(arch, {})}
    if "decoder_layers" in smaller and "decoder_layers" not in found.overrides:
        del smaller["decoder_layers"]
    smaller = {key: value for key, value in smaller.items() if key != "rel_bias_table_size"}
    chosen = (
        options | SHORT[found.recipe] | {"config_overrides": smaller, "max_steps": 2, "gradient_accumulation_steps": 1}
    )
    if found.recipe == "train_lra" and "max_length" in chosen and found.options["task"] in ("image", "pathfinder"):
        del chosen["max_length"]
    metrics = reproduce.main(
        {"experiment": name, "scale": 0.001, "save_strategy": "no", "eval_strategy": "no", **chosen}
    )
    assert metrics["steps"] == 2 and metrics["published"]["published"] == found.figure
    run = Path(options["output_dir"])
    summary = json.loads((run / "reproduction.json").read_text())
    assert summary["experiment"] == name and summary["stand_in_data"] == (found.data_format is not None)
    config = json.loads((run / "config.json").read_text())
    kept = {key: value for key, value in found.overrides.items() if key not in smaller}
    assert {key: config[key] for key in kept} == kept


def test_the_scale_is_that_of_the_training() -> None:
    options = published.load_experiment("mega/listops").options
    assert published.scaled(options, 1.0) == options
    small = published.scaled(options, 0.01)
    assert (small["max_steps"], small["warmup_steps"], small["num_train"]) == (900, 30, 960)
    assert (
        small["learning_rate"] == options["learning_rate"] and small["config_overrides"] == options["config_overrides"]
    )
    assert published.scaled(options, 1e-9)["max_steps"] == 2
    with pytest.raises(ValueError, match="`scale` must be positive"):
        published.scaled(options, 0)


def test_experiments_are_found_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["mega/listop"], "Did you mean 'mega/listops'"), (["nothing"], "of bst, longvq, mega")):
        with pytest.raises(ValueError, match=message):
            reproduce.main([*words, "--scale", "0.1"])
    for words in (["--list"], ["mega/listops", "--help"], ["--help"]):
        with pytest.raises(SystemExit) as stopped:
            reproduce.main(words)
        assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "Mega on ListOps: test accuracy, % 63.14" in text and "--num_train" in text and "--scale" in text


def test_a_file_is_an_option_file_of_its_recipe(tmp_path: Path) -> None:
    """Flags after it take precedence, here over the number of rows, which is refused."""
    file = published.folder_of_experiments() / "mega" / "listops.yaml"
    from hf_hybrid.recipes import train_lra

    with pytest.raises(ValueError, match="must be positive"):
        train_lra.main([str(file), "--num_train", "0", "--num_validation", "0", "--output_dir", str(tmp_path / "run")])


def test_options_of_the_command_line_take_precedence(options: dict, tmp_path: Path) -> None:
    words = [
        "mega/listops",
        "--scale",
        "0.0001",
        "--config_overrides",
        TINY_OVERRIDES["mega"],
        "--output_dir",
        str(tmp_path / "run"),
    ]
    for name, value in (SHORT["train_lra"] | {"per_device_train_batch_size": 2, "max_steps": 1}).items():
        words += [f"--{name}", str(value)]
    metrics = reproduce.main([*words, "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no", "--quiet"])
    assert metrics["steps"] == 1 and metrics["train_samples"] == 4 and not metrics["published"]["stand_in_data"]
