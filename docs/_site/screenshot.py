"""Draws docs/images/app.png: the page of `hf-hybrid app` with the small checkpoint filling gaps (extra `browser`, and Chromium).

python docs/_site/screenshot.py [FILE]
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
TEXT = "She had never ___ before in her life, and the old man ___ at her with a smile."
SECONDS = 300


def main(file: str = str(ROOT / "docs" / "images" / "app.png"), port: int = 7861) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    command = [sys.executable, "-m", "hf_hybrid", "app", "--model_name_or_path", "checkpoints/spade-small"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + SECONDS
            while "The page is at" not in _text(log):
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"The page was not served:\n{_text(log)}")
                time.sleep(0.5)
            _draw(browser, f"http://127.0.0.1:{port}/", file)
        finally:
            server.terminate()
            server.wait(30)


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


def _draw(browser: str | None, address: str, file: str) -> None:
    with sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = chromium.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(1000 * SECONDS)
        page.goto(address)
        expect(page.locator("#about textarea, #about input")).to_have_value(
            re.compile("Spade"), timeout=1000 * SECONDS
        )
        page.fill("#text textarea", TEXT)
        page.click("#write")
        expect(page.locator("#written textarea")).not_to_have_value("", timeout=1000 * SECONDS)
        expect(page.locator("#whole")).to_contain_text("with a smile", timeout=1000 * SECONDS)
        page.wait_for_timeout(3000)  # the last tokens
        page.evaluate("document.querySelector('footer')?.remove()")
        page.screenshot(path=file, full_page=True)
        chromium.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
