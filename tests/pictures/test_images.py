"""Pictures are compared with pixels worked out by hand and read back by Pillow and NumPy."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm_fast.data import load_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable, check_writable_folder, remove_leftovers
from ddpm_fast.pictures import images

# Two 1x2 images of one channel: 0, 255 and 51, 204.
TWO = torch.tensor([[[[-1.0, 1.0]]], [[[51 / 127.5 - 1, 204 / 127.5 - 1]]]])
LEVELS = np.arange(256, dtype=np.uint8)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def everything_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


class Broken(Exception):
    """What a simulated disk raises."""


def broken(*args, **kwargs):
    raise Broken


# to_uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_8_bit_level_survives_the_round_trip(dtype):
    x = (torch.arange(256, dtype=dtype) / 127.5 - 1).view(1, 1, 16, 16)
    assert np.array_equal(images.to_uint8(x).ravel(), LEVELS)


@pytest.mark.parametrize(
    ("value", "level"),
    [
        pytest.param(-1.0, 0, id="black"),
        pytest.param(1.0, 255, id="white"),
        pytest.param(0.5, 191, id="191.25 goes down"),
        pytest.param(0.25, 159, id="159.375 goes down"),
        pytest.param(-0.375, 80, id="79.6875 goes up: truncation would say 79"),
        pytest.param(-3.0, 0, id="clamped below"),
        pytest.param(1.01, 255, id="clamped above, not wrapped to 0"),
        pytest.param(float("inf"), 255, id="infinity is clamped"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounds_to_nearest_and_clamps(value, level, dtype):
    assert images.to_uint8(torch.full((1, 1, 1, 1), value, dtype=dtype)).item() == level


def test_low_precision_is_widened_before_the_scaling():
    x = torch.arange(-128, 129) / 128  # exact in bfloat16, where x + 1 and the product are not
    expected = np.rint((x.double().numpy() + 1) * 127.5)
    assert np.array_equal(images.to_uint8(x.bfloat16().view(1, 1, 1, 257)).ravel(), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_channels_go_last_whatever_the_memory_format(layout):
    levels = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    x = (levels / 127.5 - 1).to(memory_format=layout).requires_grad_()
    result = images.to_uint8(x)
    assert result.shape == (2, 4, 5, 3) and result.dtype == np.uint8
    assert np.array_equal(result, levels.numpy().transpose(0, 2, 3, 1))


def test_no_samples_are_no_images():
    assert images.to_uint8(torch.zeros(0, 3, 4, 4)).shape == (0, 4, 4, 3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        pytest.param(torch.zeros(3, 8, 8), r"float32 \[3, 8, 8\]; expected floats \[N, C, H, W\]", id="one image"),
        pytest.param(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"uint8 .* expected floats", id="8 bits already"),
        pytest.param(
            torch.cat([TWO, torch.full((2, 1, 1, 2), torch.nan)]),
            "2 of 4 samples have NaN, the first at position 2: the model has diverged",
            id="NaN",
        ),
    ],
)
def test_what_is_not_a_sample_is_refused(x, message):
    with pytest.raises(InputError, match=message):
        images.to_uint8(x)


# make_grid


def test_grid_by_hand():
    grid = images.make_grid(images.to_uint8(TWO), columns=1, pad=1, background=9)
    expected = [
        [9, 9, 9, 9],
        [9, 0, 255, 9],
        [9, 9, 9, 9],
        [9, 51, 204, 9],
        [9, 9, 9, 9],
    ]
    assert grid[..., 0].tolist() == expected


def test_grid_scales_pixels_but_not_the_padding():
    grid = images.make_grid(images.to_uint8(TWO), columns=2, pad=1, background=9, scale=2)
    row = [9, 0, 0, 255, 255, 9, 51, 51, 204, 204, 9]
    assert grid[..., 0].tolist() == [[9] * 11, row, row, [9] * 11]


@pytest.mark.parametrize(
    ("n", "columns", "shape"),
    [
        pytest.param(1, None, (1, 1), id="one image"),
        pytest.param(5, None, (2, 3), id="a square with an empty cell"),
        pytest.param(9, None, (3, 3), id="a full square"),
        pytest.param(3, 10, (1, 3), id="more columns than images"),
        pytest.param(7, 3, (3, 3), id="a last row that is not full"),
    ],
)
def test_grid_places_images_row_by_row(n, columns, shape):
    values = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1).repeat(3, axis=3)
    expected = np.full(shape[0] * shape[1], 255, np.uint8)
    expected[:n] = np.arange(n)
    grid = images.make_grid(values, columns=columns, pad=0)
    assert grid.shape == (*shape, 3)
    assert all(np.array_equal(grid[..., c], expected.reshape(shape)) for c in range(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": 0}, "columns is 0; expected at least 1"),
        ({"pad": -1}, "pad is -1; expected 0 pixels or more"),
        ({"scale": 0}, "scale is 0; expected at least 1"),
        ({"background": 256}, "background is 256; expected a grey value"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_layouts_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        images.make_grid(images.to_uint8(TWO), **options)


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(InputError, match=r"\[0, 4, 4, 3\]; expected uint8 \[N, H, W, C\], N > 0"):
        images.make_grid(np.zeros((0, 4, 4, 3), np.uint8))


# Files


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_read_back_by_pillow(tmp_path, channels, mode):
    levels = torch.arange(6 * channels).view(1, channels, 2, 3) * 10
    images.save_grid(tmp_path / "a.png", levels / 127.5 - 1, pad=0)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", mode, (3, 2))
    expected = levels[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels(tmp_path / "a.png").reshape(2, 3, channels), expected)


def test_images_are_named_by_sample_id_and_label(tmp_path):
    paths = images.save_images(tmp_path / "new" / "folder", TWO, first_index=12, labels=torch.tensor([3, 10]))
    assert [path.name for path in paths] == ["000012_label3.png", "000013_label10.png"]
    assert everything_in(tmp_path / "new" / "folder") == [path.name for path in paths]
    assert pixels(paths[1]).tolist() == [[51, 204]]
    assert [p.name for p in images.save_images(tmp_path, TWO)] == ["000000.png", "000001.png"]


@pytest.mark.parametrize("labels", [None, [4, 7], torch.tensor([4, 7]), np.array([4, 7], np.uint8)], ids=type)
def test_npz_holds_images_and_labels(tmp_path, labels):
    images.save_npz(tmp_path / "a.npz", TWO, labels)
    with np.load(tmp_path / "a.npz") as file:
        assert file["images"].dtype == np.uint8
        assert file["images"].tolist() == [[[[0], [255]]], [[[51], [204]]]]
        if labels is None:
            assert file.files == ["images"]
        else:
            assert file["labels"].dtype == np.int64 and file["labels"].tolist() == [4, 7]


@pytest.mark.parametrize("channels", [1, 3])
def test_what_was_sampled_can_be_trained_on(tmp_path, channels):
    levels = torch.arange(5 * channels * 64).remainder(256).view(5, channels, 8, 8)
    images.save_npz(tmp_path / "a.npz", levels / 127.5 - 1, labels=[0, 1, 2, 1, 0])
    images.save_images(tmp_path / "folder", levels / 127.5 - 1, first_index=8)
    from_array = load_dataset(str(tmp_path / "a.npz"), 8, channels, classes=True)
    from_folder = load_dataset(str(tmp_path / "folder"), 8, channels)
    assert torch.equal(from_array.images, levels.byte()) and from_array.labels.tolist() == [0, 1, 2, 1, 0]
    assert torch.equal(from_folder.images, levels.byte())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param([1], r"int64 \[1\]; expected one integer for each sample, \[2\]", id="too few"),
        pytest.param([0.5, 1.0], r"float64 \[2\]; expected one integer", id="not integers"),
        pytest.param([[1], [2]], r"int64 \[2, 1\]; expected one integer", id="a column"),
    ],
)
@pytest.mark.parametrize("save", [images.save_npz, lambda path, x, labels: images.save_images(path, x, 0, labels)])
def test_labels_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, save, labels, message):
    with pytest.raises(InputError, match=message):
        save(tmp_path / "out", TWO, labels)
    assert everything_in(tmp_path) == []


def test_negative_sample_ids_are_refused(tmp_path):
    with pytest.raises(InputError, match="first_index is -1; expected a sample id"):
        images.save_images(tmp_path, TWO, first_index=-1)


def test_gif_frames_by_hand(tmp_path):
    frames = [TWO, -TWO, torch.zeros_like(TWO)]
    images.save_gif(tmp_path / "a.gif", frames, columns=2, pad=1, background=0, frame_ms=40, hold_ms=1000)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        shown = [(np.asarray(f.convert("L"))[1].tolist(), f.info["duration"]) for f in ImageSequence.Iterator(gif)]
    assert shown == [
        ([0, 0, 255, 0, 51, 204, 0], 40),
        ([0, 255, 0, 0, 204, 51, 0], 40),
        ([0, 128, 128, 0, 128, 128, 0], 1000),  # 0 is 127.5, which rounds to even
    ]


def test_gif_in_colour_keeps_few_colours_exactly(tmp_path):
    red_blue = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]).view(2, 3, 1, 1)
    images.save_gif(tmp_path / "a.gif", [red_blue, red_blue.flip(0)], pad=0)
    with Image.open(tmp_path / "a.gif") as gif:
        shown = [np.asarray(f.convert("RGB"))[0].tolist() for f in ImageSequence.Iterator(gif)]
    assert shown == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 255], [255, 0, 0]]]


def test_gif_lays_opacity_over_the_background(tmp_path):
    clear_and_solid = torch.tensor([[1.0, -1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]).view(2, 4, 1, 1)
    images.save_gif(tmp_path / "a.gif", [clear_and_solid], pad=0, background=255)
    with Image.open(tmp_path / "a.gif") as gif:
        assert np.asarray(gif.convert("RGB"))[0].tolist() == [[255, 255, 255], [255, 0, 0]]


def test_a_gif_of_frames_that_stand_still_lasts_as_long(tmp_path):
    images.save_gif(tmp_path / "a.gif", [TWO] * 5, frame_ms=40, hold_ms=1000)
    with Image.open(tmp_path / "a.gif") as gif:
        assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif)) == 4 * 40 + 1000


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        pytest.param([], {}, "shapes: none; expected one or more", id="no frames"),
        pytest.param([TWO, TWO[:1]], {}, r"\[1, 1, 1, 2\], \[2, 1, 1, 2\]; .* of one shape", id="two shapes"),
        pytest.param([TWO], {"frame_ms": 0}, "frame_ms is 0 .* at least 10", id="no time"),
    ],
)
def test_impossible_gifs_are_refused(tmp_path, frames, options, message):
    with pytest.raises(InputError, match=message):
        images.save_gif(tmp_path / "a.gif", frames, **options)
    assert everything_in(tmp_path) == []


# save_samples


@pytest.mark.parametrize(
    ("out", "written"),
    [
        pytest.param("grid.png", ["grid.png"], id="grid"),
        pytest.param("GRID.PNG", ["GRID.PNG"], id="capitals"),
        pytest.param("all.npz", ["all.npz"], id="array"),
        pytest.param("folder", ["folder/000005_label1.png", "folder/000006_label2.png"], id="no suffix"),
        pytest.param("v1.5/", ["v1.5/000005_label1.png", "v1.5/000006_label2.png"], id="closing slash"),
        pytest.param("old.run", ["old.run/000005_label1.png", "old.run/000006_label2.png"], id="existing folder"),
    ],
)
def test_the_name_says_what_is_written(tmp_path, out, written):
    if out == "old.run":
        (tmp_path / out).mkdir()
    out = f"{tmp_path}/{out}"
    images.check_output(out, channels=1)
    images.save_samples(out, TWO, labels=[1, 2], first_index=5)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == written


def test_save_samples_lays_out_the_grid(tmp_path):
    images.save_samples(tmp_path / "a.png", TWO, columns=1, scale=3)
    assert pixels(tmp_path / "a.png").shape == (2 + 3 + 2 + 3 + 2, 2 + 6 + 2)


@pytest.mark.parametrize("act", [images.check_output, lambda out: images.save_samples(out, TWO)], ids=["check", "save"])
def test_an_unknown_suffix_is_refused(tmp_path, act):
    with pytest.raises(InputError, match=r"a\.jpg: expected a name ending in \.png .* \.npz .* / \(a folder\)"):
        act(tmp_path / "a.jpg")
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("out", ["a.png", "folder"])
def test_channels_that_make_no_picture_are_refused_unless_npz(tmp_path, channels, out):
    message = rf"{channels} channels, but a picture has 1 \(grey\), 3 \(RGB\) or 4 \(RGBA\): write them as \.npz"
    with pytest.raises(InputError, match=message):
        images.check_output(tmp_path / out, channels)
    with pytest.raises(InputError, match=message):
        images.save_samples(tmp_path / out, torch.zeros(2, channels, 4, 4))
    assert everything_in(tmp_path) == []
    images.check_output(tmp_path / "a.npz", channels)
    images.save_samples(tmp_path / "a.npz", torch.zeros(2, channels, 4, 4))
    assert np.load(tmp_path / "a.npz")["images"].shape == (2, 4, 4, channels)


@pytest.mark.parametrize("out", ["taken/a.png", "taken/a.npz", "taken/folder", "taken/a/b.png", "x" * 300 + ".png"])
def test_an_output_that_cannot_be_written_is_refused_before_sampling(tmp_path, out):
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(InputError, match="cannot write"):
        images.check_output(tmp_path / out)
    assert everything_in(tmp_path) == ["taken"]


# Whole files or none


WRITERS = {
    "grid": ("a.png", lambda path: images.save_grid(path, TWO), (Image.Image, "save")),
    "npz": ("a.npz", lambda path: images.save_npz(path, TWO), (np, "savez")),
    "gif": ("a.gif", lambda path: images.save_gif(path, [TWO, -TWO]), (Image.Image, "save")),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("failing", ["writer", "rename"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, name, failing):
    file, write, writer = WRITERS[name]
    (tmp_path / file).write_bytes(b"old")
    module, function = writer if failing == "writer" else (os, "replace")
    monkeypatch.setattr(module, function, broken)
    with pytest.raises(Broken):
        write(tmp_path / file)
    assert everything_in(tmp_path) == [file]
    assert (tmp_path / file).read_bytes() == b"old"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, Broken])
@pytest.mark.parametrize("durable", [True, False])
def test_an_interrupted_block_leaves_nothing(tmp_path, interruption, durable):
    with pytest.raises(interruption), atomic_path(tmp_path / "a", durable) as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == tmp_path and not (tmp_path / "a").exists()
        raise interruption
    assert everything_in(tmp_path) == []


def test_a_new_file_has_the_usual_permissions_and_an_old_one_keeps_its_own(tmp_path):
    (tmp_path / "usual").touch()
    (tmp_path / "private").touch()
    (tmp_path / "private").chmod(0o640)
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    for name, mode in (("new", usual), ("private", 0o640)):
        with atomic_path(tmp_path / name) as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_name_as_long_as_can_be_is_written(tmp_path):
    with atomic_path(tmp_path / ("x" * 255)) as temporary:
        temporary.write_text("new")
    assert everything_in(tmp_path) == ["x" * 255]


def test_only_leftovers_are_removed(tmp_path):
    with pytest.raises(Broken), atomic_path(tmp_path / "a") as temporary:
        (tmp_path / "seen").write_text(temporary.name)
        raise Broken
    (tmp_path / (tmp_path / "seen").read_text()).touch()  # as a killed writer would have left it
    (tmp_path / "other.tmp").touch()
    remove_leftovers(tmp_path)
    assert everything_in(tmp_path) == ["other.tmp", "seen"]


def test_check_writable_creates_the_parents_and_nothing_else(tmp_path):
    assert check_writable(tmp_path / "a" / "b" / "c.png") == (tmp_path / "a" / "b" / "c.png").resolve()
    assert everything_in(tmp_path / "a" / "b") == []


def test_check_writable_names_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "read-only").write_text("old")
    (tmp_path / "read-only").chmod(0o444)
    os.mkfifo(tmp_path / "pipe")
    for target, message in (
        (tmp_path, "is a folder; expected the name of a file"),
        (tmp_path / "read-only", "read-only is read-only: choose another name"),
        (tmp_path / "pipe", "is a device, pipe or socket"),
        ("/dev/null", "/dev/null is a device"),
        ("/proc/nothing/a.png", "cannot write in the folder /proc/nothing"),
        ("/proc/a.png", "cannot write in the folder /proc"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(target)
        with pytest.raises(InputError), atomic_path(target):
            pytest.fail("the block must not be entered")
    assert everything_in(tmp_path) == ["pipe", "read-only"]
    monkeypatch.setattr(Path, "touch", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(InputError, match="Read-only file system; choose another place"):
        check_writable_folder(tmp_path)
