"""Float arrays as data: their layout, range and units, compared with numpy's own arithmetic."""

import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import Selection, StoredDataset, arrayfile, floats, load, load_dataset, open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.values import ValueRange, parse_range


def latents(count=5, channels=4, side=6, dtype=np.float32):
    """Each channel has a range of its own, and the last one is constant."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (count, channels, side, side)) * [[[[10.0**c]] for c in range(channels)]]
    values[:, -1] = 7.5
    return values.astype(dtype)


def scaled(values, low, high):
    """[N, C, H, W] in [-1, 1], in float64: the ends are for each channel."""
    low, high = (np.asarray(ends, np.float64).reshape(1, -1, 1, 1) for ends in (low, high))
    span = np.where(high > low, high - low, 1)
    x = np.clip((values.astype(np.float64) - low) / span * 2 - 1, -1, 1)
    return np.where(high > low, x, 0)


def measured(values):
    return values.min((0, 2, 3)).astype(np.float64).tolist(), values.max((0, 2, 3)).astype(np.float64).tolist()


def close(found, expected):
    """To the rounding of float32, of which one is half a spacing: both ways of writing it round once."""
    return np.abs(found.double().numpy() - expected).max() <= 2.0**-23


def everything(dataset):
    return dataset.batch(torch.arange(len(dataset)))[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ">f4"])
@pytest.mark.parametrize("save", ["npy", "npz", "compressed"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_every_form_is_read_in_the_range_of_each_channel(tmp_path, dtype, save, layout):
    values = latents(dtype=dtype, channels=3)
    stored = values if layout == "NCHW" else np.ascontiguousarray(values.transpose(0, 2, 3, 1))
    path = tmp_path / ("a.npy" if save == "npy" else "a.npz")
    labels = None if save == "npy" else [0, 1, 0, 2, 1]
    if save == "npy":
        np.save(path, stored)
    else:
        (np.savez if save == "npz" else np.savez_compressed)(path, images=stored, labels=labels)
    low, high = measured(values)
    for in_memory in (True, False):
        dataset = open_dataset(path, in_memory=in_memory)
        assert isinstance(dataset, StoredDataset) is not in_memory
        assert (len(dataset), dataset.shape, dataset.dtype) == (5, (3, 6, 6), torch.float32)
        assert dataset.value_range == ValueRange(tuple(low), tuple(high), layout)
        assert close(everything(dataset), scaled(values, low, high))
        found, classes = dataset.batch(torch.tensor([3, 0, 3]))
        assert torch.equal(found, everything(dataset)[[3, 0, 3]])
        assert classes is None if labels is None else classes.tolist() == [2, 0, 2]


def test_large_sets_are_read_on_demand_and_small_ones_are_not(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=latents())
    assert not isinstance(open_dataset(tmp_path / "a.npz"), StoredDataset)
    monkeypatch.setattr(load, "IN_MEMORY", 4 * 5 * 4 * 36 - 1)
    monkeypatch.setattr(arrayfile, "_READ_WHOLE", 100)
    dataset = open_dataset(tmp_path / "a.npz")
    assert isinstance(dataset, StoredDataset) and isinstance(dataset.source._array, np.memmap)
    assert torch.equal(everything(dataset), load_dataset(tmp_path / "a.npz").images)


@pytest.mark.parametrize("method", ["npy", "npz"])
def test_uint8_arrays_are_mapped_too(tmp_path, monkeypatch, method):
    """At an offset within the archive that is no multiple of anything."""
    images = np.random.default_rng(1).integers(0, 256, (7, 5, 5, 3), np.uint8)
    path = tmp_path / f"a.{method}"
    np.save(path, images) if method == "npy" else np.savez(path, labels=np.arange(7), images=images)
    monkeypatch.setattr(arrayfile, "_READ_WHOLE", 10)
    dataset = open_dataset(path, in_memory=False)
    assert torch.equal(everything(dataset), torch.from_numpy(images).permute(0, 3, 1, 2))
    for options in ({"image_size": 4}, {"channels": 1}, {"image_size": 8, "channels": 1}):
        stored, loaded = open_dataset(path, in_memory=False, **options), load_dataset(path, **options)
        assert stored.shape == loaded.shape and torch.equal(everything(stored), loaded.images)
        assert stored.pixel_digest() == loaded.digest


def test_compressed_arrays_are_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(arrayfile, "_MOST_UNMAPPED", 1000)
    for kind, images in (("float", latents()), ("8-bit", np.zeros((4, 20, 20), np.uint8))):
        np.savez_compressed(tmp_path / f"{kind}.npz", images=images)
        with pytest.raises(InputError, match=r"compressed, so .*np\.savez .* zip -0 new\.npz \*\.npy"):
            open_dataset(tmp_path / f"{kind}.npz")
        np.savez(tmp_path / f"{kind}.npz", images=images)
        monkeypatch.setattr(arrayfile, "_READ_WHOLE", 10)
        assert len(open_dataset(tmp_path / f"{kind}.npz")) == len(images)
    np.save(tmp_path / "f.npy", np.asfortranarray(latents()))
    with pytest.raises(InputError, match="in Fortran order"):
        open_dataset(tmp_path / "f.npy")


def test_a_zip_whose_directory_leads_elsewhere_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=latents())
    data = bytearray(path.read_bytes())
    data[0:4] = b"PK\1\2"  # no member begins where the directory says
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot read"):
        open_dataset(path)


@pytest.mark.parametrize(
    "shape, given, expected",
    [
        ((2, 4, 8, 8), None, "NCHW"),
        ((2, 8, 8, 4), None, "NHWC"),
        ((2, 1, 8, 8), None, "NCHW"),
        ((2, 8, 8), None, "NHW"),
        ((2, 8, 8, 8), "NHWC", "NHWC"),
        ((2, 8, 8, 8), None, r"both would have squares, so .*--layout"),
        ((2, 3, 8, 9), None, r"neither would have squares"),
        ((2, 8, 8), "NCHW", r"cannot be NCHW; expected NHW"),
        ((2, 4, 8, 8), "NHW", r"cannot be NHW; expected NCHW or NHWC"),
        ((2, 4, 8, 8), "nchw", r"cannot be nchw"),
        ((2, 8), None, r"float32 \[2, 8\]; expected floats"),
        ((0, 4, 8, 8), None, "at least one image"),
    ],
)
def test_the_layout_is_told_by_squares_or_asked_for(tmp_path, shape, given, expected):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    if expected in ("NCHW", "NHWC", "NHW"):
        found = open_dataset(tmp_path / "a.npy", selection=Selection(layout=given)).value_range
        assert found.layout == expected
    else:
        with pytest.raises(InputError, match=expected):
            open_dataset(tmp_path / "a.npy", selection=Selection(layout=given))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_value_that_is_not_finite_is_named(tmp_path, monkeypatch, bad, dtype):
    values = latents(dtype=dtype)
    values[3, 2, 1, 5] = bad
    values[4, 0, 0, 0] = np.nan  # not the first
    np.save(tmp_path / "a.npy", values)
    monkeypatch.setattr(floats, "_BLOCK", 2 * 4 * 36)  # the third of three blocks holds it
    with pytest.raises(InputError, match=rf"images\[3, 2, 1, 5\] of a\.npy is {bad}; expected finite"):
        open_dataset(tmp_path / "a.npy")
    # Where the range is given, a large array is not looked through: the value is found when it is read.
    monkeypatch.setattr(floats, "_ALWAYS_SCANNED", 100)
    dataset = open_dataset(tmp_path / "a.npy", in_memory=False, selection=Selection(value_range=[-1e4, 1e4]))
    assert dataset.batch(torch.tensor([0, 1]))[0].isfinite().all()
    with pytest.raises(InputError, match=rf"images\[3, 2, 1, 5\] of a\.npy is {bad}"):
        dataset.batch(torch.tensor([1, 3]))


def test_a_given_range_clips_and_says_so(tmp_path):
    values = latents(channels=2, dtype=np.float32)
    np.save(tmp_path / "a.npy", values)
    with pytest.warns(UserWarning, match=r"channel 0 of a\.npy go from .* clipped"):
        dataset = load_dataset(tmp_path / "a.npy", selection=Selection(value_range=[-0.5, 0.25, 0, 15]))
    assert close(dataset.images, scaled(values, [-0.5, 0], [0.25, 15]))
    assert dataset.images[:, 0].min() == -1 and dataset.images[:, 0].max() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = load_dataset(tmp_path / "a.npy", selection=Selection(value_range=np.array([-100, 100])))
    assert close(wide.images, scaled(values, [-100, -100], [100, 100]))
    assert wide.value_range == ValueRange((-100.0, -100.0), (100.0, 100.0), "NCHW")


def test_wrong_ranges_and_sizes_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", latents(channels=3))
    for ends, words in (
        ([1], "3 channels; expected a low and a high"),
        ([0, 1, 0, 1], "3 channels; expected a low and a high"),
        ([2, 1], "the low end first"),
        ([0, float("inf")], "expected a low and a high"),
        ([float("nan"), 1], "expected a low and a high"),
        ([0, 1e39], "expected a low and a high"),
    ):
        with pytest.raises(InputError, match=words):
            open_dataset(tmp_path / "a.npy", selection=Selection(value_range=ends))
    for options in ({"image_size": 8}, {"channels": 1}):
        with pytest.raises(InputError, match=r"floats of 3x6x6, and .* was asked for"):
            open_dataset(tmp_path / "a.npy", **options)
    np.save(tmp_path / "b.npy", np.zeros((2, 4, 4), np.uint8))
    for options in (Selection(layout="NHWC"), Selection(value_range=[0, 255])):
        with pytest.raises(InputError, match=r"8-bit images; .*--layout, --value-range"):
            open_dataset(tmp_path / "b.npy", selection=options)
    (tmp_path / "pictures").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "pictures" / "a.png")
    with pytest.raises(InputError, match="has pictures; a layout and a range of values"):
        open_dataset(tmp_path / "pictures", selection=Selection(layout="NCHW"))
    with pytest.raises(InputError, match=r"--value-range is 'a,b'; expected LOW,HIGH"):
        parse_range("a,b")
    assert parse_range("-4,4") == [-4, 4] and parse_range("1e3, 2e3,0,1") == [1000, 2000, 0, 1]


def test_units_come_back(tmp_path):
    """A pressure that varies by 2 around 101,325 keeps the resolution of float32, which is 1/128 there."""
    rng = np.random.default_rng(2)
    field = (101325 + rng.uniform(-1, 1, (6, 1, 8, 8))).astype(np.float32)
    np.save(tmp_path / "a.npy", field[:, 0])
    dataset = load_dataset(tmp_path / "a.npy")
    assert dataset.value_range.layout == "NHW"
    back = dataset.value_range.to_array(dataset.images)
    assert back.shape == (6, 8, 8) and np.array_equal(back, field[:, 0])
    several = latents(channels=4)
    low, high = measured(several)
    for layout, stored in (("NCHW", several), ("NHWC", np.ascontiguousarray(several.transpose(0, 2, 3, 1)))):
        span = ValueRange(tuple(low), tuple(high), layout)
        back = span.to_array(span.to_model(torch.from_numpy(several)))
        assert back.dtype == np.float32 and back.shape == stored.shape and back.flags.c_contiguous
        width = np.subtract(high, low).reshape((1, 4, 1, 1) if layout == "NCHW" else 4)
        assert (np.abs(back - stored) <= 2.0**-23 * width).all()
    with pytest.raises(InputError, match="1 of 2 samples have NaN, the first at position 1"):
        ValueRange((0.0,), (1.0,)).to_array(torch.tensor([0, float("nan")]).view(2, 1, 1, 1))


def test_digests_tell_arrays_and_ranges_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(arrayfile, "_READ_WHOLE", 10)
    values = latents(count=50)
    digests = set()
    for name, changed in (("a", None), ("b", (20, 1, 3, 3)), ("c", (49, 3, 5, 5))):
        other = values.copy()
        if changed is not None:
            other[changed] += 0.25
        np.savez(tmp_path / f"{name}.npz", images=other)
        np.save(tmp_path / f"{name}.npy", other)
        for suffix in ("npz", "npy"):
            for ends in (None, [-1e4, 1e4]):
                options = Selection(value_range=ends)
                found = open_dataset(tmp_path / f"{name}.{suffix}", in_memory=False, selection=options).digest
                assert found == open_dataset(tmp_path / f"{name}.{suffix}", in_memory=False, selection=options).digest
                digests.add(found)
    assert len(digests) == 12


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"low": [0]},
        {"low": [0], "high": [1], "layout": "NCHW", "more": 1},
        {"low": 0, "high": 1, "layout": "NCHW"},
        {"low": [], "high": [], "layout": "NCHW"},
        {"low": [0], "high": [1, 2], "layout": "NCHW"},
        {"low": [1], "high": [0], "layout": "NCHW"},
        {"low": [True], "high": [2], "layout": "NCHW"},
        {"low": ["0"], "high": [1], "layout": "NCHW"},
        {"low": [0], "high": [10**400], "layout": "NCHW"},
        {"low": [float("nan")], "high": [1], "layout": "NCHW"},
        {"low": [0], "high": [float("inf")], "layout": "NCHW"},
        {"low": [0], "high": [1], "layout": ["NCHW"]},
        {"low": [0, 0], "high": [1, 1], "layout": "NHW"},
        {"low": [0] * 20000, "high": [1] * 20000, "layout": "NCHW"},
    ],
)
def test_a_stored_range_that_is_none_is_refused(entry):
    with pytest.raises(InputError, match="expected"):
        ValueRange.from_dict(entry)


def test_a_stored_range_comes_back():
    span = ValueRange((-1.5, 0.1), (2.0, 0.1), "NHWC")
    assert ValueRange.from_dict(span.to_dict()) == span and span.ends == [-1.5, 2.0, 0.1, 0.1]
    assert ValueRange.given(span.ends, 2, "NHWC") == span


def test_a_compressed_file_is_packed_anew_as_the_message_says(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=latents(), labels=np.arange(5))
    with zipfile.ZipFile(tmp_path / "a.npz") as packed, zipfile.ZipFile(tmp_path / "b.npz", "w") as stored:
        for name in packed.namelist():  # what unzip and zip -0 do
            stored.writestr(name, packed.read(name))
    monkeypatch.setattr(arrayfile, "_READ_WHOLE", 10)
    dataset = open_dataset(tmp_path / "b.npz", in_memory=False)
    assert isinstance(dataset.source._array, np.memmap) and dataset.labels.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(everything(dataset), load_dataset(tmp_path / "a.npz").images)


def test_arrays_and_tensors_are_scaled_alike():
    values = latents(dtype=np.float32)
    span = ValueRange.given([-1, 1, -20, 10, 0, 0, 7.5, 7.5], 4, "NCHW")
    assert np.array_equal(span.to_model(torch.from_numpy(values)).numpy(), span.array_to_model(values))
    assert (span.array_to_model(values)[:, 2:] == 0).all()  # channels of one value, whatever the values are
    for wrong in (values[:, :3], values.astype(np.int32), values[0, 0]):
        with pytest.raises(InputError, match=r"expected floats \[\.\.\., 4, H, W\]"):
            span.array_to_model(wrong)
        with pytest.raises(InputError, match=r"expected floats \[\.\.\., 4, H, W\]"):
            span.to_model(torch.from_numpy(wrong))
