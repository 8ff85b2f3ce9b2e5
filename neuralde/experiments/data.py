"""Data sets as tensors."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
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


# Of the uncompressed files.
_MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def mnist(directory: str | pathlib.Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Split:
    """MNIST: 60,000 training and 10,000 test digits of 28×28 pixels, as rows of 784.

    Args:
        directory: where its four idx files are, gzipped (.gz) or not.
        dtype, device: of the images.

    Raises:
        FileNotFoundError: a file is not there. ValueError: a file is not the original one, by its SHA-256.

    Source: LeCun, Cortes & Burges, The MNIST database of handwritten digits.
    """
    parts = []
    for name in _MNIST:
        content = _checked(pathlib.Path(directory), name)
        head = 16 if "images" in name else 8
        values = torch.frombuffer(bytearray(content[head:]), dtype=torch.uint8).to(device)
        parts.append(values.view(-1, 784).to(dtype) / 255 if "images" in name else values.long())
    return Split(*parts)


def _checked(directory: pathlib.Path, name: str) -> bytes:
    for path, opened in ((directory / name, open), (directory / f"{name}.gz", gzip.open)):
        if path.is_file():
            with opened(path, "rb") as file:
                content = file.read()
            if hashlib.sha256(content).hexdigest() != _MNIST[name]:
                raise ValueError(f"{path} is not MNIST's {name}: its SHA-256 differs; get the original file")
            return content
    raise FileNotFoundError(f"no {name} or {name}.gz in {directory}; name the directory with MNIST's four idx files")
