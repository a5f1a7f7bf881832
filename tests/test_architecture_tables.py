"""The tables of README and docs that list architectures are those of the records. `python tests/test_architecture_tables.py` writes them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import re
import runpy
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import pytest

from hf_hybrid.auto import ARCHITECTURES, PIPELINES, Architecture
from hf_hybrid.cli import COMMANDS
from hf_hybrid.public_names import write_stub
from hf_hybrid.recipes import list_recipes
from hf_hybrid.recipes.support.experiment_files import experiment_names
from hf_hybrid.recipes.support.help_text import TRAINER_GROUP, Option, stored_options, write_index
from hf_hybrid.recipes.support.main_options import MAIN_OPTIONS
from hf_hybrid.recipes.support.published import load_experiment

ROOT = Path(__file__).resolve().parents[1]
OWN = [architecture for architecture in ARCHITECTURES if architecture.package == "hf_hybrid"]
HEADS = {
    "AutoModel": "base",
    "AutoModelForTextEncoding": "encoder",
    "AutoModelForCausalLM": "causal LM",
    "AutoModelForSeq2SeqLM": "sequence to sequence",
    "AutoModelForMaskedLM": "masked LM",
    "AutoModelForSequenceClassification": "sequence classification",
    "AutoModelForTokenClassification": "token classification",
    "AutoModelForQuestionAnswering": "question answering",
    "AutoModelForMultipleChoice": "multiple choice",
    "AutoModelForImageClassification": "image classification",
    "AutoModelForAudioClassification": "audio classification",
}
PRETRAINING = {
    "`pretrain span-corruption`": ("an encoder-decoder to fine-tune", "AutoModelForSeq2SeqLM"),
    "`pretrain clm`": ("a language model that continues text", "AutoModelForCausalLM"),
    "`pretrain mlm`": ("an encoder", "AutoModelForMaskedLM"),
}


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def architectures() -> str:
    """Every model type in one line."""

    def row(found: Architecture) -> list[str]:
        paper = f"[{found.paper.arxiv}]({found.paper.url})" if found.paper else ""
        heads = ", ".join(HEADS[name] for name in sorted(found.heads, key=list(HEADS).index))
        return [
            f"[{found.title}]({str(found.docs).removeprefix('docs/architectures/')})",
            paper,
            f"`{found.model_type}`",
            found.summary,
            heads,
            found.decoding_state,
        ]

    header = "| | paper | `model_type` | what it combines | heads | state kept while generating |"
    return table(header, map(row, OWN))


# When to choose a model.
CHOICE = {
    "spade": "long documents into short texts: summaries, rewriting; understanding by its encoder",
    "spade_lm": "language models with windows and one long memory: the simplest of all",
    "mega": "classification of long texts, pixels and waveforms, translation; the best studied of all",
    "seqboat": "to spend attention only where it is needed, and to see where that is",
    "longvq": "recall from far behind a window, in constant memory",
    "bst": "long documents with a state that is carried from segment to segment",
}
SHORT_HEADS = dict(zip(HEADS, ("B", "B", "C", "S", "M", "sc", "tc", "qa", "mc", "ic", "ac")))


def choice() -> str:
    """Every model type in a short line: when to choose it, its heads, its state, its paper."""

    def row(found: Architecture) -> list[str]:
        heads = dict.fromkeys(SHORT_HEADS[name] for name in sorted(found.heads, key=list(HEADS).index))
        paper = f"[{found.paper.arxiv}]({found.paper.url})" if found.paper else ""
        grows = {"spade": "grows with the target", "mega": "constant in chunks"}
        state = grows.get(found.model_type, "constant")
        return [f"[`{found.model_type}`]({found.docs})", CHOICE[found.model_type], " ".join(heads), state, paper]

    return table("| model | choose it for | heads | state while generating | paper |", map(row, OWN))


def commands() -> str:
    """Every command, its module and what it does."""
    summaries = {item.name: item.summary.rstrip(".:") for item in list_recipes()}
    rows = [
        [f"`hf-hybrid {words}`", f"`hf_hybrid.recipes.{name}`", summaries[name]] for words, name in COMMANDS.items()
    ]
    return table("| command | module | |", rows)


def pretraining() -> str:
    """Which recipe pretrains what."""
    rows = [
        [recipe, what, code(found.model_type for found in OWN if auto_name in found.heads)]
        for recipe, (what, auto_name) in PRETRAINING.items()
    ]
    return table("| command | makes | of |", rows)


def adapters() -> str:
    """What LoRA changes; architectures with the same lists share a line."""
    lists: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for found in OWN:
        lists.setdefault((found.lora_targets, found.state_modules), []).append(found.model_type)
    rows = [[code(names), code(targets), code(state)] for (targets, state), names in lists.items()]
    return table(
        "| architecture | linear maps that are adapted | recurrent parts (`--lora_modules_to_save state`) |", rows
    )


def experiments() -> str:
    """Published experiments, with what was published and what we measured."""
    rows = []
    for name in experiment_names():
        found = load_experiment(name)
        figure = "not known" if found.figure is None else f"{found.figure:g}"
        source = "" if found.figure is None else found.source or "memory"
        number = "" if found.parameters is None else f"{found.parameters:,}"
        url = f"[{name}](../configs/published/{name}.yaml)"
        rows.append([url, found.title, found.metric, figure, source, number, found.ours or "not run"])
    return table("| experiment | | metric | paper | source | parameters | ours |", rows)


def options(config: type) -> str:
    """The fields of a configuration with their defaults, as its docstring explains them."""
    entries: list[list[str]] = []
    for line in inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].splitlines():
        found = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if found:
            entries.append([found[1], found[2]])
        elif line.strip():
            entries[-1][1] += f" {line.strip()}"
    defaults = {item.name: item.default for item in dataclasses.fields(config)}
    rows = []
    for names, text in entries:
        values = [defaults[config.attribute_map.get(name, name)] for name in names.split(", ")]
        shown = [f'"{value}"' if isinstance(value, str) else f"{value}" for value in values]
        rows.append([code(names.split(", ")), code(shown), text.replace("|", "\\|")])
    return table("| field | default | |", rows)


def options_of(model_type: str) -> Callable[[], str]:
    """What writes the options of an architecture."""
    found = next(item for item in OWN if item.model_type == model_type)
    module, _, name = found.config.partition(":")
    return lambda: options(getattr(import_module(f".{module}", "hf_hybrid"), name))


def benchmarks() -> str:
    """Peers over ours, by length, as benchmarks/picture.py draws them."""
    return runpy.run_path(str(ROOT / "benchmarks" / "picture.py"))["short_table"]()


# Page, name of the table in its markers -> what writes it.
TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "choice"): choice,
    ("docs/architectures/index.md", "architectures"): architectures,
    ("docs/reference/commands.md", "commands"): commands,
    ("docs/guides/pretraining.md", "pretraining"): pretraining,
    ("docs/guides/adapters.md", "adapters"): adapters,
    ("docs/published.md", "experiments"): experiments,
    ("docs/benchmarks.md", "benchmarks"): benchmarks,
    **{(str(found.docs), f"options of {found.model_type}"): options_of(found.model_type) for found in OWN},
}


def with_table(text: str, name: str, contents: str) -> str:
    """A page with one table replaced."""
    sources = {
        "experiments": "configs/published",
        "commands": "hf_hybrid.cli",
        "benchmarks": "benchmarks/stored/lengths.json",
    }
    source = sources.get(name, "hf_hybrid.auto")
    source = "the docstring" if name.startswith("options of ") else source
    begin, end = f"<!-- table: {name} (from {source}, do not edit) -->", "<!-- end of table -->"
    found = re.findall(f"{re.escape(begin)}.*?{end}", text, flags=re.DOTALL)
    assert len(found) == 1, f"the page needs the table {name!r} once, between {begin} and {end}"
    return text.replace(found[0], f"{begin}\n{contents}\n{end}")


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_a_table_is_that_of_the_records(page: str, name: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert with_table(text, name, TABLES[page, name]()) == text, "run `make tables`"


def test_every_model_has_a_reason_to_choose_it() -> None:
    assert CHOICE.keys() == {found.model_type for found in OWN}


def test_every_head_has_a_name_and_is_known_to_the_pipelines() -> None:
    assert {name for found in OWN for name in found.heads} == HEADS.keys()
    assert {auto_name for _, auto_name in PIPELINES.values()} <= HEADS.keys()


def described_options() -> dict[str, list[Option]]:
    """The options of every recipe that the index holds: its own, and those of the Trainer that `--help` shows."""
    found = {}
    for item in list_recipes():
        if item.name in ("evaluate", "lm_eval", "reproduce"):  # take the options of others
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            import_module(f"hf_hybrid.recipes.{item.name}").main(["--help-json"])
        options = [Option(**entry) for entry in json.loads(printed.getvalue())]
        shown = MAIN_OPTIONS.get(item.name, ())
        found[item.name] = [option for option in options if option.group != TRAINER_GROUP or option.name in shown]
    return found


def test_the_console_command_knows_the_options() -> None:
    """It answers `--help` from an index, without importing the recipes."""
    options = described_options()
    assert options == {name: list(stored_options(name)) for name in options}, "run `make tables`"
    for recipe, names in MAIN_OPTIONS.items():
        assert set(names) <= {option.name for option in options[recipe]} and len(names) <= 13, recipe
        assert {option.name for option in options[recipe] if option.is_required} <= set(names), recipe


def main() -> None:
    """Writes all tables, the stub with the public names, and the index of options."""
    for (page, name), contents in TABLES.items():
        path = ROOT / page
        path.write_text(with_table(path.read_text(encoding="utf-8"), name, contents()), encoding="utf-8")
    write_stub()
    write_index(described_options())


if __name__ == "__main__":
    main()
