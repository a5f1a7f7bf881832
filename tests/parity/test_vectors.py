"""Every stored output of an official or independent implementation is reproduced within its tolerance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from check import check_file, read_vectors
from safetensors import safe_open
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "vectors"
FILES = sorted(FOLDER.rglob("*.safetensors"))
PREFILL = FOLDER / "harder" / "mega" / "hf_h2_clm_softmax_simple_postnorm.safetensors"
# Files by folder, so that none is lost.
NUMBERS = {
    "bst": 6,
    "harder/longvq": 3,
    "harder/mega": 2,
    "harder/seqboat": 1,
    "longvq": 7,
    "mega": 17,
    "s4": 8,
    "seqboat": 8,
    "spade": 5,
}


def name_of(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def test_vectors_are_present() -> None:
    folders = [path.parent.relative_to(FOLDER).as_posix() for path in FILES]
    assert {folder: folders.count(folder) for folder in folders} == NUMBERS


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_stored_vectors_are_reproduced(path: Path) -> None:
    report = check_file(path)
    assert not report.problem
    assert report.rows
    assert not [row for row in report.rows if not row.is_ok]


@pytest.mark.parametrize("prefix", ["output", "output64"])
def test_a_wrong_step_after_a_prefill_is_seen(tmp_path: Path, prefix: str) -> None:
    """The length of the prefill is found from the stored logits, which must not make every logits right."""
    config, tensors = read_vectors(PREFILL)
    name = f"{prefix}.hf_step_after_prefill_logits"
    tensors[name] = tensors[name] + 1e-3
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path, metadata=metadata_of(PREFILL))
    assert [row.name for row in check_file(path).rows if not row.is_ok] == [name]


@pytest.mark.parametrize("length", [1, 4, 9])
def test_a_prefill_may_have_any_length(tmp_path: Path, length: int) -> None:
    _, tensors = read_vectors(PREFILL)
    for prefix in ("output", "output64"):
        parallel = tensors[f"{prefix}.parallel_step_logits"]
        tensors[f"{prefix}.hf_step_after_prefill_logits"] = parallel[:, length : length + 1].contiguous()
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata=metadata_of(PREFILL))
    assert check_file(path).is_ok


@pytest.mark.parametrize("name", ["output.state.window_mask", "output.state.window_values"])
def test_the_window_of_one_token_has_its_shape(tmp_path: Path, name: str) -> None:
    source = FOLDER / "harder" / "longvq" / "layer_causal_window1.safetensors"
    _, tensors = read_vectors(source)
    shape = list(tensors[name].shape)
    shape[1 if name.endswith("mask") else 2] = 1
    tensors[name] = torch.ones(shape, dtype=tensors[name].dtype)
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path, metadata=metadata_of(source))
    assert not check_file(path).is_ok


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()
