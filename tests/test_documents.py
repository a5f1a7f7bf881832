"""The pages of docs/, README, model cards: their Python runs, their commands parse, their links lead somewhere.

What cannot run is marked in the page, in front of the block: `<!-- not run: reason -->`. Such a block, and the blocks of model
cards, which load checkpoints that are not here, are compiled, and the names that they import exist. `<!-- setup ... -->` holds
code that runs before the block and that a reader does not need to see.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import matplotlib
import pytest
import torch

import hf_hybrid
from hf_hybrid import cli
from hf_hybrid.recipes.support import options
from hf_hybrid.recipes.support.help_text import stored_options

pytest.importorskip("datasets")
pytest.importorskip("sentencepiece")
matplotlib.use("Agg")

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
PAGES = [*DOCS, *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("examples/*.md"))]
RUN_ELSEWHERE = ("docs/index.md", "docs/quickstart.md", "README.md")  # tests/test_readme.py, in processes of their own
WIDE = ("docs/guides/export.md",)
_BLOCK = re.compile(
    r"(?:^<!-- setup\n(?P<setup>.*?)-->\n\s*)?(?:^<!-- not run: (?P<reason>.+?) -->\n\s*)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    setup: str
    reason: str | None  # why it is not run


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = [
        Block(match["language"], match["code"], match["setup"] or "", match["reason"])
        for match in _BLOCK.finditer(text)
    ]
    assert len(found) * 2 == len(re.findall(r"^```", text, flags=re.MULTILINE)), "a fence is not closed"
    return found


def python_pages() -> list[Any]:
    runs = [path for path in PAGES if any(b.language == "python" and b.reason is None for b in blocks(path))]
    return [
        pytest.param(path, id=name_of(path), marks=pytest.mark.wide if name_of(path) in WIDE else ())
        for path in runs
        if name_of(path) not in RUN_ELSEWHERE
    ]


# -------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("path", python_pages())
def test_python_of_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one folder, with the checkpoints of the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(path)):
        if block.language == "python" and block.reason is None:
            source = f"{name_of(path)}, block {number}"
            exec(compile(block.setup, f"setup of {source}", "exec"), names)
            exec(compile(block.code, source, "exec"), names)


def test_the_first_page_shows_what_the_readme_shows() -> None:
    readme = [block.code for block in blocks(ROOT / "README.md")]
    assert all(block.code in readme for block in blocks(ROOT / "docs/index.md"))


def test_python_compiles_and_imports_what_exists() -> None:
    for path in [*PAGES, *CARDS]:
        for block in blocks(path):
            if block.language != "python":
                continue
            for node in ast.walk(ast.parse(block.code, filename=name_of(path))):
                if not isinstance(node, ast.ImportFrom):
                    continue
                if importlib.util.find_spec(str(node.module).split(".")[0]) is None:
                    continue  # an optional package
                module = import_module(str(node.module))
                for alias in node.names:
                    exists = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert exists, f"{name_of(path)}: {node.module} has no {alias.name}"


def test_every_block_has_a_language() -> None:
    for path in PAGES:
        assert {block.language for block in blocks(path)} <= {"python", "bash", "text"}, name_of(path)


# ------------------------------------------------------------------------------------------------------------ commands


class Parsed(BaseException):
    """The options of a command were read."""


def commands(script: str) -> Iterator[list[str]]:
    """The words of every command of a shell script, with its variables in their places."""
    variables: dict[str, str] = {}
    for line in script.replace("\\\n", " ").splitlines():
        line = string.Template(line).safe_substitute(variables)
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, variables[name] = words.pop(0).partition("=")
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def test_variables_of_a_script() -> None:
    script = 'SIZE="--a 1"\nhf-hybrid x $SIZE \\\n  --b 2 # why\nOMP_NUM_THREADS=1 make test && make lint\n'
    expected = ["hf-hybrid x --a 1 --b 2", "make test", "make lint"]
    assert list(commands(script)) == [words.split() for words in expected]


def check_command(words: list[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a command exists and takes the options that are given."""
    program, *rest = Path(words[0]).name, *words[1:]
    assert "…" not in " ".join(words) and "..." not in words, f"{name_of(path)}: write the command out: {words}"
    if program == "torchrun":
        launcher = import_module("torch.distributed.run").get_args_parser().parse_args(rest)
        program, rest = "python", [*(["-m"] if launcher.module else []), *rest[rest.index(launcher.training_script) :]]
    if program == "python" and rest[:2] == ["-m", "hf_hybrid"]:
        program, rest = "hf-hybrid", rest[2:]
    if program == "hf-hybrid":
        check_our_command(rest, monkeypatch)
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE), words
    elif program in ("python", "pytest") and rest[:2] != ["-m", "venv"]:
        if rest[:2] == ["-m", "pytest"]:
            rest = rest[2:]
        files = [word for word in rest if re.search(r"\.py$|^tests/", word)]
        assert files and all((ROOT / word).exists() for word in files), words
        if files[0].endswith(".py") and program == "python" and not files[0].startswith("tests/"):
            source = (ROOT / files[0]).read_text(encoding="utf-8")
            unknown = [word for word in rest if word.startswith("--") and f'"{word}"' not in source]
            assert not unknown, f"{name_of(path)}: {files[0]} has no option {unknown}"
    else:
        assert program in ("python", "pip", "git", "export", "eval", "hf", "cd"), f"{name_of(path)}: what is {words}?"


def check_our_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "lm-eval":
        harness = importlib.util.find_spec("lm_eval")
        if harness is not None:
            folder = Path(str(harness.origin)).parent
            sources = [*(folder / "_cli").glob("*.py"), *folder.glob("__main__.py")]
            known = "".join(file.read_text(encoding="utf-8") for file in sources)
            own = (ROOT / "src/hf_hybrid/recipes/lm_eval.py").read_text(encoding="utf-8")
            for word in words:
                assert not word.startswith("--") or f'"{word}"' in known + own, word
        return
    if words[0] in ("completion", "--version") or {"--list", "--help"} & set(words):
        assert "--list" in words or cli.main(words) == 0
        return
    read = options.fill_dataclasses

    def stop(*arguments: Any) -> NoReturn:
        read(*arguments)
        raise Parsed

    with monkeypatch.context() as patched, pytest.raises(Parsed):
        patched.setattr(options, "fill_dataclasses", stop)
        patched.setattr(sys, "argv", ["hf-hybrid"])
        patched.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # pages for GPUs
        cli.main([*words, "--traceback"])


@pytest.mark.parametrize(
    "path", [path for path in PAGES if any(b.language == "bash" for b in blocks(path))], ids=name_of
)
def test_commands_of_a_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of each command reads its options; programs of the repository have the options that are given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in blocks(path):
        if block.language == "bash" and block.reason is None:
            for words in commands(block.code.replace("<this repository>", "URL")):
                check_command(words, path, monkeypatch)


def test_commands_within_the_text() -> None:
    """`hf-hybrid ...` in a sentence names a command, and options that it has."""
    for path in [*PAGES, *CARDS]:
        for code in re.findall(r"`(hf-hybrid [^`]+)`", path.read_text(encoding="utf-8")):
            words = code.split()[1:]
            if words[0].startswith(("-", "COMMAND")) or words[0] == "completion":
                continue
            command, rest = cli._find([word for word in words if word != "|"])
            if command not in cli.COMMANDS or cli.COMMANDS[command] in ("evaluate", "lm_eval", "reproduce"):
                continue
            known = {option.name for option in stored_options(cli.COMMANDS[command])}
            given = {word[2:] for word in rest if word.startswith("--")} - {"help", "help-all"}
            assert given <= known, f"{name_of(path)}: `{code}`"


# --------------------------------------------------------------------------------------------------------------- links


def anchors(path: Path) -> set[str]:
    """The anchors of a page: its headings, as GitHub and the site name them, and the names of the reference."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}
    return slugs | set(re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("path", [*PAGES, *CARDS], ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:|mailto:)([^()\s]+)\)", text):
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists() and found.is_relative_to(ROOT), f"{name_of(path)}: {link}"
        assert not anchor or anchor in anchors(found), f"{name_of(path)}: {link}"


def test_pages_that_the_code_names_exist() -> None:
    """In messages, docstrings, option files and tests."""
    for folder in ("src", "benchmarks", "scripts", "tests", "configs", "model_cards", "docs"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".yaml", ".md", ".json") and path != Path(__file__):
                for page in re.findall(r"(?<![\w/.-])docs/[\w/]+\.md", path.read_text(encoding="utf-8")):
                    assert (ROOT / page).is_file(), f"{name_of(path)} names {page}"


# ----------------------------------------------------------------------------------------------------------- reference


def test_the_reference_has_every_public_name_once() -> None:
    pages = sorted((ROOT / "docs/reference/api").glob("*.md"))
    named = [name for page in pages for name in re.findall(r"^::: hf_hybrid\.(\w+)$", page.read_text(), flags=re.M)]
    assert sorted(named) == sorted(set(hf_hybrid.__all__) - {"__version__"})
    index = (ROOT / "docs/reference/api/index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"#hf_hybrid\.(\w+)\)", index))
    models = {name for name in named if name in (ROOT / "docs/reference/api/models.md").read_text(encoding="utf-8")}
    assert listed >= set(named) - models
