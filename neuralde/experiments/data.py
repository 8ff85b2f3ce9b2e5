"""Data sets as tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """A classification data set.

    Attributes:
        train_x, test_x: [samples, features] in [0, 1]. train_y, test_y: [samples] int64.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Split:
    """scikit-learn's bundled digits: 1,797 scanned digits of 8×8 pixels, a fifth of them for the test.

    The split is the same at every call, stratified by class.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository (its test set).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    parts = train_test_split(bunch.data / 16.0, bunch.target, test_size=0.2, random_state=0, stratify=bunch.target)
    train_x, test_x = (torch.as_tensor(x, dtype=dtype, device=device) for x in parts[:2])
    train_y, test_y = (torch.as_tensor(y, dtype=torch.int64, device=device) for y in parts[2:])
    return Split(train_x, train_y, test_x, test_y)
