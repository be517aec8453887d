"""Reading data: the bundled digits, idx files whole, gzipped, truncated and missing."""

import gzip
import struct

import pytest
import torch

from dampr import datasets


def _idx(array):
    return struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape) + array.numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    for name, count in (("train", 20), ("t10k", 6)):
        images = torch.randint(0, 256, (count, 4, 5), dtype=torch.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(_idx(images))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(_idx((torch.arange(count) % 10).to(torch.uint8)))
        )
    return tmp_path


def test_digits_are_split_without_overlap():
    split = datasets.digits()
    assert len(split.x) + len(split.x_test) == 1797
    assert split.x.shape[1] == 64
    assert split.x.min() == 0
    assert split.x.max() == 1
    assert split.y.unique().tolist() == list(range(10))


def test_idx_files_plain_and_gzipped(folder):
    split = datasets.mnist_like(folder)
    assert split.x.shape == (20, 20)
    assert split.y_test.tolist() == list(range(6))
    raw = datasets.read_idx(folder / "train-images-idx3-ubyte")
    assert torch.equal((split.x * 255).round().to(torch.uint8), raw.flatten(1))


def test_a_missing_file_is_named(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"root='.*': expected t10k-labels-idx1-ubyte"):
        datasets.mnist_like(folder)


@pytest.mark.parametrize("keep", [0, 3, 10, 100])
def test_a_truncated_idx_file_is_refused(folder, keep):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"path='.*train-images-idx3-ubyte'.*expected"):
        datasets.mnist_like(folder)


def test_a_truncated_gzip_file_is_refused(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        datasets.mnist_like(folder)


def test_counts_that_disagree_are_refused(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(torch.zeros(19, dtype=torch.uint8))))
    with pytest.raises(ValueError, match=r"train images have shape \(20, 4, 5\), labels \(19,\)"):
        datasets.mnist_like(folder)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="starts with 89504e47"):
        datasets.read_idx(path)
