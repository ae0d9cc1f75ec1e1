"""Other libraries around the model: half floats, LoRA, int8, offloading, torch.compile. README says what works."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from tests.catalogue.count import Reference, differ, generate, recorded
from tests.processors.build import STRUCTURES, family, made, vlm
from tests.processors.exact import DECODER
from tests.processors.media import asked, encoded

_fastv = functools.partial(foveate.FastV, keep=0.5, layer=1)
SOME = ["llava", "qwen2_5_vl", "gemma3", "lfm2_vl"]
OFFLOADED = ["llava", "qwen2_5_vl", "gemma3", "qwen3_5"]  # LFM2-VL fails plainly: it reads a weight past its module


def _rows(name: str) -> list[dict[str, Tensor]]:
    """A padded batch, and each of its rows alone."""
    processor = vlm(name)[1]
    rows = [asked("What is this?", "landscape"), asked("And this one here?", "portrait")]
    return [encoded(processor, rows), *(encoded(processor, [row]) for row in rows)]


@torch.no_grad()
def _held(model: Any, rows: list[dict[str, Tensor]], method: str, applied: Any = None) -> tuple[Tensor, Tensor]:
    """Scores (B, 4, V) of a padded batch by a method, and those of the reference made of the same model.

    Args:
        model: what generates.
        rows: the batch, and each of its rows alone.
        method: one of `DECODER`.
        applied: what the method is applied to, by default `model`.
    """
    prompt, *alone = rows
    merges: list[tuple[int, Tensor, Tensor]] = []
    plain = generate(model, prompt)
    with foveate.apply(model if applied is None else applied, foveate.build(method, **DECODER[method])) as session:
        session.reducer.positions = "keep"
        with recorded(session, merges):
            found = generate(model, prompt)
        trace = session.trace
    reference = Reference(model, trace, merges, lambda _, row: alone[row])
    expected = reference.generate(prompt)
    assert (expected - plain).abs().max() > 1e-4, "the reference shows no effect"
    assert torch.equal(generate(model, prompt), plain), "the model after the session"
    return found.float(), expected.float()


def _close(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, which greedy steps after the first may turn into other words."""
    assert found.isfinite().all()
    assert (found - expected)[:, 0].abs().mean() <= 0.05 * expected[:, 0].std()


@family(STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_floats(name: str, dtype: torch.dtype):
    model = made(name)[0].to(dtype)
    rows = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()} for row in _rows(name)]
    for method in ("random", "fastv", "sparsevlm", "divprune"):
        _close(*_held(model, rows, method))


@family(SOME)
def test_lora(name: str):
    """The adapted model, applied to as a whole or to the model inside, and the same after merging."""
    peft = pytest.importorskip("peft")
    model, rows = made(name)[0], _rows(name)
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(r"\.(q|v)_proj$", n)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).eval()
    for key, weight in adapted.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(0))
    found, expected = _held(adapted, rows, "fastv")
    differ("fastv", found, expected)
    differ("sparsevlm", *_held(adapted, rows, "sparsevlm", applied=model))
    differ("merged", _held(adapted.merge_and_unload(), rows, "fastv")[0], found)


@family(SOME)
@pytest.mark.parametrize("method", ["fastv", "sparsevlm"])
def test_int8(name: str, method: str):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: run `make processors`")
    model = made(name)[0]
    torchao.quantize_(model.get_decoder(), torchao.Int8WeightOnlyConfig())
    differ(method, *_held(model, _rows(name), method))


@family(SOME)
def test_int8_activations(name: str):
    """Rounded for each token: a difference in the last bit becomes one of a step."""
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: run `make processors`")
    model = made(name)[0]
    torchao.quantize_(model.get_decoder(), torchao.Int8DynamicActivationInt8WeightConfig())
    _close(*_held(model, _rows(name), "fastv"))


@torch.no_grad()
@family(OFFLOADED)
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["offloaded", "applied"])
def test_offload(name: str, where: str, first: str, tmp_path: Path):
    """Weights that accelerate brings in when a module runs: the same scores to the last bit."""
    accelerate = pytest.importorskip("accelerate")
    prompt, reducer = _rows(name)[0], foveate.build("sparsevlm", keep=0.5)
    model = made(name)[0]
    with foveate.apply(model, reducer):
        expected = generate(model, prompt)

    def offload() -> None:
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))

    if first == "offloaded":
        offload()
    with foveate.apply(model, reducer):
        if first == "applied":
            offload()
        found = generate(model, prompt)
        assert next(model.get_decoder().layers[0].parameters()).device.type == "meta"
    assert torch.equal(found, expected)


@torch.no_grad()
@family(["llava"])
def test_a_compiled_model(name: str):
    """Right, but dynamo's graph breaks at every hook: nothing is gained."""
    model, prompt = made(name)[0], _rows(name)[1]
    compiled = torch.compile(model, backend="eager")
    with foveate.apply(model, _fastv()):
        expected = model(**prompt).logits
    with foveate.apply(compiled, _fastv()) as session:
        differ("compiled", compiled(**prompt).logits, expected)
        assert session.trace.visual_tokens[0, -1] < session.trace.visual_tokens[0, 0]


@torch.no_grad()
@family(SOME)
def test_compiled_parts(name: str):
    """The MLPs of the decoder and the vision tower, compiled and used before the method is applied."""
    model, prompt = made(name)[0], _rows(name)[1]
    with foveate.apply(model, _fastv()):
        expected = generate(model, prompt)
    plain = generate(model, prompt)
    for part in model.modules():
        if type(part).__name__.endswith("MLP"):
            part.compile(backend="eager")
    differ("compiled, nothing removed", generate(model, prompt), plain)
    with foveate.apply(model, _fastv()):
        differ("compiled", generate(model, prompt), expected)


def test_the_readme_names_what_is_tried_here():
    written = {"llava": "LLaVA", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "internvl": "InternVL",
               "gemma3": "Gemma 3", "smolvlm": "SmolVLM", "lfm2_vl": "LFM2-VL", "qwen3_5": "Qwen3.5"}  # fmt: skip
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    tried = {"bfloat16": STRUCTURES, "LoRA": SOME, "int8": SOME, "offload": OFFLOADED, "`torch.compile` of MLPs": SOME}
    for what, names in tried.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {what}"))
        assert f": {', '.join(written[name] for name in names)} " in row, what
