"""`evaluate card` puts on one page what the other commands, or plain loops, find; a model's page on the Hub says it."""

import json

import numpy as np
import pytest
from support.commands import run, save_small_model
from support.made_features import features_of, save_network

import ddpm_fast as df
from ddpm_fast.commands.quality import sweep as sweeping
from ddpm_fast.commands.quality.card import Card
from ddpm_fast.commands.quality.published import lines_of
from ddpm_fast.data import Dataset, load_dataset, split_held_out
from ddpm_fast.errors import InputError
from ddpm_fast.pictures.page import HtmlPage

pytestmark = pytest.mark.usefixtures("wide_terminal")
N = 11


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, features, labelled training images and held-out ones, and a card of them."""
    folder = tmp_path_factory.mktemp("card")
    save_small_model(folder / "a.safetensors", names=["cat", "<b>dog</b>", "hen"])
    save_network(folder / "features.pt")
    rng = np.random.default_rng(0)
    # The training images are as grey as the samples are, and the held-out ones less so: some samples count as copies.
    for name, count, spread in (("real", 15, 10), ("held", 12, 25)):
        images = rng.integers(128 - spread, 128 + spread, (count, 8, 8, 3), np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(count) % 3)
    common = ("--model", folder / "a.safetensors", "--reference", folder / "real.npz", "--n", N, "--batch-size", 6)
    sweep = ("--features", folder / "features.pt", "--sweep", "steps=2,3", "--out", folder / "sweep.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeping, "save_figure", lambda figure, path: None)
        assert run("evaluate", "fid", *common, *sweep).exit_code == 0
    result = card(folder, folder / "card.html", "--held-out", folder / "held.npz", "--sweep", folder / "sweep.json")
    assert result.exit_code == 0, result.output
    return folder


def card(folder, out, *arguments, model="a.safetensors", reference="real.npz"):
    options = {
        "--model": folder / model,
        "--reference": folder / reference,
        "--features": folder / "features.pt",
        "--n": N,
        "--batch-size": 6,
        "--steps": 2,
        "--n-likelihood": 5,
        "--out": out,
    }
    return run("evaluate", "card", *(part for option in options.items() for part in option), *arguments)


@pytest.fixture
def report(place):
    return json.loads((place / "card.json").read_text())


def samples(place):
    loaded = df.load_model(place / "a.safetensors")
    labels = [i % 3 for i in range(N)]
    x = df.sample(loaded.model, loaded.diffusion, N, steps=2, seed=0, labels=labels, batch_size=6)
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def test_the_metrics_are_those_of_evaluate_all(place, report, tmp_path):
    options = ("--model", place / "a.safetensors", "--reference", place / "real.npz", "--steps", 2, "--n", N)
    options += ("--features", place / "features.pt", "--batch-size", 6)
    assert run("evaluate", "all", *options, "--out", tmp_path / "all.json").exit_code == 0
    expected = json.loads((tmp_path / "all.json").read_text())
    for metric in ("fid", "kid", "pr", "is"):
        assert report[metric] == pytest.approx(expected[metric])
    page = (place / "card.html").read_text()
    assert set(report["errors"]) == {"Frechet distance", "precision", "recall", "density", "coverage"}
    for name, error in report["errors"].items():
        is_share = name in report["pr"]
        value = report["pr"][name] if is_share else report["fid"]["value"]
        assert 0 <= error < 10 * value and f"{value:{'.3f' if is_share else '.4g'}} ± {error:.2g}" in page


def test_copies_are_measured_against_held_out_images(place, report):
    real, held = (features_of(np.load(place / f"{name}.npz")["images"]) for name in ("real", "held"))
    ours, theirs = (
        np.linalg.norm(rows[:, None] - real[None], axis=2).min(1) for rows in (features_of(samples(place)), held)
    )
    found, limit = report["memorisation"], np.sort(theirs)[0]
    nearer = np.mean([1.0 if a < b else 0.5 if a == b else 0.0 for a in ours for b in theirs])
    assert found["nearer"] == pytest.approx(nearer) and found["threshold"] == pytest.approx(limit, rel=1e-4)
    assert found["copies"] == pytest.approx((ours < limit).mean()) and found["copies_of_held_out"] == 0
    assert found["median_distance"] == pytest.approx(np.sort(ours)[(N - 1) // 2], rel=1e-4)
    assert f"{found['copies']:.2%}" in (place / "card.html").read_text()


def test_bits_per_dim_are_those_of_evaluate_nll(place, report, tmp_path):
    options = ("--model", place / "a.safetensors", "--data", place / "held.npz", "--n", 5, "--batch-size", 6)
    assert run("evaluate", "nll", *options, "--steps", 20, "--out", tmp_path / "nll.json").exit_code == 0
    expected = json.loads((tmp_path / "nll.json").read_text())
    found = report["likelihood"]
    assert found["total_bits_per_dim"] == pytest.approx(expected["total_bits_per_dim"], rel=1e-6)
    assert f"{found['total_bits_per_dim']:.4f} ± {found['total_stderr']:.4f}" in (place / "card.html").read_text()


def test_the_page_has_every_section_and_names_are_not_obeyed(place, report):
    page = (place / "card.html").read_text()
    sections = ["Measured", "Samples", "Samples beside their nearest reference images"]
    sections += ["The worst and the best samples by density", "Copies of training images"]
    sections += ["Likelihood of held-out images", "Ways of drawing"]
    assert [page.count(f"<h2>{one}</h2>") for one in sections] == [1] * len(sections)
    assert "&lt;b&gt;dog" in page and "<b>" not in page
    assert report["kind"] == "card" and len(report["sweep"]["combinations"]) == 2 and "<tr class=marked>" in page


def test_without_held_out_images_it_says_so(place, tmp_path):
    result = card(place, tmp_path / "card.html")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "card.json").read_text())
    assert report["memorisation"] is report["likelihood"] is report["sweep"] is None
    assert "Not tested: no held-out images were given" in (tmp_path / "card.html").read_text()


def test_the_images_that_the_training_held_out_are_the_yardstick(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Card, "page", lambda *_: HtmlPage("without figures, which take longer than the rest"))
    whole = load_dataset(place / "real.npz")
    assert isinstance(whole, Dataset)
    training, held = split_held_out(whole, 6)
    (tmp_path / "real.npz").write_bytes((place / "real.npz").read_bytes())
    save_small_model(tmp_path / "a.safetensors", training=training.recorded())
    np.savez(tmp_path / "rest.npz", images=training.images.permute(0, 2, 3, 1).numpy(), labels=training.labels.numpy())
    np.savez(tmp_path / "held.npz", images=held.images.permute(0, 2, 3, 1).numpy(), labels=held.labels.numpy())
    (tmp_path / "features.pt").write_bytes((place / "features.pt").read_bytes())
    result = card(tmp_path, tmp_path / "split.html")
    assert result.exit_code == 0 and "The 6 images that the training held out are the yardstick" in result.stdout
    result = card(tmp_path, tmp_path / "given.html", "--held-out", tmp_path / "held.npz", reference="rest.npz")
    assert result.exit_code == 0, result.output
    split, given = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("split", "given"))
    assert split["memorisation"] == pytest.approx(given["memorisation"]) and split["memorisation"]["held_out"] == 6
    assert split["fid"]["value"] == pytest.approx(given["fid"]["value"])
    assert split["reference"]["n"] == 9 and "without the 6 held-out images" in split["reference"]["name"]
    assert split["likelihood"]["total_bits_per_dim"] == pytest.approx(given["likelihood"]["total_bits_per_dim"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-out", "PLACE/real.npz"], "--held-out are the images of --reference"),
        (["--n-likelihood", "1"], "expected at least 2 images, or 0 for none"),
        (["--sweep", "PLACE/card.json"], "is not the report of a sweep"),
        (["--out", "OUT/card.png"], "expected a name ending in .html"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_drawn(place, tmp_path, arguments, message):
    arguments = [one.replace("PLACE", str(place)).replace("OUT", str(tmp_path)) for one in arguments]
    result = card(place, tmp_path / "card.html", *arguments)
    assert result.exit_code == 2 and message in result.stderr and not list(tmp_path.iterdir())


def test_the_page_on_the_hub_says_what_was_measured(place, report):
    digest = df.load_model(place / "a.safetensors").digest
    metrics, copies, likelihood = lines_of(place / "card.json", digest)
    assert (
        f"Frechet distance {report['fid']['value']:.4g} ± {report['errors']['Frechet distance']:.2g}, kernel" in metrics
    )
    assert "11 samples (`ddpm`, 2 steps) against 15 images of `real.npz`; features `" in metrics
    assert f"{report['memorisation']['copies']:.1%} of the samples" in copies and "12 held-out images" in copies
    assert f"{report['likelihood']['total_bits_per_dim']:.4f} bits/dim" in likelihood
    assert lines_of(place / "card.json", "0" * 64) == []


def test_hostile_reports_are_shown_as_code_or_refused(place, report, tmp_path):
    report["features"]["name"] = "`x`\n# Head <script>"
    (tmp_path / "card.json").write_text(json.dumps(report))
    line = lines_of(tmp_path / "card.json", report["samples"]["model_digest"])[0]
    assert "features `'x'\\x0a# Head <script>`" in line
    wrong = [json.dumps(report | change) for change in ({"fid": {"value": "many"}}, {"errors": 3}, {"samples": None})]
    for text in ("[", "[1]", "{}", *wrong):
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(InputError, match=r"cannot read .*card\.json"):
            lines_of(tmp_path / "card.json", report["samples"]["model_digest"])
