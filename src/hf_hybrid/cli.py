"""The console command: `hf-hybrid <command> [OPTIONS.yaml] [--option value ...]`, every recipe under a short name.

Nothing heavy is imported before it is known what to run, so that help, completion and mistakes are answered at once.
"""

from __future__ import annotations

import difflib
import os
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module

from .recipes import Listed, list_recipes
from .recipes.support.experiment_files import experiment_names
from .recipes.support.help_text import help_page, stored_options
from .recipes.support.main_options import MAIN_OPTIONS, TRAINING_ONLY

PROGRAM = "hf-hybrid"

# Words of the command -> recipe, by what one wants to do. Their order is that of `--help`.
_SECTIONS: dict[str, dict[str, str]] = {
    "Prepare data": {
        "train-tokenizer": "train_tokenizer",
        "tokenize": "tokenize_text",
        "data lra": "generate_lra",
    },
    "Train": {
        "pretrain span-corruption": "pretrain_span_corruption",
        "pretrain clm": "pretrain_clm",
        "pretrain mlm": "pretrain_mlm",
        "finetune glue": "finetune_glue",
        "finetune summarization": "finetune_summarization",
        "finetune translation": "finetune_translation",
        "train lra": "train_lra",
        "train synthetic": "train_synthetic",
        "train image": "classify_image",
        "train audio": "classify_audio",
    },
    "Use": {
        "generate": "generate",
        "inspect": "inspect_activations",
        "app": "app",
        "demo": "demo",
    },
    "Measure": {
        "evaluate": "evaluate",
        "lm-eval": "lm_eval",
        "memory": "estimate_memory",
        "reproduce": "reproduce",
    },
    "Share and convert": {
        "push": "push_to_hub",
        "export": "export_model",
        "merge": "merge_adapter",
        "convert": "convert_checkpoint",
    },
}
COMMANDS: dict[str, str] = {command: recipe for section in _SECTIONS.values() for command, recipe in section.items()}
_GROUPS = {
    "pretrain": "Pretrain a model on raw text.",
    "finetune": "Fine-tune a checkpoint for a task.",
    "train": "Train a model on a benchmark, images or recordings.",
    "data": "Generate data.",
}
_COMPLETION = {
    "bash": '_hf_hybrid() { COMPREPLY=($(hf-hybrid --complete "${COMP_WORDS[@]:1:COMP_CWORD}")); }\n'
    "complete -o default -F _hf_hybrid hf-hybrid\n",
    "zsh": '_hf_hybrid() { compadd -- $(hf-hybrid --complete "${(@)words[2,CURRENT]}") || _files; }\n'
    "compdef _hf_hybrid hf-hybrid\n",
    "fish": "complete -c hf-hybrid -a '(hf-hybrid --complete (commandline -opc)[2..] (commandline -ct))'\n",
}
# What the user can mend. Anything else is a mistake of this library, and shows where.
_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)


class _Mistake(Exception):
    """The command line names no command."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        words: command-line arguments, or None for `sys.argv`.

    Returns:
        The exit status: 0, 1 if the command failed, 2 if there is no such command.
    """
    words = list(sys.argv[1:] if words is None else words)
    try:
        if words[:1] == ["--complete"]:
            sys.stdout.write("".join(f"{word}\n" for word in completions(words[1:])))
        elif words[:1] == ["--version"]:
            sys.stdout.write(f"{PROGRAM} {import_module(__package__).__version__}\n")
        elif words[:1] == ["completion"]:
            sys.stdout.write(_completion_script(words[1:]))
        elif not words or words[0] in ("-h", "--help", "help"):
            sys.stdout.write(_overview())
        else:
            return _run(words)
    except _Mistake as mistake:
        sys.stderr.write(f"{PROGRAM}: {mistake}\n")
        return 2
    return 0


def _run(words: list[str]) -> int:
    command, rest = _find(words)
    if command in _GROUPS:
        sys.stdout.write(_overview(command))
        return 0
    recipe = COMMANDS[command]
    if {"-h", "--help"} & set(rest) and (page := _help(command, rest)) is not None:
        sys.stdout.write(page)
        return 0
    shows_traceback = "--traceback" in rest or bool(os.environ.get("HF_HYBRID_TRACEBACK"))
    sys.argv = [f"{PROGRAM} {command}", *(word for word in rest if word != "--traceback")]
    module = import_module(f".recipes.{recipe}", __package__)
    try:
        module.main()
    except _EXPECTED as error:
        if shows_traceback:
            raise
        sys.stderr.write(f"{PROGRAM} {command}: error: {error}\n(--traceback shows where)\n")
        return 1
    return 0


def _find(words: list[str]) -> tuple[str, list[str]]:
    """The command that the words begin with, or the group of commands, and the words after it.

    Raises:
        _Mistake: there is no such command; the message names the most similar one.
    """
    first = words[0]
    if first in COMMANDS:
        return first, words[1:]
    by_recipe = {recipe: command for command, recipe in COMMANDS.items()}
    if first.replace("-", "_") in by_recipe:
        return by_recipe[first.replace("-", "_")], words[1:]
    if first not in _GROUPS:
        raise _Mistake(_no_command(first, words[:2]))
    if len(words) == 1 or words[1] in ("-h", "--help"):
        return first, []
    command = f"{first} {words[1]}".replace("_", "-")
    if command not in COMMANDS:
        raise _Mistake(_no_command(f"{first} {words[1]}", words[:2]))
    return command, words[2:]


def _no_command(given: str, words: Sequence[str]) -> str:
    """That there is no such command, with the nearest that there is."""
    both = " ".join(words)
    known = [*COMMANDS, *_GROUPS, "completion"]
    short = {command.split()[-1]: command for command in reversed(COMMANDS)}
    close = difflib.get_close_matches(both, known) or difflib.get_close_matches(given, known)
    close.sort(key=lambda command: sorted(command) != sorted(both))  # exchanged letters first
    if not close:
        close = [short[word] for word in difflib.get_close_matches(given.split()[-1], short, n=1)]
    hint = f" Did you mean `{PROGRAM} {close[0]}`?" if close else f" `{PROGRAM} --help` lists all."
    return f"there is no command `{given}`.{hint}"


# ---------------------------------------------------------------------------------------------------------------- help


def _recipes() -> dict[str, Listed]:
    return {item.name: item for item in list_recipes()}


def _overview(group: str | None = None) -> str:
    """All commands, or those of a group, in a line each."""
    listed = _recipes()
    title = _GROUPS.get(group or "", "Hybrid state-space/attention models: train, evaluate, use and share them.")
    usage = f"Usage: {PROGRAM} {group or 'COMMAND'} {'COMMAND ' if group else ''}[OPTIONS.yaml] [--option value ...]"
    last = f"`{PROGRAM} {group + ' ' if group else ''}COMMAND --help` shows the main options of a command, `--help-all` all of them."
    width = max(map(len, COMMANDS)) + 4
    lines: list[str] = []
    for heading, section in _SECTIONS.items():
        shown = {command: recipe for command, recipe in section.items() if group in (None, command.split()[0])}
        if shown:
            lines += [""] if group else ["", f"{heading}:"]
        for command, recipe in shown.items():
            summary, start = listed[recipe].summary.rstrip(".:"), f"  {command}".ljust(width)
            lines += textwrap.wrap(summary, 104, initial_indent=start, subsequent_indent=" " * width)
    if group is None:
        last += f'\n`eval "$({PROGRAM} completion bash)"` completes commands and options (also zsh; fish: `| source`).'
    return "\n".join([title, "", usage, *lines, "", last, ""])


def _help(command: str, rest: Sequence[str]) -> str | None:
    """The text of `--help`; None if only the recipe itself knows it."""
    recipe, usage = COMMANDS[command], f"{PROGRAM} {command}"
    listed = _recipes()
    description = _with_command_names(listed[recipe].description)
    main_options: Sequence[str] = MAIN_OPTIONS.get(recipe, ())
    if recipe == "evaluate":
        task = next((word for word in rest if not word.startswith("-")), None)
        trained = next((item for item in listed.values() if item.trains and task in (item.task, item.name)), None)
        if trained is None:
            return help_page(f"{usage} TASK", description, [])
        recipe, usage = trained.name, f"{usage} {trained.task}"
        main_options = [name for name in MAIN_OPTIONS.get(recipe, ()) if name not in TRAINING_ONLY]
    if recipe == "reproduce":
        return (
            None
            if any("/" in word for word in rest)
            else help_page(f"{usage} EXPERIMENT [--scale X]", description, [])
        )
    options = stored_options(recipe)
    return help_page(usage, description, options, main_options) if options else None


def _with_command_names(text: str) -> str:
    """A description whose examples call this command instead of the modules."""
    for command, recipe in sorted(COMMANDS.items(), key=lambda item: -len(item[1])):
        text = text.replace(f"python -m hf_hybrid.recipes.{recipe}", f"{PROGRAM} {command}")
    return text


# ---------------------------------------------------------------------------------------------------------- completion


def _completion_script(words: Sequence[str]) -> str:
    if not words or words[0] not in _COMPLETION:
        raise _Mistake(f"`completion` takes one of {', '.join(_COMPLETION)}; got {' '.join(words) or 'nothing'}.")
    return _COMPLETION[words[0]]


def completions(words: Sequence[str]) -> list[str]:
    """What the last of the words, which may be empty, can be completed to."""
    *before, last = words or [""]
    if last.startswith("-") and before:
        try:
            command, rest = _find(list(before))
        except _Mistake:
            return []
        recipe = COMMANDS.get(command, "")
        if recipe == "evaluate":
            recipe = next((item.name for item in list_recipes() if item.trains and item.task in rest), "")
        names = [option.name for option in stored_options(recipe)] + ["help", "help-all", "quiet"]
        return [f"--{name}" for name in names if f"--{name}".startswith(last)]
    if len(before) == 0:
        known = list(dict.fromkeys([*(command.split()[0] for command in COMMANDS), "completion"]))
    elif before == ["evaluate"]:
        known = [item.task for item in list_recipes() if item.trains]
    elif before == ["reproduce"]:
        known = [*experiment_names(), "--list"]
    elif before == ["completion"]:
        known = list(_COMPLETION)
    elif len(before) == 1:
        known = [command.split()[1] for command in COMMANDS if command.startswith(f"{before[0]} ")]
    else:
        known = []
    return [word for word in known if word.startswith(last)]


if __name__ == "__main__":
    sys.exit(main())
