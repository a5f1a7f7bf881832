"""The page in a real browser: Chromium presses the buttons of a running `hf-hybrid app` (extra `browser`, and chromium)."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import Case
from word_tokenizer import word_tokenizer

from hf_hybrid.app.opening import open_checkpoint
from hf_hybrid.app.writing import Decoding, write
from hf_hybrid.configuration.configuration_spade import SpadeConfig
from hf_hybrid.tokenization.sentencepiece_tokenizer import train_sentencepiece_tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
pytest.importorskip("gradio", reason="needs the extra `app`")

pytestmark = pytest.mark.browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 120
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> ${alert(1)} {{7*7}}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small untrained models: "writer" fills in and rewrites, "chooser" is a SeqBoat."""
    root = tmp_path_factory.mktemp("models")
    text = [line for path in sorted(Path(__file__).parents[1].glob("*.py")) for line in path.read_text().splitlines()]
    tokenizer = train_sentencepiece_tokenizer(text, vocab_size=480, num_sentinels=32)
    config = SpadeConfig(
        vocab_size=512, hidden_size=16, head_dim=8, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, decoder_layers=1,
        window_size=9, ssm_state_size=4, hidden_dropout=0.0,
    )  # fmt: skip
    from transformers import AutoModelForSeq2SeqLM

    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(root / "writer")
    tokenizer.save_pretrained(root / "writer")
    Case("seqboat", "AutoModelForCausalLM", "default").model().save_pretrained(root / "chooser")
    word_tokenizer().save_pretrained(root / "chooser")
    return {name: str(root / name) for name in ("writer", "chooser")}


@pytest.fixture(scope="module")
def address(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a page is served that has the writer open."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "hf_hybrid",
        "app",
        "--model_name_or_path",
        folders["writer"],
        "--port",
        str(port),
    ]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        deadline = time.monotonic() + SECONDS
        while "The page is at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


class Visitor:
    """A user with a browser window of their own.

    Attributes:
        page: the window.
        elsewhere: requests to other hosts.
    """

    def __init__(self, browser: Any, address: str) -> None:
        self.page = browser.new_context().new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.elsewhere: list[str] = []
        self.page.on(
            "request",
            lambda request: (
                None if request.url.startswith((address, "data:", "blob:")) else self.elsewhere.append(request.url)
            ),
        )
        self.page.goto(address)
        self.page.wait_for_selector("#write")

    def open(self, checkpoint: str) -> None:
        self.page.fill("#checkpoint textarea, #checkpoint input", checkpoint)
        self.page.click("#open")

    def has_open(self, head: str) -> None:
        """Waits until a model of this class is open."""
        about = self.page.locator("#about textarea, #about input")
        playwright.expect(about).to_have_value(re.compile(head), timeout=1000 * SECONDS)

    def tab(self, title: str) -> None:
        self.page.get_by_role("tab", name=title).click()

    def fill(self, place: str, text: str) -> None:
        self.page.fill(f"#{place} textarea", text)

    def reads(self, place: str, text: str) -> None:
        """Waits until a place shows a text."""
        playwright.expect(self.page.locator(f"#{place}")).to_contain_text(text, timeout=1000 * SECONDS)

    def has_written(self) -> str:
        """Waits for what the model writes."""
        box = self.page.locator("#written textarea")
        playwright.expect(box).not_to_have_value("", timeout=1000 * SECONDS)
        return box.input_value()

    def sees_picture(self, place: str) -> None:
        image = self.page.locator(f"#{place} img")
        image.wait_for(state="visible")
        assert image.evaluate("image => image.complete && image.naturalWidth") > 300

    def is_safe(self) -> None:
        assert self.page.evaluate("window.hacked") is None and not self.elsewhere, self.elsewhere


def test_a_summary_and_a_picture(browser: Any, address: str) -> None:
    visitor = Visitor(browser, address)
    visitor.fill("text", "A list is sorted in place. The method returns nothing, and takes a key.")
    visitor.page.click("#write")
    assert visitor.has_written()
    visitor.tab("How far it remembers")
    visitor.page.click("#reach")
    visitor.sees_picture("reach-picture")
    visitor.tab("Time and memory")
    visitor.page.click("#measure")
    visitor.sees_picture("measure-picture")
    visitor.reads("measured", "256")
    visitor.is_safe()


def test_what_it_attends_to(browser: Any, address: str, folders: dict[str, str]) -> None:
    visitor = Visitor(browser, address)
    visitor.open(folders["chooser"])
    visitor.has_open("SeqBoatForCausalLM")
    visitor.tab("Where it attends")
    visitor.fill("attended", "w5 w6 w7 w8")
    visitor.page.click("#attend")
    visitor.sees_picture("gates-picture")
    visitor.reads("gates", "w6")
    visitor.is_safe()


def test_an_error_is_a_message(browser: Any, address: str) -> None:
    visitor = Visitor(browser, address)
    visitor.page.click("#write")
    message = visitor.page.get_by_test_id("toast-body")
    playwright.expect(message).to_contain_text("There is no text yet")
    visitor.open("no/such/checkpoint")
    playwright.expect(message.filter(has_text="no/such/checkpoint").first).to_be_visible()
    visitor.tab("Where it attends")
    visitor.fill("attended", "a list")
    visitor.page.click("#attend")
    playwright.expect(message.filter(has_text="only SeqBoat models").first).to_be_visible()
    visitor.is_safe()


def test_a_hostile_text_is_shown_and_not_run(browser: Any, address: str, folders: dict[str, str]) -> None:
    visitor = Visitor(browser, address)
    visitor.open(HOSTILE)
    message = visitor.page.get_by_test_id("toast-body")
    playwright.expect(message.filter(has_text="onerror").first).to_be_visible()
    visitor.fill("text", f"{HOSTILE} ___ {HOSTILE}")
    visitor.page.click("#write")
    visitor.reads("whole", "<script>window.hacked = 1</script><img src=x onerror=")
    visitor.reads("whole", "${alert(1)} {{7*7}}")
    visitor.open(folders["chooser"])
    visitor.tab("Where it attends")
    visitor.fill("attended", HOSTILE)
    visitor.page.click("#attend")
    visitor.sees_picture("gates-picture")
    visitor.page.wait_for_timeout(500)
    visitor.is_safe()


def test_two_users_at_once(browser: Any, address: str, folders: dict[str, str]) -> None:
    """Each sees what their own model writes for their own text."""
    texts = {"writer": "A list is sorted in place.", "chooser": "w5 w6 w7"}
    visitors = {name: Visitor(browser, address) for name in texts}
    visitors["chooser"].open(folders["chooser"])
    visitors["chooser"].has_open("SeqBoatForCausalLM")
    for name, visitor in visitors.items():
        visitor.fill("text", texts[name])
    for visitor in visitors.values():
        visitor.page.click("#write")
    for name, visitor in visitors.items():
        pieces = list(write(open_checkpoint(folders[name]), texts[name], Decoding()))[-1]
        (expected,) = (piece for piece, is_new in pieces if is_new)
        box = visitor.page.locator("#written textarea")
        playwright.expect(box).to_have_value(expected, timeout=1000 * SECONDS)
        visitor.is_safe()
