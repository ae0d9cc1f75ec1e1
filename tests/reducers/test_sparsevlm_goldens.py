"""The golden check of SparseVLM, checked: whatever output is changed in a file must be noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parity.sparsevlm import check

FOLDER = Path(__file__).parents[1] / "goldens" / "sparsevlm"
FED = {
    "raters": {"hidden_states", "v_token_start", "n_visual"},
    "score": {"q", "k", "v_token_start", "n_visual", "n_text", "rater_idx"},
    "rank": {"q", "k", "v_token_start", "n_visual", "n_text", "rater_idx"},
    "cluster": {"x", "cluster_num", "noise_uniform"},
    "step": {
        *("h_embed", "q", "k", "layer_hidden_out", "position_ids_in", "v_token_start", "n_visual", "n_text"),
        *("layer_idx", "counts", "scale", "bias"),
    },
}
"""Arrays that our code is given; all others are compared with what it returns."""
FILES = sorted(path for path in FOLDER.glob("*.npz") if not path.stem.startswith("e2e"))


def outputs() -> list:
    found = []
    for path in FILES:
        with np.load(path) as file:
            names = [name for name in file.files if name not in FED[path.stem.partition("_")[0]]]
        found += [pytest.param(path, name, id=f"{path.stem}-{name}") for name in names]
    return found


def tampered(path: Path, name: str, folder: Path, place: int) -> Path:
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    changed = np.array(arrays[name])
    flat = changed.reshape(-1)
    step = 1 if np.issubdtype(changed.dtype, np.integer) else max(0.01, abs(float(flat[place])) * 0.02)
    flat[place] = not flat[place] if changed.dtype == bool else flat[place] + step
    np.savez(folder / path.name, **{**arrays, name: changed})
    return folder / path.name


@pytest.mark.parametrize(("path", "name"), outputs())
def test_a_changed_output_is_noticed(path: Path, name: str, tmp_path: Path):
    for place in (0, -1):
        with pytest.raises(AssertionError):
            check(tampered(path, name, tmp_path, place))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_array_is_noticed(path: Path, tmp_path: Path):
    with np.load(path) as file:
        np.savez(tmp_path / path.name, **file, surprise=np.zeros(3))
    with pytest.raises(AssertionError, match="surprise"):
        check(tmp_path / path.name)


def test_an_unknown_kind_of_file_is_noticed(tmp_path: Path):
    np.savez(tmp_path / "secret_0.npz", x=np.zeros(3))
    with pytest.raises(AssertionError, match="secret_0"):
        check(tmp_path / "secret_0.npz")
