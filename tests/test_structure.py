"""The layout that docs and design promise: which file may import which, and how large a file gets.

Everything is read with `ast`, imports inside of functions too; nothing of the package is imported but the table of architectures.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_hybrid
from hf_hybrid.auto import ARCHITECTURES, Architecture
from hf_hybrid.remote_code import remote_code

PACKAGE = "hf_hybrid"
ROOT = Path(hf_hybrid.__file__).parent
SOURCES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}

# One line per level, from the bottom: a file imports from its own level and from those above its line, never from below it.
# An area is a folder, or a file at the root of the package; "modeling/*" are the folders of the architectures. Within a level
# only circles are forbidden, and one architecture never imports another. The package itself, and what is needed to
# open it, come after everything.
LEVELS: tuple[set[str], ...] = (
    {"ops", "configuration"},
    {"layers"},
    {"modeling"},
    {"modeling/*"},
    {
        "auto",
        "compatibility",
        "metric_names",
        "metrics",
        "new_folder",
        "offline_metrics",
        "processing",
        "published",
        "tokenization",
    },
    {"conversion", "data", "export", "hub", "memory", "model_card", "pipelines", "remote_code", "training", "viz"},
    {"recipes/support"},
    {"app"},
    {"recipes"},
    {"cli"},
    {"__main__"},
)
LEVEL = {area: number for number, level in enumerate(LEVELS) for area in level}
EXPORTED = ("configuration", "layers", "modeling", "ops")  # folders that an export lays out flat
# The package and its table are imported by name where a version or the registration is needed.
OF_THE_PACKAGE = {"__init__", "public_names"}
LONGEST_FILE, LONGEST_FUNCTION = 600, 60


def area_of(source: str) -> str:
    """Folder of a file, or the file itself at the root of the package."""
    parts = source.split("/")
    if parts[0] == "modeling" and len(parts) == 3:
        return "modeling/*"
    if parts[0] == "recipes" and len(parts) == 3:
        return f"recipes/{parts[1]}"
    return parts[0]


def architecture_of(source: str) -> str | None:
    """Folder of the architecture that a file belongs to, if it belongs to one."""
    parts = source.split("/")
    return parts[1] if parts[0] == "modeling" and len(parts) == 3 else None


def is_module(name: str) -> bool:
    return name in SOURCES or f"{name}/__init__" in SOURCES


def imports_of(source: str, run: bool = False) -> Iterator[tuple[ast.stmt, list[str]]]:
    """Every import statement of the package itself, and the files it means; with `run` without those for types alone."""
    folder = source.split("/")[:-1]
    tree = ast.parse(SOURCES[source].read_text(encoding="utf-8"))
    branches = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    for_types = {id(node) for branch in branches for node in ast.walk(branch)}
    for node in ast.walk(tree):
        if run and id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            if names:
                yield node, [file_of("/".join(name.split(".")[1:])) for name in names]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*folder[: len(folder) - node.level + 1], *module]
            elif module[0] == PACKAGE:
                base = module[1:]
            else:
                continue
            inner = ["/".join([*base, alias.name]) for alias in node.names]
            yield node, [file_of(name if is_module(name) else "/".join(base)) for name in inner]


def file_of(name: str) -> str:
    return name if name in SOURCES else f"{name}/__init__".lstrip("/")


IMPORTS = {source: {target for _, targets in imports_of(source) for target in targets} for source in SOURCES}
RUN = {source: {target for _, targets in imports_of(source, run=True) for target in targets} for source in SOURCES}


def closure(source: str) -> set[str]:
    """Everything of the package that a file imports when it runs, directly or not."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        for target in RUN[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


# ------------------------------------------------------------------------------------------------------------- imports


def test_every_file_has_a_level() -> None:
    areas = {area_of(source) for source in SOURCES} - OF_THE_PACKAGE
    assert areas <= set(LEVEL), "Say in LEVELS where these stand."


def test_no_import_points_upward() -> None:
    upward = [
        f"{source} imports {target}"
        for source, targets in IMPORTS.items()
        for target in targets
        if area_of(source) not in OF_THE_PACKAGE
        and area_of(target) not in OF_THE_PACKAGE
        and LEVEL[area_of(source)] < LEVEL[area_of(target)]
    ]
    assert not upward


def test_only_what_stands_high_imports_the_package() -> None:
    """The package registers the models when it is imported; what the models consist of must not need that."""
    lowest = LEVEL["conversion"]
    assert not [
        source
        for source, targets in IMPORTS.items()
        if "__init__" in targets and area_of(source) not in OF_THE_PACKAGE and LEVEL[area_of(source)] < lowest
    ]


def test_there_is_no_circle() -> None:
    circles = [
        source for source in SOURCES if source not in OF_THE_PACKAGE and source in closure(source) - OF_THE_PACKAGE
    ]
    assert not circles


def test_architectures_do_not_know_each_other() -> None:
    strangers = [
        f"{source} imports {target}"
        for source, targets in IMPORTS.items()
        for target in targets
        if architecture_of(source) and architecture_of(target) and architecture_of(source) != architecture_of(target)
    ]
    assert not strangers


def test_ops_import_torch_alone() -> None:
    """And the standard library."""
    import sys

    foreign = defaultdict(set)
    for source in SOURCES:
        if area_of(source) != "ops":
            continue
        for node in ast.walk(ast.parse(SOURCES[source].read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            foreign[source] |= (
                {name.split(".")[0] for name in names} - {"torch", "__future__"} - sys.stdlib_module_names
            )
    assert not {source: names for source, names in foreign.items() if names}


def test_layers_see_no_configuration() -> None:
    """Neither a file of ours, nor the class of Transformers, nor an argument of that name."""
    for source in SOURCES:
        if area_of(source) != "layers":
            continue
        assert not [target for target in closure(source) if area_of(target) == "configuration"], source
        text = SOURCES[source].read_text(encoding="utf-8")
        assert "PreTrainedConfig" not in text and "PretrainedConfig" not in text, source
        for node in ast.walk(ast.parse(text)):
            assert not (isinstance(node, ast.arg) and node.arg == "config"), f"{source}:{node.lineno}"


def test_layers_are_used_by_two_architectures() -> None:
    users = defaultdict(set)
    for source in SOURCES:
        architecture = architecture_of(source)
        if architecture is not None:
            for target in closure(source):
                users[target].add(architecture)
    layers = [source for source in SOURCES if area_of(source) == "layers" and not source.endswith("__init__")]
    assert not {source: users[source] for source in layers if len(users[source]) < 2}


def test_exported_files_import_leaf_modules_by_relative_imports() -> None:
    """The export rewrites `from .x import y` line by line, and knows nothing else."""
    for source in SOURCES:
        if source.split("/")[0] not in EXPORTED:
            continue
        for node, targets in imports_of(source):
            place = f"{source}:{node.lineno}"
            assert isinstance(node, ast.ImportFrom) and node.level and node.module, place
            base = source.split("/")[:-1]
            named = "/".join([*base[: len(base) - node.level + 1], *node.module.split(".")])
            assert set(targets) == {named} and named in SOURCES, f"{place} imports from a package"


def test_names_of_exported_files_are_unique() -> None:
    names = Counter(
        source.rpartition("/")[2]
        for source in SOURCES
        if source.split("/")[0] in (*EXPORTED, "processing", "tokenization") and not source.endswith("__init__")
    )
    assert not [name for name, number in names.items() if number > 1]


# -------------------------------------------------------------------------------------------------------------- export


def owners() -> dict[str, set[str]]:
    """Architectures that a file serves: those whose own files reach it, not only through what all share in `modeling`."""
    found = defaultdict(set)
    for source in SOURCES:
        architecture = architecture_of(source)
        if architecture is None:
            continue
        waiting, seen = [source], {source}
        while waiting:
            current = waiting.pop()
            found[current].add(architecture)
            if area_of(current) != "modeling":
                waiting += IMPORTS[current] - seen
                seen |= IMPORTS[current]
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_an_export_holds_no_file_of_another_architecture(architecture: Architecture) -> None:
    own = architecture.modeling.split(".")[1]
    # What stands in `modeling` itself all share: it may come with the heads, whatever else imports it.
    served = {
        f"{name.rpartition('/')[2]}.py": names for name, names in owners().items() if area_of(name) != "modeling"
    }
    assert not {name for name in remote_code(architecture).files if own not in served.get(name, {own})}


# --------------------------------------------------------------------------------------------------------------- sizes


def test_no_file_is_too_long() -> None:
    lengths = {source: len(path.read_text(encoding="utf-8").splitlines()) for source, path in SOURCES.items()}
    assert not {source: length for source, length in lengths.items() if length > LONGEST_FILE}


def test_no_function_is_too_long() -> None:
    """Lines of a function without those of its docstring."""
    found = {}
    for source, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > LONGEST_FUNCTION:
                found[f"{source}:{node.lineno} {node.name}"] = length
    assert not found


# ------------------------------------------------------------------------------------------------------------- caches

CACHE_FILES = {source for source in SOURCES if source == "modeling/cache" or source.endswith("_cache")} | {
    "modeling/fixed_steps"  # its state takes the place of a cache
}
CACHE_INTERNALS = {
    "conv_states",
    "cross_attention_cache",
    "cumulative_length",
    "has_previous_state",
    "is_updated",
    "layer_class_to_replicate",
    "recurrent_states",
    "sliding_window_tensor",
    "update_recurrent_state",
}


def cache_internals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a file that belongs to the cache classes of Transformers."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("cache_utils"):
            names |= {alias.name for alias in node.names}
            yield from ((node.lineno, name) for name in names - {"Cache", "EncoderDecoderCache"})  # for annotations
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in CACHE_INTERNALS:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Attribute) and node.attr == "layers":
            owner = ast.unparse(node.value)
            if any(word in owner for word in ("cache", "past", "carried", "memory")):
                yield node.lineno, f"{owner}.layers"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            kinds = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
            yield from ((node.lineno, f"isinstance(..., {kind})") for kind in kinds & names)


def test_only_cache_files_touch_the_caches_of_transformers() -> None:
    found = [
        f"{source}:{line}: {name}"
        for source in SOURCES.keys() - CACHE_FILES
        for line, name in cache_internals(ast.parse(SOURCES[source].read_text(encoding="utf-8")))
    ]
    assert not found, sorted(found)
    inside = ast.parse(SOURCES["modeling/spade/spade_cache"].read_text(encoding="utf-8"))
    assert {name for _, name in cache_internals(inside)} >= {"is_updated", "cross_attention_cache"}  # it does look


# Where the type of a device names a place for data and not the form of an operation.
ASKING_FOR_DEVICES = {
    "ops/autocast",
    "ops/branches",
    "ops/flex_local",
    "ops/products",
    "ops/relative_position",
    "ops/sdpa_blocks",
    "training/cpu_products",
    "training/muon",
    "training/pieces_trainer",
    "modeling/spade/spade_heads",
}


def test_forms_of_operations_are_chosen_in_one_place() -> None:
    """A test such as `tensor.device.type == "cpu"` would be out of reach of `forced_branch`."""
    asking = {
        name
        for name, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and (node.attr in ("is_cuda", "is_cpu", "is_mps"))
        or (isinstance(node, ast.Attribute) and node.attr == "type" and "device" in ast.unparse(node.value))
    }
    assert asking <= ASKING_FOR_DEVICES
