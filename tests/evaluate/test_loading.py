"""Damaged models and devices that are not there: one error that names them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import foveate
from foveate import zoo
from foveate.cli import app
from foveate.evaluate.answer import ModelError, check_device, load
from foveate.train.models import family_of


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped model that one may damage."""
    shutil.copytree(zoo.path("tiny-llava"), tmp_path / "m")
    for file in (tmp_path / "m").iterdir():
        file.chmod(0o644)
    return tmp_path / "m"


def cut(share):
    def damage(file):
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return damage


def without_a_tensor(file):
    tensors = load_file(file)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, file, metadata={"format": "pt"})


def of_another_shape(file):
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].dim())
    save_file({**tensors, name: torch.zeros(3, 5)}, file, metadata={"format": "pt"})


def with_depth(value):
    def damage(file):
        config = json.loads(file.read_text())
        config["text_config"]["num_hidden_layers"] = value
        file.write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut(0.5)),
        ("model.safetensors", cut(0)),
        ("model.safetensors", lambda file: file.write_bytes(b"\xff" * 1000)),
        ("model.safetensors", lambda file: file.unlink()),
        ("model.safetensors", without_a_tensor),
        ("model.safetensors", of_another_shape),
        ("config.json", cut(0.5)),
        ("config.json", cut(0)),
        ("config.json", lambda file: file.write_text("[" * 100_000)),
        ("config.json", lambda file: file.write_text("[]")),
        ("config.json", lambda file: file.write_text("\xff")),
        ("config.json", with_depth("many")),
        ("config.json", with_depth([1])),
        ("tokenizer.json", cut(0.5)),
        ("tokenizer.json", lambda file: file.write_text("{}")),
    ],
)
def test_a_damaged_model_is_named(model, name, damage):
    damage(model / name)
    with pytest.raises(ModelError, match=f"model {model}: ") as error:
        load(str(model))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 450


@pytest.mark.parametrize("name", ["n" * 300, "/" + "n" * 300, "~nobody/model", "a\0b", "", " "])
def test_an_impossible_name_is_named(name):
    for act in (load, family_of):
        with pytest.raises(ModelError, match="model"):
            act(name)


def test_a_damaged_companion_is_named(tmp_path):
    shutil.copytree(zoo.path("tiny-clip"), tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").chmod(0o644)
    cut(0.5)(tmp_path / "clip" / "model.safetensors")
    vlm = load("zoo:tiny-llava")
    reducer = foveate.CDPruner(keep=0.5, clip=tmp_path / "clip", tokenizer=vlm.tokenizer)
    with pytest.raises(foveate.OptionError, match=f"{tmp_path}.*cannot be loaded"):
        foveate.apply(vlm.model, reducer)


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps", "meta", "gpu", "", "cpu:x", "xpu"])
def test_a_device_that_is_not_there_is_named(device):
    kind = device.partition(":")[0]
    if device == kind and kind in ("cuda", "mps", "xpu") and getattr(torch, kind).is_available():
        pytest.skip("this machine has it")
    with pytest.raises(ModelError, match=f"device {device}: cannot be used"):
        check_device(device)


COMMANDS = {
    "run": ["zoo:tiny-llava", "--image", "IMAGE", "--prompt", "?"],
    "bench": ["zoo:tiny-llava", "--method", "fastv", "--keep", "0.5"],
    "bench geometry": ["--geometry", "llava-1.5-7b", "--layers", "1", "--method", "fastv", "--keep", "9"],
    "sweep": ["zoo:tiny-llava", "--data", "scenes", "--samples", "1", "--methods", "random", "--out", "OUT"],
    "tune": ["zoo:tiny-llava", "--data", "scenes", "--samples", "2"],
    "tune layer": ["zoo:tiny-llava", "--data", "scenes", "--method", "vtw", "--max-divergence", "1", "--samples", "2"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", ["meta", "gpu"])
def test_every_command_refuses_such_a_device_in_one_line(command, device, tmp_path):
    from foveate.app.examples import examples

    places = {"IMAGE": examples()[0][0], "OUT": str(tmp_path / "out")}
    arguments = [places.get(word, word) for word in COMMANDS[command]]
    result = CliRunner().invoke(app, [command.split()[0], *arguments, "--device", device])
    assert result.exit_code == 2, result.output
    assert f"device {device}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
