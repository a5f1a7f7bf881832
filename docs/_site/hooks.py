"""What mkdocs.yml needs beyond its plugins: equations as MathML, pages from outside of docs/, links that leave docs/."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository that are pages of the site too.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "examples/README.md": "examples.md"}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that stand outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Resolves links to files outside of docs/: to their page, to the repository if it has an address, else to plain text."""
    source = next((name for name, path in PAGES.items() if path == page.file.src_uri), f"docs/{page.file.src_uri}")

    def resolved(match: re.Match[str]) -> str:
        image, label, link = match.groups()
        parts = urlsplit(link)
        if parts.scheme or not parts.path:
            return match[0]
        target = os.path.normpath(os.path.join(os.path.dirname(source), parts.path))
        if not (ROOT / target).exists():
            return match[0]  # the validation of mkdocs reports it
        anchor = f"#{parts.fragment}" if parts.fragment else ""
        inner = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inner is not None:
            return f"{image}[{label}]({os.path.relpath(inner, os.path.dirname(page.file.src_uri) or '.')}{anchor})"
        address = config.repo_url
        if address:
            return f"{image}[{label}]({address.rstrip('/')}/blob/main/{target}{anchor})"
        if label == os.path.basename(target):
            return f"`{target}`"
        return label if "/" in label else f"{label} (`{target}`)"

    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    text = _LINK.sub(resolved, _FENCE.sub(keep, markdown))
    return re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], text)


def on_page_content(html_text: str, page: Any, config: Any, files: Any) -> str:
    """Writes equations as MathML, which browsers show without scripts or fonts."""

    def written(match: re.Match[str]) -> str:
        latex, is_inline = html.unescape(match[3]).strip(), match[1] == "span"
        try:
            mathml = latex2mathml.converter.convert(latex, display="inline" if is_inline else "block")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: the equation {latex!r} cannot be written as MathML") from error
        if unknown := re.search(r">\\\\?[a-zA-Z]+", mathml):
            raise PluginError(f"{page.file.src_uri}: {unknown[0][1:]} of the equation {latex!r} is unknown")
        return mathml if is_inline else f'<div class="equation">{mathml}</div>'

    return _EQUATION.sub(written, html_text)
