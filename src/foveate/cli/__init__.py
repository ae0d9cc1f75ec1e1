"""The command line: `foveate COMMAND`. Commands are thin; what they do lives in the packages they call.

* `shell`: what all commands share: one-line errors, tables, progress, files written whole.
* `bench`, `demo`, `run`, `sweep`, `train`, `tune`, `web` (`app`), `paper` (`methods`, `flops`): the commands.
"""

from .bench import bench
from .demo import demo
from .paper import flops, methods
from .run import run
from .shell import app
from .sweep import sweep
from .train import train
from .tune import tune
from .web import web

__all__ = ["app", "main"]

for command in (demo, methods, run, bench, flops, sweep, tune, train):
    app.command()(command)
app.command("app")(web)


def main() -> None:
    """Entry point of the `foveate` script."""
    app(prog_name="foveate")
