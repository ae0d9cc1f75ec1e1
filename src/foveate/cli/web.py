"""`foveate app`: the web page."""

from __future__ import annotations

from typing import Annotated

import typer

from ..reduction import info
from .shell import CommandError, JsonOption, note, say, writable, write_json

__all__ = ["web"]

_LAST_PORT = 65535
_MODEL = "zoo:tiny-llava"


def web(
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for everybody in the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=_LAST_PORT, help="Port to listen at; 0: a free one.")] = 7860,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model that visitors may choose: Hub id, folder or zoo:NAME; repeatable, the first is loaded at once. "
            f"Default: {_MODEL}."
        ),
    ] = None,
    companion: Annotated[
        list[str] | None,
        typer.Option(help="Model that visitors may give as clip= or siglip= of a method; repeatable. Default: none."),
    ] = None,
    password: Annotated[
        str | None,
        typer.Option(
            envvar="FOVEATE_PASSWORD",
            help="Ask every visitor for it, with any user name. Others on this machine can read a command line: better "
            "set the environment variable FOVEATE_PASSWORD.",
            show_envvar=False,
        ),
    ] = None,
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
    if password is not None and not password.strip():
        raise CommandError("password: is empty")
    models = list(dict.fromkeys(model or [_MODEL]))
    for name in method or ():
        info(name)  # from now on it is listed
    try:
        from ..app.server import AddressError, serve
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise CommandError("the page needs Gradio: pip install 'foveate[app]'") from error
    try:
        with serve(host, port, models, companion or (), password, not no_browser) as served:
            write_json(json, {"address": served.address, "model": models[0], "models": models})
            say(f"{served.address}  (stop with Ctrl+C)")
            if served.public and password is None:
                note(
                    f"WARNING: whoever can reach {host} may use this page and this machine's time; "
                    "set FOVEATE_PASSWORD, or listen at 127.0.0.1"
                )
            _until_interrupted()
    except AddressError as error:
        raise CommandError(str(error)) from error


def _until_interrupted() -> None:
    import threading

    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say()
