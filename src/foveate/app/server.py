"""The server of the web page: where it listens, who may enter, how it looks.

Works offline: no font, no script and no count of visits comes from elsewhere.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import tempfile
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import gradio as gr
import uvicorn
from fastapi import FastAPI

from .gate import Password, only_uploads
from .page import Page
from .run import Runner

__all__ = ["AddressError", "Served", "serve"]

_STYLE = Path(__file__).with_name("page.css")


class AddressError(OSError):
    """Nothing can listen there. The message names host and port."""


class Served(NamedTuple):
    """Where the page is, and whether other machines can reach it."""

    address: str
    public: bool


@contextmanager
def serve(
    host: str,
    port: int,
    models: Sequence[str],
    companions: Sequence[str] = (),
    password: str | None = None,
    open_browser: bool = False,
) -> Iterator[Served]:
    """The page, up as long as the context lasts.

    Args:
        host, port: where to listen; port 0: any free one.
        models: what a visitor may choose from; the first is loaded now.
        companions: what a visitor may give as `clip=` or `siglip=`.
        password: asked of every visitor, by HTTP Basic authentication; None: the page is open.
        open_browser: show it in a browser of this machine.

    Raises:
        ModelError: the first model cannot be loaded.
        AddressError: nothing can listen at that host and port.
    """
    app = FastAPI(openapi_url=None)
    if password is not None:
        app.add_middleware(Password, password=password)
    # Not by Blocks.launch: on a busy machine it gives up after five seconds, as if the port were taken.
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1)
    with closing(_bound(config)) as listener, _own_uploads():
        page = Page(Runner(models, companions))
        only_uploads(page.blocks)
        gr.mount_gradio_app(
            app,
            page.blocks.queue(default_concurrency_limit=None),
            path="/",
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            max_file_size="50mb",
            css_paths=_STYLE,
            theme=_theme(),
        )
        server = uvicorn.Server(config)
        thread = Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while thread.is_alive() and not server.started:
            time.sleep(0.02)
        bound, number = listener.getsockname()[:2]
        name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(bound, f"[{bound}]" if ":" in bound else host)
        address = f"http://{name}:{number}/"
        if open_browser:
            webbrowser.open(address)
        try:
            yield Served(address, not ipaddress.ip_address(bound.partition("%")[0]).is_loopback)
        finally:
            server.should_exit = True
            thread.join(5)


@contextmanager
def _own_uploads() -> Iterator[None]:
    """A folder of this page's own for what visitors upload, unless the environment names one."""
    if "GRADIO_TEMP_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="foveate-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["GRADIO_TEMP_DIR"]


def _bound(config: uvicorn.Config) -> Any:
    """The socket of a server. Raises `AddressError`; uvicorn would log the reason and end the process."""
    logger = logging.getLogger("uvicorn.error")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return config.bind_socket()
    except SystemExit as error:
        raise AddressError(f"port {config.port} at {config.host}: taken, or no address of this machine") from error
    finally:
        logger.setLevel(level)


def _theme() -> gr.Theme:
    # Plain names of fonts: objects of gradio's Font class would be fetched from Google.
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    ).set(  # the defaults are too pale to read: white on teal 500, slate 400 on white
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
    )
