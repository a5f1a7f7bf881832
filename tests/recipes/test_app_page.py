"""The page is served, asks no other host for anything, and escapes its messages (`tests/browser` presses its buttons)."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path

import pytest

from hf_hybrid.app.opening import Shelf
from hf_hybrid.recipes.app import AppArguments, serving

gradio = pytest.importorskip("gradio", reason="needs the extra `app`")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_page_is_served(checkpoint: Path) -> None:
    port = free_port()
    with serving(AppArguments(model_name_or_path=str(checkpoint), port=port)) as (url, _):
        assert url == f"http://127.0.0.1:{port}/"
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        assert "SpadeForConditionalGeneration" in text and '"analytics_enabled":false' in text.replace(" ", "")
        # what a browser loads by itself; the addresses in `meta` are read by nobody here
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?:https?:)?//", text)
        with pytest.raises(OSError, match="`port`"), serving(AppArguments(port=port)):  # the port is taken
            pass


def test_fixed_pages_have_no_way_to_open_another(checkpoint: Path) -> None:
    from hf_hybrid.app.page import build_page

    shelf = Shelf()
    names = [
        {item.elem_id for item in build_page(shelf, str(checkpoint), fixed=fixed).blocks.values() if item.visible}
        for fixed in (True, False)
    ]
    assert not {"checkpoint", "open"} & names[0] and {"checkpoint", "open"} <= names[1]
    assert {"write", "attend", "reach", "measure"} <= names[0]
    with pytest.raises(ValueError, match="`fixed` needs a checkpoint"):
        build_page(shelf, fixed=True)


def test_messages_are_escaped() -> None:
    from hf_hybrid.app.page import _shown

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(gradio.Error) as found:
        list(_shown(fail)(ValueError("<img src=x onerror=alert(1)> & more")))
    assert found.value.message == "&lt;img src=x onerror=alert(1)&gt; &amp; more"
    with pytest.raises(gradio.Error) as found:
        list(_shown(fail)(RuntimeError("secret")))
    assert "secret" not in found.value.message
    assert list(_shown(lambda: 3)()) == [3] and list(_shown(lambda: iter("ab"))()) == ["a", "b"]
