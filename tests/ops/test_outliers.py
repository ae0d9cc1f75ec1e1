"""Outliers against scikit-learn and NumPy, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor

from foveate.ops.outliers import THRESHOLD, count_outliers, local_outlier_factor, upper_outliers


def ragged(kind: str, samples: int = 6, length: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(samples, length, generator=generator)
    if kind == "softmax":
        values = (values * 2).softmax(1)
    if kind == "tied":
        values = torch.where(values < 0.8, values.amin(1, keepdim=True), values)
    lengths = torch.tensor([length, 70, 40, 21, 12, 2])[:samples]
    return values, torch.arange(length) < lengths[:, None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["normal", "softmax", "tied"])
@pytest.mark.parametrize("neighbours", [1, 10, 20])
def test_local_outlier_factor_is_scikit_learns(kind: str, neighbours: int) -> None:
    values, valid = ragged(kind)
    ours = local_outlier_factor(values, neighbours, valid)
    for row, mask, factor in zip(values, valid, ours):
        theirs = LocalOutlierFactor(n_neighbors=neighbours).fit(row[mask].double().numpy()[:, None])
        expected = -theirs.negative_outlier_factor_
        if kind == "tied":  # which of equally near neighbours counts is nobody's promise
            assert ((expected > THRESHOLD) == (factor[mask].numpy() > THRESHOLD)).all()
        else:
            np.testing.assert_allclose(factor[mask].numpy(), expected, rtol=1e-4)
        assert bool((factor[~mask] == 1).all())
    assert torch.equal(count_outliers(values, neighbours, valid), ((ours > THRESHOLD) & valid).sum(1))


def test_few_and_no_values() -> None:
    assert local_outlier_factor(torch.zeros(3, 1), 20).tolist() == [[1.0]] * 3
    assert local_outlier_factor(torch.zeros(0, 5), 20).shape == (0, 5)
    assert count_outliers(torch.zeros(2, 9), 20, torch.zeros(2, 9, dtype=torch.bool)).tolist() == [0, 0]
    assert bool(local_outlier_factor(torch.zeros(1, 50), 20).isfinite().all())


def test_upper_outliers_are_numpys() -> None:
    values, valid = ragged("softmax")
    for row, mask, count in zip(values, valid, upper_outliers(values, valid)):
        x = row[mask].numpy()
        first, third = np.percentile(x, 25), np.percentile(x, 75)
        assert int(count) == (x > third + 1.5 * (third - first)).sum()
    assert upper_outliers(torch.ones(1, 8), torch.zeros(1, 8, dtype=torch.bool)).tolist() == [0]
