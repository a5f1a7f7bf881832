"""Try a checkpoint on a page in the browser.

It fills in, summarises and continues text, and shows where the model attends, how far it remembers, and its time and memory.

    python -m hf_hybrid.recipes.app --model_name_or_path checkpoints/spade-small
    python -m hf_hybrid.recipes.app --port 8000

The page is served to this machine alone; `--host 0.0.0.0` serves it to the network, where `--fixed True` keeps visitors from
opening other checkpoints. Nothing is sent elsewhere. Needs Gradio: pip install "hf_hybrid[app]".
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .support.options import parse_arguments, require
from .support.runs import set_up_logging

logger = logging.getLogger(__name__)


@dataclass
class AppArguments:
    """The page."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint that is open at first (folder or Hub name)."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to serve at; 0.0.0.0 for the whole network."})
    port: int = field(default=7860, metadata={"help": "Port to serve at."})
    fixed: bool = field(default=False, metadata={"help": "Visitors cannot open other checkpoints."})
    max_open: int = field(default=2, metadata={"help": "Checkpoints to keep in memory at once."})
    open_browser: bool = field(default=False, metadata={"help": "Open the page in a browser."})
    device: str | None = field(default=None, metadata={"help": "Default: an accelerator where there is one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a checkpoint."})

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"`port` must lie between 1 and 65535; got {self.port}.")
        if self.max_open < 1:
            raise ValueError(f"`max_open` must be at least 1; got {self.max_open}.")
        if self.fixed and self.model_name_or_path is None:
            raise ValueError("`fixed` needs a checkpoint: pass `model_name_or_path`.")


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Serve the page until it is interrupted; see `--help` for the options.

    Args:
        args: command-line arguments, a mapping of options, or None for `sys.argv`.

    Returns:
        `url`: where the page was.

    Raises:
        ValueError: an option or the checkpoint cannot be used.
        OSError: the port is taken.
        ImportError: Gradio or matplotlib is not installed.
    """
    (options,) = parse_arguments((AppArguments,), args, __doc__)
    set_up_logging()
    with serving(options) as (url, thread):
        logger.info("The page is at %s (Ctrl+C ends it).", url)
        if options.open_browser:
            webbrowser.open(url)
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()
    return {"url": url}


@contextlib.contextmanager
def serving(options: AppArguments) -> Iterator[tuple[str, threading.Thread]]:
    """The address of the page, and the thread that serves it until the end of the block; errors as in `main`."""
    require("The page", "gradio", extra="app")
    listener = socket.socket()
    with contextlib.closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.host, options.port))
        except OSError as error:
            raise OSError(
                f"`port` {options.port} of `host` {options.host} cannot be used: {error}. Choose another."
            ) from error
        import uvicorn

        from ..app.opening import Shelf
        from ..app.page import application, build_page

        shelf = Shelf(options.max_open, trust_remote_code=options.trust_remote_code, device=options.device)
        page = build_page(shelf, options.model_name_or_path, fixed=options.fixed)
        settings = uvicorn.Config(application(page), log_level="warning", timeout_graceful_shutdown=2)
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://{options.host}:{options.port}/", thread
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
