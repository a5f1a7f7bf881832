"""The Space that `push --space True` writes runs from its own folder, and says what it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from hf_hybrid.app.space import GRADIO_VERSION, space_requirements, write_space
from hf_hybrid.recipes import push_to_hub

ROOT = Path(__file__).parents[2]


def test_a_space_runs_from_its_folder(checkpoint: Path, tmp_path: Path) -> None:
    options = {"model_name_or_path": str(checkpoint), "output_dir": str(tmp_path / "export"), "space": True}
    result = push_to_hub.main(options | {"license": "mit"})
    space = Path(result["space_dir"])
    assert space == tmp_path / "export-space"
    assert {path.name for path in space.iterdir()} == {"README.md", "app.py", "hf_hybrid", "model", "requirements.txt"}
    header = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert header["app_file"] == "app.py" and header["sdk_version"] == GRADIO_VERSION and header["license"] == "mit"
    # What `app.py` does, but for the server: another machine has no other copy of the package, and no other folder.
    code = """
import json, runpy, sys
sys.path.insert(0, sys.argv[1])
import hf_hybrid.recipes.app as app
asked = []
app.main = asked.append
runpy.run_path(sys.argv[1] + "/app.py", run_name="__main__")
from hf_hybrid.app.opening import open_checkpoint
from hf_hybrid.app.writing import Decoding, write
opened = open_checkpoint(asked[0]["model_name_or_path"])
print(json.dumps([app.__file__, asked[0], len(list(write(opened, "a list", Decoding(4))))]))
"""
    moved = space.rename(tmp_path / "elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(moved)], cwd=moved, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    file, asked, states = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(moved) and states
    assert asked == {"model_name_or_path": str(moved / "model"), "fixed": True, "host": "0.0.0.0", "port": 7860}
    with pytest.raises(FileExistsError):
        (tmp_path / "export-space").mkdir()
        push_to_hub.main(options | {"output_dir": str(tmp_path / "export")})


def test_a_space_of_a_model_on_the_hub(tmp_path: Path) -> None:
    write_space(tmp_path / "space", title='a"""b', repo_id="me/model")
    program = (tmp_path / "space" / "app.py").read_text()
    compile(program, "app.py", "exec")
    assert "'me/model'" in program and not (tmp_path / "space" / "model").exists()
    assert "models:\n- me/model" in (tmp_path / "space" / "README.md").read_text()
    assert not list((tmp_path / "space").rglob("__pycache__"))
    with pytest.raises(ValueError, match="either `repo_id`"):
        write_space(tmp_path / "other", title="a")


def test_what_a_space_needs() -> None:
    names = {re.match(r"[\w-]+", line)[0] for line in space_requirements()}
    assert names == {"torch", "transformers", "safetensors", "matplotlib"}
    assert f"gradio=={GRADIO_VERSION}" in (ROOT / "constraints.txt").read_text().split()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["app"]
    (bound,) = (Requirement(line).specifier for line in settings if line.startswith("gradio"))
    assert bound.contains(GRADIO_VERSION)
