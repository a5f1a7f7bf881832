"""Complete tasks, each a `main(args) -> dict` that is also a command: `hf-hybrid <task>`, or `python -m hf_hybrid.recipes.<task>`.

Every module here is a command; shared code is in `support`.
"""

from __future__ import annotations

import ast
import difflib
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .support.recipe import Recipe


@dataclass(frozen=True)
class Listed:
    """An entry of the list of recipes.

    Attributes:
        name: name of its module.
        summary: what it does, in one line.
        description: what it does, with examples: the text of `--help`.
        trains: whether it trains a model, which `evaluate` can then evaluate.
    """

    name: str
    summary: str
    description: str
    trains: bool

    @property
    def task(self) -> str:
        """The name without its verb: `glue` of `finetune_glue`."""
        return self.name.partition("_")[2]


@cache
def list_recipes() -> tuple[Listed, ...]:
    """All recipes by name, read from their sources: nothing is imported, so listing them is fast."""
    found = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        if module.ispkg:
            continue
        loader = getattr(find_spec(f"{__name__}.{module.name}"), "loader", None)
        tree = ast.parse(loader.get_source(f"{__name__}.{module.name}"))  # type: ignore[union-attr]
        names = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}  # type: ignore[attr-defined]
        description = ast.get_docstring(tree, clean=False) or ""
        summary = description.partition("\n")[0]
        found.append(Listed(module.name, summary, description, trains="RECIPE" in names))
    return tuple(found)


def training_recipe(name: str | None) -> Recipe:
    """The recipe of a training task by its name, or by its task alone: `finetune_glue` or `glue`.

    Raises:
        ValueError: there is no such recipe; the message lists those that exist.
    """
    listed = [item for item in list_recipes() if item.trains]
    found = next((item for item in listed if name in (item.name, item.task)), None)
    if found is None:
        close = difflib.get_close_matches(str(name), [word for item in listed for word in (item.task, item.name)], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"The task must be one of {', '.join(item.task for item in listed)}; got {name!r}.{hint}")
    return import_module(f".{found.name}", __name__).RECIPE
