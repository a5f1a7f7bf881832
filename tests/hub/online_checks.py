"""Pushing to and pulling from a Hub; `test_push.py` runs this file in a process of its own.

The server must be named before huggingface_hub is imported, so nothing may have imported it yet.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hub_server import TOKEN, USER, HubServer

assert "huggingface_hub" not in sys.modules, "run this file in a process of its own"
SERVER = HubServer()
HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ |= {
    "HF_ENDPOINT": SERVER.url,
    "HF_HOME": HOME.name,
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)

import pytest
import torch
from clean_process import run_without_package
from datasets import Dataset
from factories import VARIANTS, Case
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid.hub import MANIFEST_FILE, card_of_model, export_remote_code, push, push_folder, verify_export
from hf_hybrid.recipes import pretrain_clm
from hf_hybrid.recipes import push_to_hub as recipe
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer
from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.trainer import HybridTrainer

CASE = Case("spade_lm", "AutoModelForCausalLM", next(iter(VARIANTS["spade_lm"])))


def small_model(**overrides: Any) -> Any:
    return CASE.model(vocab_size=320, **overrides)


@pytest.fixture(autouse=True)
def empty_server() -> Iterator[None]:
    SERVER.repositories.clear()
    SERVER.objects.clear()
    SERVER.failures.clear()
    yield


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------ push and pull


@pytest.mark.usefixtures("token")
def test_a_page_beside_the_model(tmp_path: Path) -> None:
    """A Space that loads the model from its repository, with the package and without anything of this machine."""
    small_model().save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    options = {"model_name_or_path": str(tmp_path / "small"), "repo_id": "small", "space": True, "license": "mit"}
    result = recipe.main(options)
    assert result["space_url"].endswith(f"{USER}/small-space") and "space_dir" not in result
    files = SERVER.files(f"{USER}/small-space")
    assert f"'{USER}/small'" in files["app.py"].decode() and b"sdk: gradio" in files["README.md"]
    assert "hf_hybrid/app/page.py" in files and not [name for name in files if name.endswith(".safetensors")]
    assert not [name for name, text in files.items() if str(tmp_path).encode() in text]
    assert recipe.main(options)["space_url"] == result["space_url"]  # the same files: nothing to do


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["whole", "sharded"])
def test_what_is_pulled_is_what_was_pushed(shard_size: str) -> None:
    model, tokenizer = small_model(), byte_tokenizer(num_sentinels=4)
    address = push(model, f"{USER}/small", tokenizer, max_shard_size=shard_size)
    assert address == f"{SERVER.url}/{USER}/small"
    files = SERVER.files(f"{USER}/small")
    weights = [name for name in files if name.endswith(".safetensors")]
    assert (len(weights) == 1) == (shard_size == "5GB")
    large = SERVER.repositories[f"{USER}/small"].large
    assert large and {"README.md", MANIFEST_FILE, "modeling_spade_lm.py", "tokenizer.json"} <= files.keys()
    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{USER}/small"), model)
    pulled = AutoTokenizer.from_pretrained(f"{USER}/small")
    assert pulled("naïve").input_ids == tokenizer("naïve").input_ids
    verify_export(snapshot_download(f"{USER}/small"))
    card = ModelCard.load(f"{USER}/small")
    assert ("POST", "/api/validate-yaml") in SERVER.requests  # the push had the card checked
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"


PULL = """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(arguments, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(arguments)
inputs = tokenizer("To be, or not", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
generated = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, num_beams=2, do_sample=False)
answer = {"module": type(model).__module__, "logits": logits.double().tolist(), "generated": generated.tolist()}
"""


@pytest.mark.usefixtures("token")
def test_pulled_code_runs_without_the_package(tmp_path: Path) -> None:
    push(small_model(), "small", byte_tokenizer())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(f"{USER}/small"), byte_tokenizer()
    inputs = tokenizer("To be, or not", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, num_beams=2, do_sample=False)
    found = run_without_package(PULL, tmp_path, f"{USER}/small")
    assert found["module"].startswith("transformers_modules.")
    assert found["logits"] == logits.double().tolist() and found["generated"] == generated.tolist()


@pytest.mark.usefixtures("token")
def test_weights_alone_and_private() -> None:
    push(small_model(), f"{USER}/small", remote_code=False, private=True)
    files = SERVER.files(f"{USER}/small")
    assert SERVER.repositories[f"{USER}/small"].private
    assert not any(name.endswith(".py") for name in files) and b"auto_map" not in files["config.json"]


@pytest.mark.usefixtures("token")
def test_the_same_again_changes_nothing_and_other_contents_are_refused() -> None:
    model = small_model()
    push(model, f"{USER}/small")
    commits = len(SERVER.repositories[f"{USER}/small"].commits)
    push(model, f"{USER}/small")
    assert len(SERVER.repositories[f"{USER}/small"].commits) == commits
    before = SERVER.files(f"{USER}/small")
    other = small_model(num_hidden_layers=3)
    with pytest.raises(FileExistsError, match="exists and holds other files .*overwrite=True"):
        push(other, f"{USER}/small")
    assert SERVER.files(f"{USER}/small") == before
    push(other, f"{USER}/small", overwrite=True, remote_code=False)
    after = SERVER.files(f"{USER}/small")
    assert not any(name.endswith(".py") for name in after), "replaced, not mixed"
    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{USER}/small"), other)


@pytest.mark.usefixtures("token")
def test_deleted_repositories_are_gone() -> None:
    push(small_model(), f"{USER}/small")
    HfApi().delete_repo(f"{USER}/small")
    assert SERVER.repositories == {}
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(f"{USER}/small")


# ------------------------------------------------------------------------------------------------------------- errors


def test_without_a_token_nothing_is_sent() -> None:
    SERVER.requests.clear()
    with pytest.raises(ValueError, match=r"needs an access token .*hf auth login.*HF_TOKEN"):
        push(small_model(), f"{USER}/small")
    assert not SERVER.repositories and not any("/api/repos" in path for _, path in SERVER.requests)


def test_a_wrong_token_is_refused() -> None:
    for name in (f"{USER}/small", "small"):
        with pytest.raises(PermissionError, match="the token is not valid"):
            push(small_model(), name, token="hf_" + "w" * 34)
    assert not SERVER.repositories


@pytest.mark.usefixtures("token")
def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`repo_id` 'a/b/c' is not a valid repository name"):
        push(small_model(), "a/b/c")


def test_missing_repositories_are_named() -> None:
    with pytest.raises(OSError, match=f"{USER}/absent"):
        AutoModelForCausalLM.from_pretrained(f"{USER}/absent")


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("where", ["/preupload/", "/info/lfs/", "/storage/", "/commit/"])
def test_an_interrupted_upload_shows_nothing(where: str) -> None:
    """The repository stays as it was, and the next attempt succeeds."""
    SERVER.failures[where] = 403
    with pytest.raises((HfHubHTTPError, PermissionError, RuntimeError)):
        push(small_model(), f"{USER}/small")
    assert where not in SERVER.failures
    assert SERVER.files(f"{USER}/small") == {}
    push(small_model(), f"{USER}/small")
    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{USER}/small"), small_model())


@pytest.mark.usefixtures("token")
def test_a_tampered_export_is_not_pushed(tmp_path: Path) -> None:
    folder = export_remote_code(small_model(), tmp_path / "export")
    (folder / "modeling_spade_lm.py").write_text("import os\n")
    with pytest.raises(ValueError, match=r"modeling_spade_lm.py was changed"):
        push_folder(folder, f"{USER}/small")
    assert not SERVER.repositories


# ------------------------------------------------------------------------------------------- training and the recipe


@pytest.mark.usefixtures("token")
def test_a_trainer_pushes(tmp_path: Path) -> None:
    ids = torch.randint(3, 300, (8, 16)).tolist()
    trainer = HybridTrainer(
        small_model(),
        HybridTrainingArguments(
            str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2, use_cpu=True,
            push_to_hub=True, hub_model_id=f"{USER}/trained", report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    files = SERVER.files(f"{USER}/trained")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert len(SERVER.repositories[f"{USER}/trained"].commits) > 2, "checkpoints and the end of the training"
    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{USER}/trained"), trainer.model)


@pytest.mark.usefixtures("token")
def test_a_recipe_pushes_its_run_with_its_card(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    options = {
        "data": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "bytes"), "arch": "spade_lm",
        "config_overrides": "hidden_size=16,intermediate_size=24,num_attention_heads=2,num_hidden_layers=2,window_size=5,ssm_state_size=4",
        "block_length": 32, "max_steps": 2, "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True,
        "eval_strategy": "no", "save_strategy": "no", "report_to": "none", "push_to_hub": True, "hub_model_id": "run",
    }  # fmt: skip
    metrics = pretrain_clm.main(options)
    files = SERVER.files(f"{USER}/run")
    assert files["README.md"] == (tmp_path / "run" / "README.md").read_bytes()
    assert b"## Limits" in files["README.md"] and str(metrics["steps"]).encode() in files["metrics.json"]
    with pytest.raises(ValueError, match=r"`hub_token` .*HF_TOKEN"):
        pretrain_clm.main(options | {"output_dir": str(tmp_path / "other"), "hub_token": TOKEN})


@pytest.mark.usefixtures("token")
def test_the_recipe_pushes_a_checkpoint(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "run")
    byte_tokenizer().save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text(card_of_model(model).render())
    options = {"model_name_or_path": str(tmp_path / "run"), "repo_id": f"{USER}/small", "license": "apache-2.0"}
    result = recipe.main(options | {"output_dir": str(tmp_path / "export")})
    assert result["url"] == f"{SERVER.url}/{USER}/small" and result["digest"] == verify_export(tmp_path / "export")
    files = SERVER.files(f"{USER}/small")
    assert b"license: apache-2.0" in files["README.md"] and "modeling_spade_lm.py" in files
    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{USER}/small"), model)
    with pytest.raises(FileExistsError, match="overwrite"):
        recipe.main(options | {"remote_code": False})
    recipe.main(options | {"remote_code": False, "overwrite": True})
    assert "modeling_spade_lm.py" not in SERVER.files(f"{USER}/small")
