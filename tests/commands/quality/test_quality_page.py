"""`--page` shows the samples, their nearest real images and the worst and best of them, as plain loops find them."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from support.commands import run, save_small_model
from support.made_features import features_of, save_network

import ddpm_fast as df

pytestmark = pytest.mark.usefixtures("wide_terminal")
N, REAL = 12, 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    save_small_model(folder / "a.safetensors")
    save_network(folder / "features.pt")
    # As grey as the samples, so that some of these lie in neighbourhoods and others do not.
    np.savez(folder / "real.npz", images=np.random.default_rng(0).integers(118, 138, (REAL, 8, 8, 3), np.uint8))
    return folder


def measure(place, out, *arguments, reference="real.npz"):
    options = {
        "--model": place / "a.safetensors",
        "--reference": place / reference,
        "--features": place / "features.pt",
        "--n": N,
        "--batch-size": 5,
        "--steps": 2,
        "--out": out,
    }
    return run("evaluate", "fid", *(part for option in options.items() for part in option), *arguments)


def samples(place):
    loaded = df.load_model(place / "a.safetensors")
    x = df.sample(loaded.model, loaded.diffusion, N, steps=2, seed=0, labels=[i % 3 for i in range(N)], batch_size=5)
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def cells(page):
    """The images of each sheet of a page: uint8 [H, W, C] each, those that are all white left out."""
    sheets = []
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page):
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        found = [
            sheet[y : y + 8, x : x + 8] for y in range(2, sheet.shape[0], 10) for x in range(2, sheet.shape[1], 10)
        ]
        sheets.append([one for one in found if (one != 255).any()])
    return sheets


def place_of(image, images):
    """Which of the images this is, up to the rounding of another batch size."""
    apart = np.abs(images.astype(int) - image).max((1, 2, 3))
    assert apart.min() <= 1
    return int(apart.argmin())


def test_it_shows_what_plain_loops_find(place, tmp_path):
    result = measure(place, tmp_path / "a.json", "--page", tmp_path / "a.html")
    assert result.exit_code == 0, result.output
    fake = samples(place)
    real = np.load(place / "real.npz")["images"]
    x, y = features_of(fake), features_of(real)
    apart = np.linalg.norm(x[:, None] - y[None], axis=2)
    between = np.sort(np.linalg.norm(y[:, None] - y[None], axis=2), axis=1)
    density = (apart < between[:, 5]).sum(1) / 5
    page = (tmp_path / "a.html").read_text()
    first, *rows, worst, best = cells(page)
    assert [place_of(one, fake) for one in first] == list(range(N))
    closest = np.argsort(apart.min(1))[:8]
    assert len(rows) == 2 * 2 * 8
    for i, (sample, nearest) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        number = closest[i] if i < 8 else i - 8
        assert [place_of(one, fake) for one in sample] == [number]
        assert [place_of(one, real) for one in nearest] == np.argsort(apart[number])[:5].tolist()
    order = [place_of(one, fake) for one in worst]
    assert sorted(order) == list(range(N)) and [place_of(one, fake) for one in best] == order[::-1]
    assert (np.diff(density[order]) >= 0).all()
    outside = [i for i in order if density[i] == 0]
    assert len(outside) > 1 and (np.diff(apart.min(1)[outside]) <= 0).all()
    assert f"{len(outside) / N:.1%} of the samples lie in no such neighbourhood" in page


def test_the_numbers_are_those_of_the_json_with_what_they_are_of(place, tmp_path):
    measure(place, tmp_path / "a.json", "--page", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    report = json.loads((tmp_path / "a.json").read_text())
    for text in (
        f"{report['fid']['value']:.4g}",
        f"{report['features']['name']}, {report['features']['resizing']}",
        "12 of a.safetensors: ddpm, 2 steps, seed 0",
        "20 images of real.npz",
    ):
        assert text in page


def test_statistics_alone_have_no_pictures(place, tmp_path):
    features = features_of(np.load(place / "real.npz")["images"])
    np.savez(place / "statistics.npz", mu=features.mean(0), sigma=np.cov(features.T))
    result = measure(place, tmp_path / "a.json", "--page", tmp_path / "a.html", reference="statistics.npz")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "a.html").read_text()
    assert "known by its statistics alone" in page and len(cells(page)) == 1


def test_names_of_files_are_shown_and_not_obeyed(place, tmp_path):
    name = "<script>x<&real.npz"
    (place / name).write_bytes((place / "real.npz").read_bytes())
    assert measure(place, tmp_path / "a.json", "--page", tmp_path / "a.html", reference=name).exit_code == 0
    page = (tmp_path / "a.html").read_text()
    assert "&lt;script&gt;x&lt;&amp;real.npz" in page and "<script" not in page


def test_other_names_and_samples_without_pictures_are_refused(place, tmp_path):
    result = measure(place, tmp_path / "a.json", "--page", tmp_path / "a.png")
    assert result.exit_code == 2 and "expected a name ending in .html" in result.stderr
    np.savez(tmp_path / "f.npz", features=np.random.default_rng(0).normal(size=(9, 5)))
    options = ("--samples", tmp_path / "f.npz", "--reference", place / "real.npz", "--features", place / "features.pt")
    result = run("evaluate", "fid", *options, "--out", tmp_path / "a.json", "--page", tmp_path / "a.html")
    assert result.exit_code == 2 and "--samples is a file of features" in result.stderr
    assert not list(tmp_path.glob("a.*"))
