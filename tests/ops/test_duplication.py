"""Pivots take turns."""

import torch

from foveate.ops.duplication import least_duplicated


def test_each_pivot_takes_the_least_similar_of_what_is_left():
    similarity = torch.tensor([[[0.1, 0.9, 0.2, 0.3, 0.8], [0.0, 0.4, 0.1, 0.9, 0.2]]])
    eligible = torch.tensor([[True, True, True, True, False]])
    taken = least_duplicated(similarity, eligible, torch.tensor([[2, 1]]))
    assert taken.tolist() == [[True, True, True, False, False]]
    assert least_duplicated(similarity.flip(1), eligible, torch.tensor([[2, 1]])).tolist() == [
        [True, False, True, True, False]
    ]
    assert least_duplicated(similarity, eligible, torch.tensor([[9, 9]])).tolist() == eligible.tolist()
