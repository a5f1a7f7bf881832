"""The files of a Hub Space: a page that shows one model to everybody who visits it.

A Space holds this package as source beside its `app.py`, so that it runs whatever version of the package is published.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from importlib.metadata import requires
from pathlib import Path

import yaml

from ..new_folder import new_folder
from ..published import SPACE_MODEL, SPACE_PACKAGE, write_published

GRADIO_VERSION = "6.31.0"  # what the Hub installs; a test compares it with constraints.txt
PYTHON_VERSION = "3.11"
PORT = 7860  # where the Hub expects the page

_PROGRAM = '''\
"""The page of this Space: {title}. The package beside it is all that it needs (requirements.txt)."""

from pathlib import Path

from hf_hybrid.recipes.app import main

if __name__ == "__main__":
    main({{"model_name_or_path": {model}, "fixed": True, "host": "0.0.0.0", "port": {port}}})
'''
_CARD = """\
A page to try {what}, written by `hf-hybrid push --space True`. Visitors share one processor and wait for each other. What the model
writes is not to be taken for facts.
"""


def write_space(
    folder: str | os.PathLike[str],
    *,
    title: str,
    repo_id: str | None = None,
    model_folder: Path | None = None,
    license: str | None = None,
) -> Path:
    """Writes a Space into a folder.

    Args:
        folder: folder to write; it must be new or empty.
        title: name of the page.
        repo_id: model on the Hub that the page loads.
        model_folder: folder of a model to be part of the Space instead.
        license: licence of the page.

    Raises:
        ValueError: not exactly one of `repo_id` and `model_folder` is given.
        FileExistsError: the folder is not empty.
    """
    if (repo_id is None) == (model_folder is None):
        raise ValueError("Pass either `repo_id`, a model on the Hub, or `model_folder`, a model to include.")
    with new_folder(folder, "folder of the Space") as scratch, tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        package = Path(__file__).parents[1]
        shutil.copytree(package, source / SPACE_PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "configs"))
        if model_folder is not None:
            shutil.copytree(model_folder, source / SPACE_MODEL)
        model = repr(repo_id) if repo_id else f'str(Path(__file__).with_name("{SPACE_MODEL}"))'
        program = _PROGRAM.format(title=_plain(title), model=model, port=PORT)
        (source / "app.py").write_text(program, encoding="utf-8")
        (source / "requirements.txt").write_text("\n".join(space_requirements()) + "\n", encoding="utf-8")
        (source / "README.md").write_text(_readme(title, repo_id, license), encoding="utf-8")
        write_published(source, scratch, space=True)
    return Path(folder)


def space_requirements() -> list[str]:
    """What the page needs beside Gradio, which the Hub installs: the packages of the models, and of pictures."""
    found = []
    for line in requires(__package__.partition(".")[0]) or ():
        requirement, _, marker = line.partition(";")
        if not marker or re.search(r"extra\s*==\s*['\"]viz['\"]", marker):
            found.append(requirement.strip())
    return found


def _readme(title: str, repo_id: str | None, license: str | None) -> str:
    header = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "python_version": PYTHON_VERSION,
        "app_file": "app.py",
        "pinned": False,
        **({"models": [repo_id]} if repo_id else {}),
        **({"license": license} if license else {}),
    }
    what = f"[{repo_id}](https://huggingface.co/{repo_id})" if repo_id else title
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n# {title}\n\n{_CARD.format(what=what)}"


def _plain(title: str) -> str:
    """A title that can stand in a docstring."""
    return re.sub(r"[^\w .,/-]", "", title)
