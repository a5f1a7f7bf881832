"""`transformers serve`: completions and streams of every causal model, with the package and from exports without it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clean_process import WITHOUT_PACKAGE
from factories import Case, all_variants, parametrize
from word_tokenizer import word_tokenizer
from works_with import working

from hf_hybrid.hub import export_remote_code

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

pytestmark = pytest.mark.company

CAUSAL = [
    case for case in working("`transformers serve`", all_variants("AutoModelForCausalLM")) if case.variant == "default"
]
COMMAND = "from transformers.cli.transformers import app; app()"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
SECONDS_TO_START = 180


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model type -> folder of an export; the first one's tokenizer has a chat template."""
    root = tmp_path_factory.mktemp("served")
    found = {}
    for case in CAUSAL:
        tokenizer = word_tokenizer()
        if case is CAUSAL[0]:
            tokenizer.chat_template = CHAT_TEMPLATE
        found[case.model_type] = export_remote_code(case.model(), root / case.model_type, tokenizer)
    return found


@pytest.fixture(scope="module", params=["with the package", "without the package"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """(client, log file) of a running server."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    code, options = f"import hf_hybrid; {COMMAND}", ()
    if request.param == "without the package":
        settings.pop("PYTHONPATH", None)
        code, options = f"{WITHOUT_PACKAGE}\n{COMMAND}", ("--trust-remote-code",)
    command = [sys.executable, "-c", code, "serve", "--port", port, "--host", "127.0.0.1", "--device", "cpu", *options]
    log = folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=settings, cwd=folder, stdout=stream, stderr=stream)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_listening(int(port)):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield client, log
    finally:
        process.terminate()
        process.wait(30)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@parametrize(CAUSAL)
def test_completions_and_streams(case: Case, server: tuple[Any, Path], folders: dict[str, Path]) -> None:
    client, _ = server
    tokenizer = word_tokenizer()
    ids = tokenizer("w3 w4 w5", return_tensors="pt")
    generated = case.model().generate(**ids, max_new_tokens=6, do_sample=False)[0, 3:]
    expected = tokenizer.decode(generated, skip_special_tokens=True)
    settings = {"model": str(folders[case.model_type]), "prompt": "w3 w4 w5", "max_tokens": 6, "temperature": 0}
    answer = client.completions.create(**settings).choices[0].text
    parts = [part.choices[0].text for part in client.completions.create(stream=True, **settings)]
    assert answer.split() == expected.split() and len(parts) > 2
    assert "".join(parts).split() == expected.split()


def test_chat_needs_a_template(server: tuple[Any, Path], folders: dict[str, Path]) -> None:
    """Conversations work where the tokenizer carries a template; elsewhere the server says what is missing."""
    client, log = server
    messages = [{"role": "user", "content": "w3 w4 w5"}]
    folder = str(folders[CAUSAL[0].model_type])
    parts = client.chat.completions.create(model=folder, messages=messages, max_tokens=4, stream=True)
    assert any(part.choices[0].delta.content for part in parts if part.choices)
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model=str(folders[CAUSAL[1].model_type]), messages=messages, max_tokens=4)
    deadline = time.monotonic() + 20  # the log is written after the answer
    while "tokenizer.chat_template is not set" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def test_the_command_that_chats(server: tuple[Any, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    client, _ = server
    url = str(client.base_url).removesuffix("/v1/")
    words = ["chat", str(folders[CAUSAL[0].model_type]), url, "max_new_tokens=4", "do_sample=False"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        input="w3 w4 w5\nn\n!exit\n",  # no, it is not to go on at its limit
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},  # its client refuses every address when offline, the local one too
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    messages = [{"role": "user", "content": "w3 w4 w5"}]
    settings = {"model": words[1], "messages": messages, "max_tokens": 4, "temperature": 0}
    expected = client.chat.completions.create(**settings).choices[0].message.content
    assert expected.split() and all(word in done.stdout for word in expected.split())
