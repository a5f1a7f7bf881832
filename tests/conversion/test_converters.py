"""What all converters of official checkpoints have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from check import read_vectors

from hf_hybrid.auto import ARCHITECTURES, load_converter
from hf_hybrid.conversion.common import Converter

VECTORS = Path(__file__).parents[1] / "parity" / "vectors"
CONVERTERS = {found.model_type: load_converter(found) for found in ARCHITECTURES if found.converter is not None}
FOLDERS = {"spade": ("encdec_", "lm_"), "mega": ("off_",), "seqboat": ("cls_", "lm_")}
FILES = [
    (folder, path)
    for folder, prefixes in FOLDERS.items()
    for path in sorted((VECTORS / folder).glob("*.safetensors"))
    if path.stem.startswith(prefixes)
]


@pytest.mark.parametrize("model_type", CONVERTERS)
def test_a_converter_is_complete(model_type: str) -> None:
    functions = {name for name in vars(Converter) if not name.startswith("_")}
    assert functions <= set(CONVERTERS[model_type].__all__)


@pytest.mark.parametrize(("folder", "path"), FILES, ids=[f"{folder}-{path.stem}" for folder, path in FILES])
def test_official_options_belong_to_one_architecture(folder: str, path: Path) -> None:
    options: Any = read_vectors(path)[0]
    modules = {id(module): module for module in CONVERTERS.values()}.values()
    assert [module for module in modules if module.recognises(options)] == [CONVERTERS[folder]]
