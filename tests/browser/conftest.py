"""The page in a real Chromium, driven by Playwright, against `foveate app` in a process of its own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parents[2] / "docs"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    """Where `foveate app` answers; `FOVEATE_APP` names one that is up already."""
    if "FOVEATE_APP" in os.environ:
        yield os.environ["FOVEATE_APP"]
        return
    folder = tmp_path_factory.mktemp("app")
    ready, log = folder / "ready.json", folder / "log.txt"
    command = [sys.executable, "-m", "foveate.cli", "app", "--no-browser", "--port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "gradio")}
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--json", str(ready)], stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + 300
        while not ready.exists():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield json.loads(ready.read_text())["address"]
    finally:
        server.terminate()
        server.wait(20)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def watched(chromium, **options):
    """A page that must not complain on its console nor ask anybody but this machine."""
    with contextlib.closing(chromium.new_context(**options)) as context:
        page = context.new_page()
        page.set_default_timeout(120_000)
        complaints, asked = [], []
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda opened: asked.append(opened.url))
        yield page
        assert not complaints
        ours = ("http://127.0.0.1:", "ws://127.0.0.1:", "file://", "data:", "blob:")
        assert not [url for url in asked if not url.startswith(ours)]


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request, chromium, address):
    """The app, loaded; `page.kind` is "desktop" or "phone"."""
    with watched(chromium, viewport=request.param, has_touch=request.param is PHONE) as page:
        page.goto(address)
        page.locator("#fv-ask").wait_for()
        page.kind = request.node.callspec.id
        yield page
