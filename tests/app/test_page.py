"""The page against visitors who do not use it as a page: files of the server, addresses, passwords."""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra [app]")

from typer.testing import CliRunner

from foveate.app import server as servers
from foveate.app.server import serve
from foveate.cli import app as command_line

MODEL = "zoo:tiny-llava"


def ask(url, body=None, headers=None, timeout=30):
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Where uploads go."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def home(store):
    """The address of a page without a password."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(store))
        with serve("127.0.0.1", 0, [MODEL]) as served:
            assert not served.public
            yield served.address.rstrip("/")


def image_calls(home):
    """Every event of the page that takes an image: its number, and the kinds of its inputs."""
    config = json.loads(ask(home + "/config"))
    kind = {each["id"]: each["type"] for each in config["components"]}
    calls = [(call["id"], [kind[number] for number in call["inputs"]]) for call in config["dependencies"]]
    found = [call for call in calls if "image" in call[1]]
    assert len(found) >= 4  # asking, moving a control, examples, uploading
    return found


def sent(home, number, data, session):
    """What the page answers to an event, word for word."""
    body = {"data": data, "fn_index": number, "session_hash": session, "trigger_id": None, "event_data": None}
    ask(home + "/gradio_api/queue/join", body)
    with urllib.request.urlopen(f"{home}/gradio_api/queue/data?session_hash={session}", timeout=60) as events:
        lines = []
        for line in events:
            lines.append(line.decode())
            if "process_completed" in lines[-1]:
                break
    return "".join(lines)


def as_file(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def names_of_server_files(folder, store):
    """What must not be read, as a visitor might write it."""
    secret = folder / "secret.png"
    Image.new("RGB", (32, 20), "red").save(secret)
    (folder / "link.png").symlink_to(secret)
    (store / "planted").symlink_to(secret)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(store / "pipe.png")
    inside = f"{store}/../{folder.name}/secret.png"
    assert Path(inside).exists()
    return [
        str(secret), str(folder / "link.png"), str(store / "planted"), inside, os.path.relpath(secret),
        str(folder / "pipe.png"), str(store / "pipe.png"), "/dev/zero", "/dev/stdin", "/proc/self/environ",
        "/proc/self/cwd/README.md", f"/proc/self/root{secret}", f"file://{secret}", "http://127.0.0.1:9/a.png",
        "https://example.org/a.png", "//example.org/a.png", "a\0b", "x" * 5000, str(store), "", 7, [str(secret)],
    ]  # fmt: skip


def test_no_file_of_the_server_is_read(home, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    names = names_of_server_files(folder, store)
    before = sorted(store.rglob("*"))
    calls = image_calls(home)
    begun = time.monotonic()
    for number, kinds in calls[:1] + calls[-1:]:
        for turn, name in enumerate(names):
            data = [as_file(name) if kind == "image" else None for kind in kinds]
            answer = sent(home, number, data, f"s{number}-{turn}")
            assert "not uploaded" in answer, (name, answer)
            assert "secret.png" not in answer
    assert time.monotonic() - begun < 120  # nothing waits for a pipe
    assert sorted(store.rglob("*")) == before


def test_nor_through_any_other_field(home, store, tmp_path_factory):
    secret = tmp_path_factory.mktemp("other") / "secret.png"
    Image.new("RGB", (32, 20), "red").save(secret)
    before = sorted(store.rglob("*"))
    (number, kinds), nested = image_calls(home)[0], {"a": [{"b": as_file(str(secret), url="http://127.0.0.1:9/")}]}
    for place, kind in enumerate(kinds):
        for turn, value in enumerate((as_file(str(secret)), nested)):
            data = [value if i == place else None for i in range(len(kinds))]
            assert "not uploaded" in sent(home, number, data, f"o{place}-{turn}"), kind
    for route in ("file=", "file/", "proxy=", "stream/"):
        with pytest.raises(urllib.error.HTTPError):
            ask(f"{home}/gradio_api/{route}{secret}")
    assert sorted(store.rglob("*")) == before


def test_an_upload_is_read(home, tmp_path):
    Image.new("RGB", (32, 20), "red").save(tmp_path / "photo.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "wall.png")
    (tmp_path / "notes.png").write_text("hello")
    number, _ = next(call for call in image_calls(home) if call[1] == ["image"])
    for name, says in (("photo.png", ""), ("wall.png", "too large"), ("notes.png", "not an image")):
        content = (tmp_path / name).read_bytes()
        body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="' + name.encode()
        body += b'"\r\nContent-Type: image/png\r\n\r\n' + content + b"\r\n--b--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        (path,) = json.loads(ask(home + "/gradio_api/upload", body, headers))
        answer = sent(home, number, [as_file(path)], f"u-{name}")
        assert "not uploaded" not in answer
        assert '"success":true' in answer
        assert says in answer
        assert ("fv-error" in answer) == bool(says)


# --------------------------------------------------------------------------------------------------------- password
@pytest.fixture
def light(monkeypatch):
    """A page that loads no model: for the doors before it."""
    page = servers.gr.Blocks()
    monkeypatch.setattr(servers, "Page", lambda runner: type("Light", (), {"blocks": page}))


def basic(text):
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


def test_every_route_asks_for_the_password(light):
    word = "täglich:neu"
    with serve("127.0.0.1", 0, [MODEL], password=word) as served:
        home = served.address.rstrip("/")
        for route in (
            "/",
            "/config",
            "/gradio_api/upload",
            "/gradio_api/queue/join",
            "/assets/x",
            "/docs",
            "/theme.css",
        ):
            wrong = [None, {"Authorization": "Bearer x"}, {"Authorization": "Basic ?"}]
            for headers in [*wrong, basic("x:"), basic("x:wrong")] if route == "/" else wrong[:1]:
                with pytest.raises(urllib.error.HTTPError) as refused:
                    ask(home + route, headers=headers)
                assert refused.value.code == 401
                assert refused.value.headers["WWW-Authenticate"].startswith("Basic")
        for user in ("", "anybody"):
            assert b"gradio" in ask(home + "/config", headers=basic(f"{user}:{word}"))


def test_uploads_go_to_a_folder_of_the_page_alone(light, monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with serve("127.0.0.1", 0, [MODEL]):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    assert "GRADIO_TEMP_DIR" not in os.environ


# ------------------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--password", "word"], False),
        (["--host", "localhost"], False),
        ([], False),
    ],
)
def test_a_page_open_to_the_network_is_warned_of(light, monkeypatch, arguments, warned):
    monkeypatch.setattr(sys.modules["foveate.cli.web"], "_until_interrupted", lambda: None)
    result = CliRunner().invoke(command_line, ["app", "--no-browser", "--port", "0", *arguments])
    assert result.exit_code == 0, result.output
    assert ("WARNING" in result.stderr) == warned
    assert "word" not in result.stdout


def test_the_password_may_come_from_the_environment(light, monkeypatch):
    monkeypatch.setenv("FOVEATE_PASSWORD", "hidden")
    asked = []
    monkeypatch.setattr(sys.modules["foveate.cli.web"], "_until_interrupted", lambda: asked.append(1))
    real = servers.serve
    given = []
    monkeypatch.setattr(servers, "serve", lambda *args: given.append(args) or real(*args))
    result = CliRunner().invoke(command_line, ["app", "--no-browser", "--port", "0"])
    assert (result.exit_code, asked, given[0][4]) == (0, [1], "hidden")
    assert "hidden" not in result.output
    assert "hidden" not in CliRunner().invoke(command_line, ["app", "--help"]).output
    monkeypatch.setenv("FOVEATE_PASSWORD", "  ")
    assert CliRunner().invoke(command_line, ["app", "--port", "0"]).exit_code == 2


def test_the_command_gives_the_models_and_companions(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(servers, "serve", lambda *args: given.append(args) or 1 / 0)
    for chosen in ([], ["--model", "a/b", "--model", "zoo:x", "--model", "a/b", "--companion", "c"]):
        CliRunner().invoke(command_line, ["app", *chosen])
    assert [args[2:4] for args in given] == [([MODEL], ()), (["a/b", "zoo:x"], ["c"])]


def test_help_names_the_extra():
    assert "'foveate[app]'" in CliRunner().invoke(command_line, ["app", "--help"]).output
