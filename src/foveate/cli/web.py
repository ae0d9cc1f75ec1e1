"""`foveate app`: the web page."""

from __future__ import annotations

from typing import Annotated

import typer

from ..reduction import info
from .shell import CommandError, JsonOption, say, writable, write_json

__all__ = ["web"]

_LAST_PORT = 65535


def web(
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for everybody in the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=_LAST_PORT, help="Port to listen at; 0: a free one.")] = 7860,
    model: Annotated[str, typer.Option(help="Model to begin with: Hub id, folder or zoo:NAME.")] = "zoo:tiny-llava",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", metavar="MODULE:CLASS", help="Offer this method as well; repeatable."),
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")] = False,
    json: JsonOption = None,
) -> None:
    """A web page: both answers side by side, the tokens that stayed in each layer, and what it saved.

    Runs offline with a shipped model and needs the extra: pip install 'foveate[app]'. --json writes the address.

    Example: foveate app --port 7861 --no-browser
    """
    writable(json)
    for name in method or ():
        info(name)  # from now on it is listed
    try:
        from ..app.page import AddressError, serve
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise CommandError("the page needs Gradio: pip install 'foveate[app]'") from error
    try:
        with serve(host, port, model, not no_browser) as address:
            write_json(json, {"address": address, "model": model})
            say(f"{address}  (stop with Ctrl+C)")
            _until_interrupted()
    except AddressError as error:
        raise CommandError(str(error)) from error


def _until_interrupted() -> None:
    import threading

    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say()
