"""An .npz without names, as guided-diffusion writes samples (arr_0 and arr_1), is read as one with names."""

import numpy as np
import pytest
import torch

from ddpm_fast.data import load_dataset, open_dataset
from ddpm_fast.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_images_and_labels_of_guided_diffusions_samples(tmp_path, save, in_memory):
    save(tmp_path / "samples.npz", IMAGES, LABELS)  # as its image_sample.py does
    dataset = open_dataset(tmp_path / "samples.npz", in_memory=in_memory)
    images, labels = dataset.batch(torch.arange(6))
    assert np.array_equal(images.numpy(), IMAGES.transpose(0, 3, 1, 2)) and np.array_equal(labels, LABELS)
    assert dataset.num_classes == 3


def test_images_alone_have_no_labels(tmp_path):
    np.savez(tmp_path / "samples.npz", IMAGES)
    assert load_dataset(tmp_path / "samples.npz").labels is None


def test_a_second_array_of_floats_is_no_label(tmp_path):
    np.savez(tmp_path / "samples.npz", IMAGES, np.zeros((6, 512)))
    assert load_dataset(tmp_path / "samples.npz").labels is None


def test_names_come_first(tmp_path):
    np.savez(tmp_path / "both.npz", LABELS, LABELS[:2], images=IMAGES)
    dataset = load_dataset(tmp_path / "both.npz")
    assert np.array_equal(dataset.images.numpy(), IMAGES.transpose(0, 3, 1, 2)) and dataset.labels is None


def test_a_first_array_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", LABELS)
    with pytest.raises(InputError, match=r"int64 \[6\], expected uint8"):
        load_dataset(tmp_path / "x.npz")
