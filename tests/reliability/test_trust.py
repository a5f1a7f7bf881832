"""The manifest of an export is checked before its code can run, at every place that trusts, and nothing added escapes it."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hf_hybrid
from hf_hybrid.configuration.configuration_spade import SpadeLMConfig
from hf_hybrid.hub import MANIFEST_FILE, export_remote_code, verify_export
from hf_hybrid.recipes import lm_eval
from hf_hybrid.remote_code import check_export

PACKAGE = Path(hf_hybrid.__file__).parent


@pytest.fixture
def export(tmp_path: Path) -> Path:
    config = SpadeLMConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, window_size=8,
        ssm_state_size=4,
    )  # fmt: skip
    export_remote_code(AutoModelForCausalLM.from_config(config), tmp_path / "export")
    verify_export(tmp_path / "export")
    return tmp_path / "export"


def add(folder: Path, how: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "generate.py").write_text("")
    match how:
        case "link to a folder":
            (folder / "custom_generate").symlink_to(outside)
        case "link to nothing":
            (folder / "later.py").symlink_to(outside / "not yet")
        case "link into .git":
            (folder / ".git" / "objects").mkdir(parents=True)
            (folder / ".git" / "objects" / "x").symlink_to(outside)
        case "link named .git":
            (folder / ".git").symlink_to(outside)
        case "nested .cache":
            (folder / "custom_generate" / ".cache").mkdir(parents=True)
            (folder / "custom_generate" / ".cache" / "notes.txt").write_text("")
        case "replaced by a folder's link":
            (folder / "config.json").unlink()
            (folder / "config.json").symlink_to(outside)
        case _:
            path = folder / how
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("link to a folder", "custom_generate was added"),
        ("link to nothing", "later.py was added"),
        ("link into .git", ".git/objects/x was added"),
        ("link named .git", ".git was added"),
        ("nested .cache", "custom_generate/.cache/notes.txt was added"),
        ("replaced by a folder's link", "config.json is a link to a folder"),
        (".git/evil.py", ".git/evil.py was added"),
        (".cache/huggingface/model.safetensors", ".cache/huggingface/model.safetensors was added"),
        (".cache/deep/er/evil.so", ".cache/deep/er/evil.so was added"),
    ],
)
def test_what_is_added_is_seen(export, how, named):
    check_export(export)  # what was once right is looked at again
    add(export, how)
    for check in (verify_export, check_export):
        with pytest.raises(ValueError, match=named):
            check(export)


def test_what_tools_keep_in_a_copy_is_no_change(export):
    for name in (
        ".git/HEAD",
        ".git/hooks/pre-push.sample",
        ".cache/huggingface/download/config.json.metadata",
        ".gitattributes",
    ):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_text("")
    verify_export(export)


def test_a_change_that_hides_its_time_is_seen(export):
    check_export(export)
    path = export / "config.json"
    before = path.stat()
    path.write_text(path.read_text().replace("16", "17"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="config.json was changed"):
        check_export(export)


@pytest.mark.parametrize("form", [["--model_args", "{}"], ["--model_args={}"]])
@pytest.mark.parametrize("key", ["pretrained", "tokenizer", "peft"])
def test_the_harness_gets_no_changed_export(export, form, key):
    (export / "evil.py").write_text("")
    given = f"{key}={export},trust_remote_code=True"
    with pytest.raises(ValueError, match="evil.py was added"):
        lm_eval.with_backend([word.format(given) for word in form])


def test_the_checkpoint_below_an_adapter_is_checked(export, tmp_path):
    pytest.importorskip("peft")
    from hf_hybrid.training.adapters import load_adapted_model

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(export)}))
    from safetensors.numpy import save_file

    save_file({}, adapter / "adapter_model.safetensors")
    (export / "evil.py").write_text("")
    with pytest.raises(ValueError, match="evil.py was added"):
        load_adapted_model(AutoModelForCausalLM, adapter, trust_remote_code=True)


def trusting_loads() -> list[tuple[str, ast.FunctionDef]]:
    """Functions that load something by name with `trust_remote_code`, given or passed through."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if "modeling" in path.parts:
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            for call in ast.walk(function):
                is_load = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
                if is_load and call.func.attr == "from_pretrained":
                    names = {keyword.arg for keyword in call.keywords}
                    if None in names or "trust_remote_code" in names:
                        found.append((f"{path.relative_to(PACKAGE)}:{call.lineno}", function))
    return found


def test_every_load_that_trusts_checks_first():
    loads = trusting_loads()
    assert len(loads) >= 6
    for place, function in loads:
        line = int(place.rpartition(":")[2])
        checks = [
            node.lineno
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check_export"
        ]
        assert checks and min(checks) < line, f"{place} loads with trust_remote_code before `check_export`"


def test_a_folder_without_manifest_passes(tmp_path):
    check_export(tmp_path)
    check_export("somebody/name")
    (tmp_path / MANIFEST_FILE).symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no manifest"):
        check_export(tmp_path)
