"""Every golden file against our code, and the checks themselves against tampered files.

`FOVEATE_GOLDENS=DIR` names a collection laid out as DIR/<method>/<stem>.npz; without it `../shared/goldens` is used if
it is there. The repository's own compact copy, `tests/goldens`, is always checked.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import foveate

OWN = Path(__file__).parent / "goldens"
ROOT = Path(__file__).parents[1]


def _collection() -> Path:
    if "FOVEATE_GOLDENS" in os.environ:
        return Path(os.environ["FOVEATE_GOLDENS"]).expanduser().resolve()
    shared = ROOT.parent / "shared" / "goldens"
    return shared if shared.is_dir() else OWN


def _parity(method: str) -> Callable[[Path], None] | None:
    """`check` of a method, None if it has no parity module."""
    if not (Path(__file__).parent / "parity" / f"{method}.py").exists():
        return None
    return importlib.import_module(f"tests.parity.{method}").check


def _cases(root: Path, prefix: str = "") -> Iterator[pytest.param]:
    """One case per file, or one per method that has no parity module."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
        files = sorted(folder.glob("*.npz"))
        if files and _parity(folder.name) is None:
            yield pytest.param(folder, id=f"{prefix}{folder.name}")
        else:
            yield from (pytest.param(file, id=f"{prefix}{folder.name}/{file.stem}") for file in files)


CASES = [*_cases(OWN, "own:"), *(_cases(_collection()) if _collection() != OWN else ())]


def test_every_method_with_an_official_code_has_its_numbers_here():
    ours = {"averagepool", "downsample", "random"}
    folders = {path.parent.name for path in OWN.rglob("*.npz")}
    assert {name.rstrip("+") for name in foveate.names()} - ours == folders
    assert {name.split("/")[0] for name in SMALL} | {"sparsevlm"} == folders
    assert sum(path.stat().st_size for path in OWN.rglob("*") if path.is_file()) <= 3_200_000


def test_the_collection_is_there():
    assert list(_cases(_collection())), f"no golden file in {_collection()} (FOVEATE_GOLDENS)"
    assert list(_cases(OWN))


@pytest.mark.parametrize("path", CASES)
def test_golden(path: Path):
    if path.is_dir():
        assert path.name not in foveate.names(), f"{path.name} exists, but tests/parity/{path.name}.py does not"
        pytest.skip("method not implemented")
    _parity(path.parent.name)(path)


# --------------------------------------------------------------------------------------------- the checks, checked
INPUTS = {
    "cdpruner": {"features", "image_embeds", "text_embeds", "visual_token_num"},
    "dart": {
        "hidden_normed", "key_states", "image_start", "image_len", "pivot_image", "pivot_text", "variant",
        "max_num_trunction", "reduction_ratio", "retain_next", "text_length",
    },
    "divprune": {"features", "ratio"},
    "dycoke": {"features", "tokens_per_frame", "merging_ratio"},
    "evs": {"video_embeds", "thw", "spatial_merge_size", "q", "tokens_per_frame", "num_frames"},
    "fastv": {"inputs_embeds", "K", "ratio"},
    "fastvid": {
        "frames", "frame_features", "frame_attention", "retention_ratio", "dyseg_c", "dyseg_tau", "stprune_d", "dtm_p",
        "dtm_beta",
    },
    "fopru": {"attn", "tokens", "ratio", "strategy"},
    "pitome": {"metric", "x", "size_in", "ratio", "margin", "alpha", "class_token", "mask_in"},
    "prumerge": {"q", "k", "features", "if_adaptive", "plus", "attn", "idx", "dim"},
    "pumer": {"metric", "x", "r", "class_token", "size_in", "attn", "attn_in", "mask"},
    "pyramiddrop": {"inputs_embeds", "layer_list", "ratio_list", "image_start", "image_tokens", "prompt_len"},
    "recoverable": {"q", "k", "features", "similarity", "data"},
    "tome": {"metric", "x", "size_in", "r", "class_token", "distill_token", "L", "inflect"},
    "visionzip": {
        "cls_attention", "metric", "hidden", "dominant", "contextual", "features", "dominant_idx", "width", "height",
    },
    "vidcom2": {"features", "frames", "tokens_per_frame", "base"},
    "vispruner": {"features", "cls_attention", "visual_token_num", "important_ratio"},
    "vtw": {"inputs_embeds", "K", "ratio", "eta", "full_logits", "vtw_logits"},
}  # fmt: skip
"""Arrays that are fed to our code; all others are compared with what it returns."""
FIXED_RATIO = "prumerge/p4_fixed_1_16_b1_n100"
SMALL = [
    "vtw/kl_0", "vtw/e2e_K15_keep", "vtw/findk", "fastv/f2_K2_keep64", "pyramiddrop/p3_1_0111", FIXED_RATIO,
    "prumerge/plus0_adaptive_b1_n576", "prumerge/outlier_ratio", "prumerge/complement_idx", "recoverable/rc2_n256",
    "recoverable/lof_k10", "pitome/v0_pitome_vision", "pitome/t0_pitome_text", "tome/m0_t197_r16_cls", "tome/schedule",
    "fopru/f0_rank_mean_of_heads", "visionzip/z0_b1_n576_54_10", "visionzip/r0_anyres_2x2",
    "vispruner/v3_b1_n256_t60_r0", "cdpruner/c3_b1_n256_t32_m2", "divprune/d3_n100_r05", "dart/a3_qwen_rr0778",
    "pumer/a0_soft_matching", "pumer/b0_tip_and_diff", "pumer/e0_masked_softmax",
    "evs/counts", "evs/e2_t6_exact_ties_q03", "vidcom2/v0_t8_p36_r025",
    "dycoke/y2_f9_p64_k05_odd", "fastvid/f1_t8_p49_r010_onevision_defaults",
]  # fmt: skip


def _outputs(name: str) -> list[str]:
    """Arrays of a small file that must be compared with ours."""
    fixed = {"reduction_ratio"} if name == FIXED_RATIO else set()
    given = INPUTS[name.split("/")[0]] | fixed
    return [key for key, array in (_small(name) or {}).items() if key not in given and array.size]


@functools.cache
def _small(name: str) -> dict[str, np.ndarray] | None:
    """Arrays of a golden file that is quick to check; the search is cut down to one sample and two layers."""
    path = next((p for p in (OWN / f"{name}.npz", _collection() / f"{name}.npz") if p.exists()), None)
    if path is None:
        return None
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    if "kl_per_sample" in arrays:
        for key in ("inputs_embeds", "kl_per_sample", "full_logits_last", "vtw_logits_last"):
            arrays[key] = arrays[key][:1]
        for key in ("kl_per_sample", "layers"):
            arrays[key] = arrays[key][..., -2:]
        arrays["vtw_logits_last"] = arrays["vtw_logits_last"][:, -2:]
        arrays["kl_mean"] = arrays["kl_per_sample"].mean(0)
        good = arrays["kl_mean"] <= arrays["eta"][:, None]
        arrays["selected_K"] = np.where(good.any(1), arrays["layers"][good.argmax(1)], -1)
    return arrays


def _tampered() -> Iterator[pytest.param]:
    for name in SMALL:
        for key in _outputs(name):
            yield pytest.param(name, key, id=f"{name}-{key}")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection with the tiny Llama and nothing else."""
    root = tmp_path_factory.mktemp("goldens")
    (root / "sparsevlm").mkdir()
    for name in ("e2e_config.json", "e2e_weights_fp16.safetensors"):
        shutil.copy(OWN / "sparsevlm" / name, root / "sparsevlm" / name)
    return root


def _save(workshop: Path, name: str, arrays: dict[str, np.ndarray]) -> Path:
    path = workshop / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if _small(name)])
def test_the_untouched_file_passes(workshop: Path, name: str):
    _parity(name.split("/")[0])(_save(workshop, name, _small(name)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), list(_tampered()))
def test_a_tampered_output_is_noticed(workshop: Path, name: str, key: str):
    arrays = dict(_small(name))
    changed = np.array(arrays[key])
    where = tuple(n // 2 for n in changed.shape)
    if changed.dtype == bool:
        changed[where] = ~changed[where]
    else:
        changed[where] += 1 if np.issubdtype(changed.dtype, np.integer) else 0.02
    arrays[key] = changed
    with pytest.raises(AssertionError):
        _parity(name.split("/")[0])(_save(workshop, name, arrays))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if _small(name)])
def test_an_unknown_or_missing_array_is_noticed(workshop: Path, name: str):
    check = _parity(name.split("/")[0])
    with pytest.raises(AssertionError, match="surprise"):
        check(_save(workshop, name, {**_small(name), "surprise": np.zeros(3)}))
    lost = _outputs(name)[-1]
    with pytest.raises(AssertionError):
        check(_save(workshop, name, {key: array for key, array in _small(name).items() if key != lost}))
