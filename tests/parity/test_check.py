"""The parity harness fails when it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import check
import pytest
import torch
from comparison import Row, largest_error
from safetensors import safe_open
from safetensors.torch import save_file

VECTOR = Path(__file__).parent / "vectors" / "spade" / "lm_stack.safetensors"


@pytest.fixture
def vector():
    """Metadata and tensors of the smallest file."""
    with safe_open(VECTOR, framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write(folder: Path, metadata: dict, tensors: dict, name: str = "case") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors", metadata=metadata)
    return folder


def test_success_is_zero_and_prints_errors_and_tolerances(capsys):
    assert check.main([str(VECTOR)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.strip().startswith("output.log_probs")]
    assert "<= 5.0e-05" in line and " ok" in line and "float64" in line
    assert lines[-1].startswith("1 of 1 files ok")


@pytest.mark.parametrize(
    "name", ["output.hidden.1", "output.log_probs", "post.decoder.layers.0.s4_module.s4.kernel.kernel.C"]
)
def test_an_exceeded_tolerance_fails(tmp_path, vector, capsys, name):
    metadata, tensors = vector
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1e-3
    assert check.main([str(write(tmp_path, metadata, tensors))]) == 1
    output = capsys.readouterr().out
    assert len([line for line in output.splitlines() if " FAIL" in line]) == 1
    assert "failed: case.safetensors" in output


def test_wrong_parameters_fail(tmp_path, vector):
    metadata, tensors = vector
    name = "param.decoder.layers.1.self_attn.k.weight"
    tensors[name] = tensors[name] * 1.01
    assert check.main([str(write(tmp_path, metadata, tensors))]) == 1


def test_nan_fails(tmp_path, vector):
    metadata, tensors = vector
    tensors["output.final"] = torch.full_like(tensors["output.final"], torch.nan)
    assert check.main([str(write(tmp_path, metadata, tensors))]) == 1
    assert not Row("x", torch.nan, 1.0).is_ok


def test_an_unknown_output_fails_by_name(tmp_path, vector, capsys):
    metadata, tensors = vector
    tensors["output.l7_s4"] = torch.zeros(1)
    tensors["grad.unknown.weight"] = torch.zeros(1)
    assert check.main([str(write(tmp_path, metadata, tensors))]) == 1
    assert "the adapter does not know them: grad.unknown.weight, output.l7_s4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "unheard_of"}, "no adapter for 'unheard_of'"),
        ({"model": None}, "no adapter for None"),
        ({"s4_local_combine": "multiply"}, "s4_local_combine"),
        ({"num_layers": 3}, "missing: `decoder.layers.2."),
    ],
)
def test_a_file_that_cannot_be_checked_fails(tmp_path, vector, capsys, change, message):
    metadata, tensors = vector
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | change)
    assert check.main([str(write(tmp_path, metadata, tensors))]) == 1
    assert message in capsys.readouterr().out


def test_damaged_and_bare_files_fail(tmp_path, vector, capsys):
    (tmp_path / "damaged.safetensors").write_bytes(VECTOR.read_bytes()[:1000])
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    metadata, tensors = vector
    write(tmp_path, {"source": "nowhere"}, tensors, "without_config")
    write(tmp_path, metadata | {"config": "[]"}, tensors, "no_object")
    without_outputs = {name: value for name, value in tensors.items() if name.startswith(("param", "input"))}
    write(tmp_path, metadata, without_outputs, "without_outputs")
    assert check.main([str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert output.count("FAIL") == 5 and "0 of 5 files ok" in output
    assert "the metadata has no `config`" in output and "the file holds no outputs" in output


def test_a_good_file_beside_a_bad_one_still_fails(tmp_path, vector):
    metadata, tensors = vector
    write(tmp_path / "good", metadata, tensors)
    write(tmp_path / "bad", metadata | {"config": "{}"}, tensors)
    assert check.main([str(tmp_path / "good")]) == 0
    assert check.main([str(tmp_path / "good"), str(tmp_path / "bad")]) == 1


def test_folders_without_files_fail(tmp_path, capsys):
    assert check.main([str(tmp_path), str(tmp_path / "absent")]) == 1
    output = capsys.readouterr().out
    assert "no .safetensors files" in output and "no such folder" in output
    assert check.main([str(VECTOR), str(tmp_path)]) == 1


def test_largest_error():
    expected = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    actual = expected + torch.tensor([[0.0, 0.5], [0.0, 2.0]])
    assert largest_error(actual, expected) == 2.0
    assert largest_error(actual, expected, relative=True) == 0.5
    assert largest_error(actual, expected, torch.tensor([[True], [False]])) == 0.5
    assert largest_error(torch.ones(2), torch.zeros(2), relative=True) == 1.0
    with pytest.raises(ValueError, match="shape"):
        largest_error(actual[0], expected)
    with pytest.raises(ValueError, match="no real position"):
        largest_error(actual, expected, torch.zeros(2, 1).bool())


def test_the_command_line_works_from_any_folder(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(check.__file__)), str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "no .safetensors files" in result.stdout
