"""Other libraries around the model: half floats, LoRA, int8, offloading, torch.compile. README says what works."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
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

SOME = ["llava", "qwen2_5_vl", "gemma3", "lfm2_vl"]


def _rows(name: str) -> list[dict[str, Tensor]]:
    """A padded batch, and each of its rows alone."""
    processor = vlm(name)[1]
    rows = [asked("What is this?", "landscape"), asked("And this one here?", "portrait")]
    return [encoded(processor, rows), *(encoded(processor, [row]) for row in rows)]


@torch.no_grad()
def _exact(model: Any, name: str, method: str = "fastv", tolerance: float = 5e-4, within: Any = None) -> None:
    """A method in `model` equals the reference made of the same model; `within`: what is applied to."""
    prompt, *rows = _rows(name)
    merges: list[tuple[int, Tensor, Tensor]] = []
    plain = generate(model, prompt)
    with foveate.apply(within or model, foveate.build(method, **DECODER[method])) as session:
        session.reducer.positions = "keep"
        with recorded(session, merges):
            found = generate(model, prompt)
        trace = session.trace
    expected = Reference(within or model, trace, merges, lambda _, row: rows[row]).asked(
        prompt, lambda inputs: generate(model, inputs)
    )
    differ(method, found, expected, tolerance)
    assert (expected - plain).abs().max() > 1e-4, "the reference shows no effect"
    assert torch.equal(generate(model, prompt), plain), "the model after the session"


@torch.no_grad()
@family(STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_floats(name: str, dtype: torch.dtype):
    """Kept tokens are the reference's; logits differ by rounding."""
    model = made(name)[0].to(dtype)
    prompt, *rows = ({k: v.to(dtype) if v.is_floating_point() else v for k, v in p.items()} for p in _rows(name))
    for method in ("random", "fastv", "sparsevlm", "divprune"):
        merges: list[tuple[int, Tensor, Tensor]] = []
        with foveate.apply(model, foveate.build(method, **DECODER[method])) as session:
            session.reducer.positions = "keep"
            with recorded(session, merges):
                found = generate(model, prompt)[:, 0].float()
            trace = session.trace
        reference = Reference(model, trace, merges, lambda _, row: rows[row])
        expected = reference.generate(prompt)[:, 0].float()
        assert found.isfinite().all()
        assert (found - expected).abs().mean() <= 0.05 * expected.std(), method
        with foveate.apply(model, foveate.build(method, **{**DECODER[method], "keep": 1.0})):
            whole = generate(model, prompt)
        assert torch.equal(whole, generate(model, prompt)), method


@family(SOME)
def test_lora(name: str):
    """The adapted model, applied to as a whole or inside, and the same after merging."""
    peft = pytest.importorskip("peft")
    model = made(name)[0]
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(r"\.(q|v)_proj$", n)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).eval()
    with torch.no_grad():
        for n, weight in adapted.named_parameters():
            if "lora_B" in n:
                weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    _exact(adapted, name)
    _exact(adapted, name, method="sparsevlm", within=model)
    prompt = _rows(name)[0]
    with torch.no_grad():
        with foveate.apply(adapted, foveate.build("fastv", **DECODER["fastv"])):
            found = generate(adapted, prompt)
        merged = adapted.merge_and_unload()
        with foveate.apply(merged, foveate.build("fastv", **DECODER["fastv"])):
            differ("merged", generate(merged, prompt), found)


@family(SOME)
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8(name: str, kind: str):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: run `make processors`")
    model = made(name)[0]
    quantization.quantize_(model.get_decoder(), getattr(quantization, kind)())
    _exact(model, name)
    _exact(model, name, method="sparsevlm")


@torch.no_grad()
@family(SOME)
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


def _whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def _in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@torch.no_grad()
@family(SOME)
@pytest.mark.parametrize("how", [_whole, _in_place, _forward])
@pytest.mark.parametrize("first", ["compiled", "applied"])
def test_a_compiled_model_is_refused(name: str, how: Callable[[Any], Any], first: str):
    model, prompt = made(name)[0], _rows(name)[0]
    compiled = how(model) if first == "compiled" else None
    with pytest.raises(foveate.UnsupportedError, match="torch.compile"), foveate.apply(compiled or model, foveate.FastV(keep=0.5, layer=1)):
        (compiled or how(model))(**prompt)


@torch.no_grad()
@family(SOME)
def test_compiled_parts(name: str):
    """Vision tower and MLPs may be compiled."""
    model, prompt = made(name)[0], _rows(name)[0]
    with foveate.apply(model, foveate.FastV(keep=0.5, layer=1)):
        expected = generate(model, prompt)
    for layer in model.get_decoder().layers:
        getattr(layer, "mlp", None) and layer.mlp.compile(backend="eager")
    (model.get_encoder("image") if hasattr(model, "get_encoder") else model).compile(backend="eager")
    with foveate.apply(model, foveate.FastV(keep=0.5, layer=1)):
        differ("compiled", generate(model, prompt), expected)
