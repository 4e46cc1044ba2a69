"""Which files count as pictures: every promised format by every suffix, by content, and nothing that runs a program."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data import load_dataset, raster, read_picture
from ddpm_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {
    "PNG": ".png .apng",
    "JPEG": ".jpg .jpeg .jpe .jfif",
    "MPO": ".mpo",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif .tiff",
    "WEBP": ".webp",
    "AVIF": ".avif .avifs",
    "JPEG2000": ".jp2 .j2k .j2c .jpc .jpf .jpx",
    "TGA": ".tga .icb .vda .vst",
    "ICO": ".ico",
    "PPM": ".ppm .pgm .pbm .pnm",
}
PAIRS = [(plugin, suffix) for plugin, suffixes in SUFFIXES.items() for suffix in suffixes.split()]
COLOUR = (200, 40, 90)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def write(path, plugin, colour=COLOUR):
    image = Image.new("RGB", (16, 16), colour)
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    more = {"save_all": True, "append_images": [image]} if plugin == "MPO" else {}
    image.save(path, format=plugin, **lossless.get(plugin, more))
    return path


def has(plugin):
    if plugin in ("MPO", "TGA"):
        return True
    return plugin not in [one.plugin for one in raster.lacking()]


def check_colour(images):
    assert images.shape[1:] == (3, 16, 16)
    assert np.abs(images.numpy().astype(int) - np.array(COLOUR)[:, None, None]).max() <= 3


@pytest.mark.parametrize("plugin, suffix", PAIRS, ids=[suffix for _, suffix in PAIRS])
def test_every_format_is_read_by_each_of_its_suffixes(tmp_path, plugin, suffix):
    if not has(plugin):
        pytest.skip(f"this Pillow has no {plugin}")
    write(tmp_path / f"a{suffix}", plugin)
    write(tmp_path / f"b{suffix.upper()}", plugin)
    images = load_dataset(tmp_path).images
    assert len(images) == 2
    check_colour(images)
    check_colour(read_picture(tmp_path / f"a{suffix}", "--image")[None])


def test_the_list_of_suffixes_is_this_one():
    assert sorted(raster.SUFFIXES) == sorted(suffix for _, suffix in PAIRS)


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_content_counts_where_the_suffix_is_missing_or_wrong(tmp_path, zipped):
    folder = tmp_path / "set"
    folder.mkdir()
    plugins = [plugin for plugin in SUFFIXES if plugin != "TGA" and has(plugin)]
    for i, plugin in enumerate(plugins):
        write(folder / f"{i:02}", plugin)
        write(folder / f"{i:02}.png", plugin)
    (folder / "README").write_text("These are pictures.")
    write(folder / "raw", "TGA")  # its content does not say what it is
    source = folder
    if zipped:
        source = tmp_path / "set.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
    with pytest.warns(UserWarning, match=r"^ignored 2 files: 2 without a suffix$"):
        images = load_dataset(source).images
    assert len(images) == 2 * len(plugins)
    check_colour(images)


def test_other_files_are_counted_by_kind_in_one_warning(tmp_path):
    write(tmp_path / "a.png", "PNG")
    (tmp_path / "b").mkdir()
    for name in ("1.txt", "b/2.TXT", "3.svg", "LICENSE", "b/bad.\x1b[31m", ".DS_Store", "b/._a.png"):
        (tmp_path / name).write_text("no picture")
    with pytest.warns(UserWarning) as caught:
        load_dataset(tmp_path)
    said = [str(warning.message) for warning in caught]
    assert len(said) == 1 and caught[0].filename == __file__
    assert said[0].startswith("ignored 5 files: 2 .txt, ")
    for part in ("1 .svg", "1 without a suffix", r"1 .\x1b[31m"):
        assert part in said[0]


def test_many_kinds_of_other_files_are_summed_up(tmp_path):
    write(tmp_path / "a.png", "PNG")
    for i in range(9):
        (tmp_path / f"x.k{i}").touch()
    with pytest.warns(UserWarning, match=r"^ignored 9 files: (1 \.k\d, ){5}4 of other kinds$"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("by_content", [True, False], ids=["recognised", "unknown to Pillow"])
def test_a_format_that_this_pillow_lacks_is_said(tmp_path, monkeypatch, by_content):
    write(tmp_path / "a.png", "PNG")
    write(tmp_path / "b.jp2", "JPEG2000") if by_content else (tmp_path / "b.jp2").write_bytes(b"something newer")
    absent = next(one for one in raster.RASTERS if one.name == "JPEG 2000")
    monkeypatch.setattr(raster, "lacking", lambda: (absent,))
    with pytest.warns(UserWarning, match=r"b\.jp2: this Pillow \([\d.]+\) cannot read JPEG 2000: install"):
        assert load_dataset(tmp_path).skipped == ["b.jp2"]


# ---- no picture runs a program ----


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program `gs` that leaves a trace, where Pillow would find it."""
    trace, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\necho 10.0\n: > '{trace}'\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return trace


needs_sh = pytest.mark.skipif(shutil.which("sh") is None, reason="the stand-in for Ghostscript is a shell script")


@needs_sh
@pytest.mark.parametrize("suffix", [".png", ".tga", ".tif", ""], ids=["png", "tga", "tif", "none"])
def test_postscript_named_as_a_picture_starts_nothing(tmp_path, ghostscript, suffix):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "a.png", "PNG")
    bad = folder / f"b{suffix}"
    bad.write_bytes(EPS)
    with pytest.warns(UserWarning, match=r"b\.\w+: (its content is none of|it is a damaged TGA)|1 without a suffix"):
        load_dataset(folder, image_size=8)
    with pytest.raises(InputError, match=r"--init-image: cannot read the image .*b.*\((its content|it is a damaged)"):
        read_picture(bad, "--init-image")
    assert not ghostscript.exists()


@needs_sh
def test_the_stand_in_is_what_pillow_alone_would_start(tmp_path, ghostscript):
    (tmp_path / "b.png").write_bytes(EPS)
    code = (
        f"from PIL import Image; Image.open({str(tmp_path / 'b.png')!r}).load()"  # Pillow remembers whether gs exists
    )
    subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ghostscript.exists()


def test_pillow_opens_nothing_without_a_list_of_formats():
    """Nobody in the package, its benchmarks or its docs asks Pillow to try every format that it knows."""
    asked = []
    for folder in ("ddpm_fast", "benchmarks", "docs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            for node in ast.walk(ast.parse(text)) if "Image.open" in text else ():
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                    asked.append((path.name, [keyword.arg for keyword in node.keywords]))
    assert all("formats" in keywords for _, keywords in asked), asked
