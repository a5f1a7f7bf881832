"""`make docs`: the site builds without a warning and without a network, and asks no other host for anything."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_hybrid

pytest.importorskip("mkdocstrings", reason='the site needs `pip install "hf_hybrid[docs]"`')
pytest.importorskip("material", reason='the site needs `pip install "hf_hybrid[docs]"`')

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr[-3000:]
    return folder


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for source in (ROOT / "docs").rglob("*.md"):
        page = source.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / page).is_file(), page
        assert f'href="{page}"' in home or page == "index.html" or page.startswith("reference/api/"), page
    assert all((site / f"{page}.html").is_file() for page in ("contributing", "changelog", "examples"))
    assert not (site / "_site").exists()


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """No script, style sheet, font, picture or frame of another host."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|link|img|iframe|source|object)\b[^>]*>", text)
        assert not [tag for tag in tags if re.search(r"(?:src|href|data)=[\"']?(?:https?:)?//", tag)], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_reference_and_the_search_know_every_name(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "reference" / "api").glob("*.html"))
    search = {entry["location"] for entry in json.loads((site / "search/search_index.json").read_text())["docs"]}
    for name in set(hf_hybrid.__all__) - {"__version__"}:
        assert f'id="hf_hybrid.{name}"' in pages, name
        assert any(location.endswith(f"#hf_hybrid.{name}") for location in search), name


def test_equations_and_figures_of_the_architectures(site: Path) -> None:
    """Equations are MathML, nothing of LaTeX is left."""
    for name in ("spade", "mega", "seqboat", "longvq", "bst"):
        text = (site / "architectures" / f"{name}.html").read_text(encoding="utf-8")
        assert text.count("<math ") >= 3 and "arithmatex" not in text, name
        assert f"images/{name}.svg" in text, name
        drawn = runpy.run_path(str(ROOT / "docs/_site/figures.py"))["FIGURES"][name]()
        assert (ROOT / f"docs/images/{name}.svg").read_text(encoding="utf-8") == drawn, "run docs/_site/figures.py"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_search_works_from_the_disk(site: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    page = f"{site.as_uri()}/index.html?q=codewords"
    done = subprocess.run(["chromium", *options, page], capture_output=True, text=True, timeout=300)
    assert re.search(r"[1-9]\d* matching documents", done.stdout)
