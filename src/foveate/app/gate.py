"""What stands between the page and its visitors: the password, and what files a request may name."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import os
import stat
from collections.abc import Iterator
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

__all__ = ["Password", "only_uploads"]

_AFTER_A_WRONG_ONE = 1.0
"""Seconds until a wrong password is answered."""


class Password:
    """ASGI middleware: HTTP Basic authentication before every route. Any user name will do."""

    def __init__(self, app: Any, password: str):
        self.app = app
        self.password = password.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        given = _password(dict(scope["headers"]).get(b"authorization", b""))
        if given is not None and hmac.compare_digest(given, self.password):
            await self.app(scope, receive, send)
            return
        if given is not None:
            await asyncio.sleep(_AFTER_A_WRONG_ONE)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        asked = [(b"www-authenticate", b'Basic realm="Foveate", charset="UTF-8"'), (b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 401, "headers": asked})
        await send({"type": "http.response.body", "body": b"This page needs a password.\n"})


def _password(header: bytes) -> bytes | None:
    kind, _, coded = header.partition(b" ")
    if kind.lower() != b"basic":
        return None
    try:
        return base64.b64decode(coded, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def only_uploads(blocks: gr.Blocks) -> None:
    """Refuse every request that names a file which is no upload to this page, whatever field it stands in.

    Gradio's own check is skipped for pages that are mounted and not launched, and it lets the server fetch addresses.
    Gradio would copy the file into the folder that it serves.
    """
    preprocess = blocks.preprocess_data

    async def checked(function: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        for path in _paths(inputs):
            if not _uploaded(path):
                raise gr.Error("This file was not uploaded to this page.", print_exception=False)
        return await preprocess(function, inputs, *rest, **more)

    blocks.preprocess_data = checked


def _paths(data: Any) -> Iterator[Any]:
    """All files that a request names, at any depth."""
    left = [data]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if part.get("path") is not None:
                yield part["path"]
            left.extend(part.values())
        elif isinstance(part, list | tuple):
            left.extend(part)


def _uploaded(path: Any) -> bool:
    """Whether it is a plain file in the folder of uploads, after all links were followed."""
    if not isinstance(path, str):
        return False
    try:
        real, folder = os.path.realpath(path), os.path.realpath(get_upload_folder())
        return os.path.commonpath([real, folder]) == folder and stat.S_ISREG(os.stat(real).st_mode)
    except (OSError, ValueError):  # not there, a NUL byte, a name that is too long
        return False
