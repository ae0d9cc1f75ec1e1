"""`foveate app` when it cannot start. Needs Gradio, hence here."""

import pytest
from typer.testing import CliRunner

from foveate.cli import app


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [(["--model", "zoo:nope", "--port", "0"], "zoo:nope"), (["--host", "192.0.2.1", "--port", "0"], "192.0.2.1")],
)
def test_what_is_wrong_is_said_in_one_line(arguments, culprit):
    result = CliRunner().invoke(app, ["app", "--no-browser", *arguments])
    assert result.exit_code == 2
    assert culprit in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_named(address):
    port = address.rstrip("/").rpartition(":")[2]
    result = CliRunner().invoke(app, ["app", "--no-browser", "--port", port])
    assert result.exit_code == 2
    assert f"port {port}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
