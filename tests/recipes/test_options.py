"""Options from mappings and option files: the fields of the dataclasses as they are, or an error that names the field."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import IntervalStrategy

from hf_hybrid.recipes.support.experiment_files import option_file
from hf_hybrid.recipes.support.finetuning_data import TableArguments
from hf_hybrid.recipes.support.models import NewModelArguments
from hf_hybrid.recipes.support.options import parse_arguments, read_options
from hf_hybrid.recipes.support.pretraining_data import PretrainingDataArguments
from hf_hybrid.training.arguments import FinetuningArguments, PretrainingArguments, Seq2SeqFinetuningArguments


@dataclass
class Sample:
    """One field of every kind."""

    data: list[str] = field(metadata={"help": "Files to read."})
    count: int = field(default=3, metadata={"help": "A count."})
    rate: float = field(default=0.5, metadata={"help": "A rate."})
    limit: int | None = field(default=7, metadata={"help": "A limit."})
    text: str = field(default="words", metadata={"help": "A text."})
    flag: bool = field(default=True, metadata={"help": "A flag."})
    sizes: list[int] | None = field(default=None, metadata={"help": "Sizes."})
    fields: dict[str, Any] | str | None = field(default=None, metadata={"help": "Fields."})
    mode: str = field(default="fast", metadata={"help": "A mode.", "choices": ["fast", "slow", "no"]})


def sample(args: Any) -> Sample:
    return parse_arguments((Sample,), args, "A sample.")[0]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("limit", None, None),
        ("data", [], []),
        ("sizes", [], []),
        ("text", "-3", "-3"),
        ("text", "--flag", "--flag"),
        ("data", ["-a.txt", "--count"], ["-a.txt", "--count"]),
        ("data", "a b.txt", ["a b.txt"]),
        ("data", Path("a.txt"), ["a.txt"]),
        ("text", Path("a.txt"), "a.txt"),
        ("sizes", 4, [4]),
        ("rate", 2, 2.0),
        ("rate", "5e-4", 5e-4),
        ("count", "1e3", 1000),
        ("count", 1000.0, 1000),
        ("count", -1, -1),
        ("flag", False, False),
        ("flag", "false", False),
        ("text", "", ""),
        ("fields", {"a": [1, None]}, {"a": [1, None]}),
        ("fields", "a=1", "a=1"),
        ("mode", "slow", "slow"),
        ("mode", False, "no"),
    ],
)
def test_a_mapping_sets_the_fields(name, given, expected):
    value = getattr(sample({"data": ["x"], name: given}), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("count", "many", r"`count` must be a whole number; got 'many' \(str\). Leave it out for its default, 3."),
        ("count", 1.5, "`count` must be a whole number"),
        ("count", True, "`count` must be a whole number"),
        ("count", None, "`count` must be a whole number; got None"),
        ("count", [1], "`count` must be a whole number"),
        ("rate", "fast", "`rate` must be a number"),
        ("rate", False, "`rate` must be a number"),
        ("flag", 1, "`flag` must be true or false"),
        ("flag", "perhaps", "`flag` must be true or false"),
        ("text", 5, "`text` must be text; got 5.*quotes"),
        ("limit", {}, r"`limit` must be a whole number or null \(None\)"),
        ("sizes", [1, "a"], "`sizes` must be a list of whole numbers or null"),
        ("data", None, "`data` must be a list of texts; got None.*Files to read"),
        ("data", {"a": 1}, "`data` must be a list of texts"),
        ("fields", 3, "`fields` must be a mapping or text"),
        ("mode", "slaw", "`mode` must be one of 'fast', 'slow', 'no'; got 'slaw'"),
        ("cuont", 3, "Unknown option `cuont`: did you mean `count`"),
        ("something", 3, "Unknown option `something`. `--help` lists all"),
    ],
)
@pytest.mark.parametrize("source", ["mapping", "json"])
def test_a_wrong_value_names_its_field(name, given, message, source, tmp_path):
    options: Any = {"data": ["x"], name: given}
    if source == "json":
        (tmp_path / "options.json").write_text(json.dumps(options))
        options = [str(tmp_path / "options.json")]
    with pytest.raises(ValueError, match=message):
        sample(options)


def test_a_required_option_is_named():
    with pytest.raises(ValueError, match="`data` is required: Files to read"):
        sample({"count": 1})


def test_yaml_sets_the_fields_and_flags_override_it(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        "data: [-a.txt]\nrate: 5e-4\nlimit: null\ntext: 'null'\nfields: {a: 1e-3, b: [2E+2, 1.5e3, x1e3]}\nmode: no\n"
    )
    options = sample([str(file)])
    assert (options.data, options.rate, options.limit, options.text) == (["-a.txt"], 5e-4, None, "null")
    assert options.fields == {"a": 1e-3, "b": [200.0, 1500.0, "x1e3"]} and options.mode == "no"
    options = sample([str(file), "--data", "b.txt", "--limit", "2", "--no_flag"])
    assert (options.data, options.limit, options.rate, options.flag) == (["b.txt"], 2, 5e-4, False)
    file.write_text("data: [unclosed\n")
    with pytest.raises(ValueError, match=r"options\.yaml cannot be read"):
        sample([str(file)])


def test_flags_stay_a_command_line(capsys):
    assert sample(["--data", "a", "b", "--flag", "False", "--rate", "1e-3"]).data == ["a", "b"]
    for words, message in (([], "--data"), (["--data", "a", "--cuont", "3"], "did you mean `--count`")):
        with pytest.raises(SystemExit) as stopped:
            sample(words)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


TRAINING = {"output_dir": "run", "use_cpu": True, "report_to": "none"}


@pytest.mark.parametrize("kind", [PretrainingArguments, FinetuningArguments, Seq2SeqFinetuningArguments])
def test_fields_of_the_trainer_too(kind):
    """None is the learning rate of everything else, also where the default is another; nothing is turned into words."""
    options = {
        "ssm_learning_rate": None, "learning_rate": "5e-4", "save_steps": 5, "lr_scheduler_kwargs": {"num_cycles": 2},
        "eval_strategy": False, "save_total_limit": None, "label_names": [],
    }  # fmt: skip
    (arguments,) = parse_arguments((kind,), {**TRAINING, **options}, None)
    assert arguments.ssm_learning_rate is None and arguments.learning_rate == 5e-4 and arguments.save_steps == 5
    assert arguments.eval_strategy is IntervalStrategy.NO and arguments.lr_scheduler_kwargs == {"num_cycles": 2}
    assert arguments.save_total_limit is None and arguments.label_names == []


@pytest.mark.parametrize("kind", [PretrainingArguments, FinetuningArguments, Seq2SeqFinetuningArguments])
def test_muon_by_name_also_after_a_command_line(kind):
    """`HfArgumentParser` changes the types of the fields that it has read."""
    assert parse_arguments((kind,), ["--output_dir", "run", "--use_cpu", "--optim", "muon"], None)[
        0
    ].muon_learning_rate
    assert parse_arguments((kind,), {**TRAINING, "optim": "muon"}, None)[0].muon_learning_rate
    with pytest.raises(ValueError, match="adamww"):
        parse_arguments((kind,), {**TRAINING, "optim": "adamww"}, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": "fast"}, "`learning_rate` must be a number; got 'fast'"),
        ({"learning_rate": None}, "`learning_rate` must be a number; got None"),
        ({"eval_strategy": "step"}, "`eval_strategy` must be one of 'no', 'steps', 'epoch'; got 'step'"),
        ({"lr_scheduler_type": "cosin"}, "`lr_scheduler_type` must be one of 'linear', 'cosine'"),
        ({"train_sampling_strategy": "sorted"}, "`train_sampling_strategy` must be one of .*'group_by_length'"),
        ({"include_num_input_tokens_seen": "some"}, "`include_num_input_tokens_seen` must be one of 'all'"),
        ({"max_step": 3}, "did you mean `max_steps`"),
        ({"generation_num_beams": 2.5}, "`generation_num_beams` must be a whole number or null"),
    ],
)
def test_wrong_values_of_the_trainer(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments((NewModelArguments, Seq2SeqFinetuningArguments), {**TRAINING, **changes}, None)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TableArguments, {"data": []}, "`data` names no file, folder or data set"),
        (TableArguments, {"data": ["a"], "validation_data": []}, "`validation_data` names no file"),
        (PretrainingDataArguments, {"data": []}, "`data` names no file"),
        (PretrainingDataArguments, {"data": ["a"], "validation_data": []}, "`validation_data` names no file"),
        (FinetuningArguments, {**TRAINING, "lora_rank": 4, "lora_targets": []}, "`lora_targets` is empty"),
    ],
)
def test_an_empty_list_is_not_taken_for_the_default(kind, options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments((kind,), options, None)


@pytest.mark.parametrize("form", ["mapping", "words", "word=value"])
def test_former_names_of_options_are_understood(form: str, caplog: pytest.LogCaptureFixture) -> None:
    given: Any = {
        "mapping": {"config_name": "seqboat"},
        "words": ["--config_name", "seqboat"],
        "word=value": ["--config-name=seqboat"],
    }[form]
    with caplog.at_level("WARNING", logger="hf_hybrid"):
        (options,) = parse_arguments((NewModelArguments,), given, None)
    assert options.arch == "seqboat"
    assert "The option `config_name` is now called `arch`." in caplog.text


def test_option_files_of_the_package_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README names them as in the source tree; a file of one's own under the same path comes first."""
    name = "configs/pretraining/spade-7m.yaml"
    monkeypatch.chdir(tmp_path)
    assert read_options(option_file(name))["arch"] == "spade"
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("arch: mega")
    assert read_options(option_file(name))["arch"] == "mega"
    assert option_file("configs/none.yaml") == Path("configs/none.yaml")
