"""Programs, decoding steps and ONNX models of every head, compared with eager at sizes other than those of the export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import Case, all_heads, all_variants, parametrize

from hf_hybrid import export
from hf_hybrid.auto import ARCHITECTURES
from hf_hybrid.modeling.decoding_step import DecodingStep

HEADS = all_heads() + all_heads(other_inputs=True)
GENERATIVE = [case for case in HEADS if case.auto_name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")]
GENERATIVE_VARIANTS = [
    case
    for case in all_variants("AutoModelForCausalLM") + all_variants("AutoModelForSeq2SeqLM")
    if case not in GENERATIVE
]
ENCODERS = [case for case in HEADS if not case.is_seq2seq and case.auto_name != "AutoModelForCausalLM"]
# Heads of one architecture share its layers: the default suite traces one of each kind.
QUICK = [next(case for case in ENCODERS if case.model_type == found.model_type) for found in ARCHITECTURES]


def check_program(case: Case, folder: Path) -> None:
    model = case.shallow_model()
    written = export.export_program(model, folder)
    assert written.max_error <= 1e-5
    program = torch.export.load(written.path).module()
    inputs = export.example_inputs(model, batch=2, length=41)
    parameters = {"use_cache": False} if case.is_seq2seq or case.is_causal else {}
    with torch.no_grad():
        expected = model(**inputs, **parameters)
    for name, tensor in program(**inputs).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@parametrize(QUICK, kept=[case for case in QUICK if case.model_type == "seqboat"])
def test_program(case: Case, tmp_path: Path) -> None:
    check_program(case, tmp_path / "exported")


@pytest.mark.slow
@parametrize([case for case in HEADS if case not in QUICK])
def test_program_of_the_other_heads(case: Case, tmp_path: Path) -> None:
    check_program(case, tmp_path / "exported")


def check_generation(case: Case, folder: Path) -> None:
    """Tokens fed one by one to the exported step give the logits of one pass; the second row begins with padding."""
    model = case.shallow_model()
    written = export.export_decoding_step(model, folder)
    assert written.max_error <= 1e-5
    program = torch.export.load(written.path).module()
    step = DecodingStep(model)
    inputs = case.inputs(batch=2, length=9, target=9)
    tokens = inputs["decoder_input_ids" if case.is_seq2seq else "input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    source = {}
    with torch.no_grad():
        if case.is_seq2seq:
            source = {"source": step.encode(inputs["input_ids"]), "source_mask": torch.ones_like(inputs["input_ids"])}
            expected = model(**inputs, decoder_attention_mask=mask, use_cache=False).logits
        else:
            expected = model(tokens, attention_mask=mask, use_cache=False).logits
    state = step.start(batch_size=2)
    leading = torch.zeros(2, 2, dtype=torch.long)  # the zeros that a growing state starts with
    logits = []
    for position in range(tokens.shape[1]):
        seen = torch.cat([leading, mask[:, : position + 1]], dim=1)
        outputs = program(input_ids=tokens[:, position : position + 1], attention_mask=seen, state=state, **source)
        state = outputs["state"]
        logits.append(outputs["logits"])
    actual = torch.cat(logits, dim=1)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[1, 2:], expected[1, 2:], rtol=1e-5, atol=1e-5)


@parametrize(GENERATIVE, kept=[case for case in GENERATIVE if case.model_type in ("spade", "seqboat", "longvq")])
def test_decoding_step(case: Case, tmp_path: Path) -> None:
    check_generation(case, tmp_path / "exported")


@pytest.mark.slow
@parametrize(GENERATIVE_VARIANTS)
def test_decoding_step_of_the_other_variants(case: Case, tmp_path: Path) -> None:
    check_generation(case, tmp_path / "exported")


def check_onnx(case: Case, folder: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX models are run in onnxruntime")
    model = case.shallow_model()
    written = export.export_onnx(model, folder)
    assert written.max_error <= 1e-4
    runtime = export.OnnxModel(written.path)
    inputs = export.example_inputs(model, batch=2, length=41)
    with torch.no_grad():
        expected = model(**inputs)
    for name, tensor in runtime(**inputs).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


@parametrize(QUICK, kept=QUICK[:1])
def test_onnx(case: Case, tmp_path: Path) -> None:
    check_onnx(case, tmp_path / "exported")


@pytest.mark.slow
@parametrize([case for case in ENCODERS if case not in QUICK])
def test_onnx_of_the_other_heads(case: Case, tmp_path: Path) -> None:
    check_onnx(case, tmp_path / "exported")


@pytest.mark.slow
@parametrize([GENERATIVE[0], QUICK[-1]])
def test_a_program_runs_without_the_package(case: Case, tmp_path: Path) -> None:
    export.export_program(case.shallow_model(), tmp_path / "exported")
    code = (
        "import sys, torch; sys.modules['hf_hybrid'] = None; sys.modules['transformers'] = None;"
        f"program = torch.export.load({str(tmp_path / 'exported' / 'model.pt2')!r}).module(); print('loaded')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "loaded", result.stderr


@parametrize(QUICK)
def test_int8(case: Case, tmp_path: Path) -> None:
    """8-bit weights of the linear layers change the outputs little, and come back from the folder bit by bit."""
    pytest.importorskip("torchao", reason="the extra `quantize` is not part of `all`: it slows every import")
    model = case.shallow_model()
    written = export.export_int8(model, tmp_path / "exported")
    assert 0 < written.max_error <= 0.05
    first, second = (type(model).from_pretrained(written.path).eval() for _ in range(2))
    inputs = case.inputs()
    with torch.no_grad():
        torch.testing.assert_close(first(**inputs)[0], second(**inputs)[0], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = QUICK[0].model()
    with pytest.raises(ValueError, match="must be a model of type 'spade'.*got Linear"):
        export.export_program(torch.nn.Linear(2, 2), tmp_path / "exported")
    with pytest.raises(ValueError, match="training mode.*model.eval"):
        export.export_program(model.train(), tmp_path / "exported")
    with pytest.raises(ValueError, match="does not generate text"):
        export.export_decoding_step(ENCODERS[-1].model(), tmp_path / "exported")
    with pytest.raises(ValueError, match="float32.*model.float"):
        export.export_onnx(model.eval().bfloat16(), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export.export_program(QUICK[0].model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_that_differs_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_trace", lambda forward, inputs: _Wrong(forward))
    with pytest.raises(RuntimeError, match="differs from the original by .* nothing was written"):
        export.export_program(QUICK[0].shallow_model(), tmp_path / "exported")
    assert not any(tmp_path.iterdir())


class _Wrong:
    def __init__(self, forward: torch.nn.Module) -> None:
        self.forward = forward

    def module(self):
        return lambda **inputs: {name: tensor + 1 for name, tensor in self.forward(**inputs).items()}


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'onnx, onnxscript, onnxruntime: pip install "hf_hybrid\[export\]"'):
        export.export_onnx(QUICK[0].model(), tmp_path / "exported")
    with pytest.raises(ImportError, match=r'torchao: pip install "hf_hybrid\[quantize\]"'):
        export.export_int8(QUICK[0].model(), tmp_path / "exported")


# ------------------------------------------------------------------------------------------------------------- recipe


def test_recipe(tmp_path: Path) -> None:
    from hf_hybrid.recipes.export_model import main

    model = QUICK[0].shallow_model()
    model.save_pretrained(tmp_path / "checkpoint")
    result = main(
        {
            "model_name_or_path": str(tmp_path / "checkpoint"),
            "head": QUICK[0].auto_name,
            "format": "program",
            "output_dir": str(tmp_path / "exported"),
        }
    )
    assert result["max_error"] <= 1e-5 and Path(result["path"]).is_file()
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["model_type"] == QUICK[0].model_type
    with pytest.raises(ValueError, match="`format` must be one of program, decoding_step, onnx, int8"):
        main({"model_name_or_path": str(tmp_path), "format": "pickle", "output_dir": str(tmp_path / "other")})
    with pytest.raises(ValueError, match="`head` must be one of"):
        main({"model_name_or_path": str(tmp_path), "head": "AutoModelForX", "output_dir": str(tmp_path / "other")})
