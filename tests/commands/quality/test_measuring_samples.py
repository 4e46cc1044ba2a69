"""`evaluate fid|kid|pr|is|all`: the numbers are those of NumPy and SciPy on the same images, however
they are drawn, kept and read; and what cannot be measured is refused before anything is drawn."""

import functools
import json
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
import typer.testing
from scipy.spatial.distance import cdist
from support.commands import run, save_small_model
from support.made_features import features_of, logits_of, save_network
from support.networks import random_unet

import ddpm_fast as df
from ddpm_fast.commands.quality import classes, drawing, opening
from ddpm_fast.commands.quality.drawing import DrawnImages
from ddpm_fast.commands.quality.reference import Reference
from ddpm_fast.commands.quality.samples import StoredImages
from ddpm_fast.commands.stopping import Stopped
from ddpm_fast.data import load_dataset, split_held_out
from ddpm_fast.files import checkpoint
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.metrics import inception_score, kernel_distance
from ddpm_fast.metrics.feature_set import FeatureSet, Kind
from ddpm_fast.metrics.statistics import Statistics
from ddpm_fast.pictures.images import to_uint8

N = 24
HOW = ("--sampler", "ddim", "--steps", 3, "--seed", 5)


@pytest.fixture(scope="module", autouse=True)
def once():
    """Models and feature networks are loaded once, and the options of `evaluate` are put together once: that takes a
    third of the time of these tests."""
    with (
        mock.patch.object(opening, "load_model", functools.cache(opening.load_model)),
        mock.patch.object(opening, "load_extractor", functools.cache(opening.load_extractor)),
        mock.patch.object(typer.testing, "_get_command", functools.cache(typer.testing._get_command)),
    ):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of three classes, a feature network, and real images, sorted by class, with and without labels."""
    folder = tmp_path_factory.mktemp("quality")
    model = random_unet(
        0.3, image_size=8, in_channels=3, model_channels=8, channel_mult=(1, 2), num_classes=3, norm_groups=4
    )
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(20), "v", "fixed_small")
    config = {"unet": model.config.to_dict(), "diffusion": diffusion.to_dict(), "label_names": ["a", "b", "c"]}
    checkpoint.save_model(folder / "model.safetensors", model.state_dict(), config)
    save_small_model(folder / "grey.safetensors", classes=0, channels=1)
    save_network(folder / "made.pt")
    save_network(folder / "no_logits.pt", logits=False)
    random = np.random.default_rng(3)
    images = (random.normal(128, 60, (40, 8, 8, 3)) + random.normal(0, 30, (40, 1, 1, 1))).clip(0, 255).astype(np.uint8)
    labels = np.repeat([0, 1, 2], [20, 5, 15])
    np.savez(folder / "real.npz", images=images, labels=labels, label_names=np.array(["c", "a", "b"]))
    np.savez(folder / "plain.npz", images=images)
    np.savez(folder / "large.npz", images=np.zeros((9, 16, 16, 3), np.uint8))
    np.savez(folder / "few.npz", images=images[:4])
    np.savez(folder / "floats.npz", images=images.astype(np.float32))
    return folder


def evaluate(files, metric, *arguments, reference="real.npz", features="made.pt", out=None, model="model.safetensors"):
    """The command with the usual options. Of model and reference, None leaves the option out."""
    given = [metric, f"--features={files / features}"]
    given += [] if model is None else [f"--model={files / model}", *HOW]
    given += [] if reference is None else [f"--reference={files / reference}"]
    return run("evaluate", *given, "--out", out or files / "quality.json", *arguments)


def report_of(files, *arguments, **options):
    result = evaluate(files, *arguments, **options)
    assert result.exit_code == 0, result.output
    return json.loads((files / "quality.json").read_text())


def drawn(files, labels):
    """The samples as the library draws them: uint8 [n, 8, 8, 3]."""
    loaded = df.load_model(files / "model.safetensors")
    options = {"sampler": "ddim", "steps": 3, "seed": 5, "labels": labels}
    return to_uint8(df.sample(loaded.model, loaded.diffusion, len(labels), **options))


def real(files):
    with np.load(files / "real.npz") as arrays:
        return arrays["images"]


def frechet(x, y):
    root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    return apart + np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root)


def share_inside(points, centres, k):
    """The share of the points that lie within the k-th nearest neighbour's distance of a centre."""
    radii = np.sort(cdist(centres, centres), axis=1)[:, k]
    return (cdist(points, centres) <= radii).any(1).mean()


IN_PROPORTION = classes.in_proportion([5, 15, 20], N)  # of a, b and c


def test_the_numbers_are_those_of_the_same_images(files):
    report = report_of(files, "all", "--n", N)
    x, y = features_of(images := drawn(files, IN_PROPORTION)), features_of(real(files))
    assert report["fid"]["value"] == pytest.approx(frechet(x, y), rel=1e-4)
    kid = kernel_distance(x, y, subset_size=N // 2, seed=2020)
    assert report["kid"]["value"] == pytest.approx(kid.value, rel=1e-4) and report["kid"]["subset_size"] == N // 2
    assert report["pr"]["precision"] == share_inside(x, y, 3) and report["pr"]["recall"] == share_inside(y, x, 3)
    assert 0 < report["pr"]["precision"] < 1 and report["pr"]["coverage"] > 0
    score = inception_score(logits_of(images), splits=10, seed=2020)
    assert report["is"]["mean"] == pytest.approx(score.mean, rel=1e-4)


def test_the_report_says_what_was_measured_and_how(files):
    report = report_of(files, "fid", "--n", N, "--guidance", 2)
    loaded = df.load_model(files / "model.safetensors")
    said = {
        "model_digest": loaded.digest,
        "sampler": "ddim",
        "steps": 3,
        "network_calls": 3,
        "guidance": 2.0,
        "seed": 5,
    }
    assert report["samples"].items() >= (said | {"n": N, "model": "model.safetensors", "precision": "fp32"}).items()
    assert report["reference"] == {"name": "real.npz", "n": 40, "part": "all", "training_set": None}
    assert report["features"]["name"] == "made" and len(report["features"]["digest"]) == 64
    assert set(report["seconds"]) == {"drawing", "features", "metrics"} and report["versions"]["torch"]
    assert set(report) & {"fid", "kid", "pr", "is"} == {"fid"}


def test_few_samples_are_said_to_be_biased_and_by_how_much(files):
    result = evaluate(files, "fid", "--n", N)
    report = json.loads((files / "quality.json").read_text())
    assert f"here by about {report['fid']['bias']:.3g}:" in result.stdout and "fewer than 10,000" in result.stdout
    x, y = features_of(drawn(files, IN_PROPORTION)), features_of(real(files))
    order = np.random.RandomState(0).permutation(N)
    halves = [frechet(x[part], y) for part in (order[: N // 2], order[N // 2 :])]
    assert report["fid"]["bias"] == pytest.approx(np.mean(halves) - frechet(x, y), rel=1e-3)


def test_batches_change_nothing_and_the_samples_can_be_kept_and_measured_again(files):
    one = report_of(files, "all", "--n", N)
    other = report_of(files, "all", "--n", N, "--batch-size", 7, "--keep", files / "kept.npz")
    again = report_of(files, "all", "--samples", files / "kept.npz", "--batch-size", 5, model=None)
    for metric in ("fid", "kid", "pr", "is"):
        assert other[metric] == pytest.approx(one[metric], rel=1e-5)
        assert again[metric] == pytest.approx(other[metric], rel=1e-6)
    with np.load(files / "kept.npz") as kept:
        assert np.array_equal(kept["arr_1"], IN_PROPORTION)
        assert np.abs(kept["arr_0"].astype(int) - drawn(files, IN_PROPORTION)).max() <= 1  # rounding of the network
    assert again["samples"]["name"] == "kept.npz" and "sampler" not in again["samples"]


@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_folder_that_sample_has_begun_is_completed(files, tmp_path, format):
    model = ("--model", files / "model.safetensors", *HOW, "--batch-size", 4)
    run("sample", *model, "--n", 8, "--out", tmp_path / "s", "--format", format)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob(f"0*.{format}")}
    result = evaluate(files, "fid", "--n", N, "--samples", tmp_path / "s", "--batch-size", 4, reference="plain.npz")
    assert result.exit_code == 0 and "8 of 24 images are in" in result.stdout
    assert len(before) == (8 if format == "png" else 2)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    completed = json.loads((files / "quality.json").read_text())
    images = drawn(files, torch.arange(N) % 3)  # without labels of the reference, every class in turn
    found = load_dataset(tmp_path / "s").images.permute(0, 2, 3, 1).numpy()
    assert len(found) == N and np.abs(found.astype(int) - images).max() <= 1
    assert completed["fid"]["value"] == pytest.approx(frechet(features_of(found), features_of(real(files))), rel=1e-4)
    there = report_of(files, "fid", "--samples", tmp_path / "s", model=None, reference="plain.npz")
    assert there["fid"]["value"] == pytest.approx(completed["fid"]["value"]) and there["samples"]["n"] == N


def test_a_folder_of_other_samples_is_not_completed(files, tmp_path):
    run("sample", "--model", files / "model.safetensors", *HOW, "--n", 4, "--seed", 6, "--out", tmp_path / "s")
    result = evaluate(files, "fid", "--n", N, "--samples", tmp_path / "s", reference="plain.npz")
    assert result.exit_code == 2 and "seed 6 instead of 5" in result.stderr
    assert len(list((tmp_path / "s").glob("*.png"))) == 4


def test_a_folder_of_other_classes_is_not_completed(files, tmp_path):
    run("sample", "--model", files / "model.safetensors", *HOW, "--n", 4, "--out", tmp_path / "s")  # in turn
    result = evaluate(files, "fid", "--n", N, "--samples", tmp_path / "s")  # as many of each as the reference has
    others = sum(k != label for k, label in enumerate(IN_PROPORTION[:3].tolist())) + (IN_PROPORTION[3] != 0)
    assert result.exit_code == 2 and f"has {others} samples of other classes" in result.stderr
    assert len(list((tmp_path / "s").glob("*.png"))) == 4
    assert evaluate(files, "fid", "--n", N, "--samples", tmp_path / "s", "--labels", "a,b,c").exit_code == 0
    assert len(list((tmp_path / "s").glob("*.png"))) == N


def test_what_is_stopped_stays_in_the_folder(files, tmp_path, monkeypatch):
    write, written = drawing.SampleFolder.write, []

    def stopped(self, part, x):
        if written:
            raise Stopped
        written.append(part)
        write(self, part, x)

    monkeypatch.setattr(drawing.SampleFolder, "write", stopped)
    out = tmp_path / "none.json"
    result = evaluate(files, "fid", "--n", N, "--keep", tmp_path / "s", "--batch-size", 4, out=out)
    assert len(list((tmp_path / "s").glob("*.png"))) == 4 and not out.exists()
    assert "what was drawn is in" in result.stdout and "the same command draws the rest" in result.stdout


@pytest.mark.parametrize("form", ["edm", "adm"])
def test_a_reference_is_computed_once(files, form):
    stats = files / f"{form}.npz"
    whole = report_of(files, "fid", "--n", N, "--write-reference", stats, "--reference-form", form)
    with np.load(stats) as arrays:
        y = features_of(real(files))
        mu, sigma = ("mu", "sigma") if form == "edm" else ("ours_mu", "ours_sigma")
        np.testing.assert_allclose(arrays[mu], y.mean(0), rtol=1e-5)
        np.testing.assert_allclose(arrays[sigma], np.cov(y, rowvar=False), rtol=1e-4, atol=1e-6)
        assert form == "edm" or np.array_equal(arrays["arr_0"], real(files))
    known = report_of(files, "fid", "--n", N, "--labels", "b,c", reference=stats.name)
    want = report_of(files, "fid", "--n", N, "--labels", "b,c")
    assert known["fid"]["value"] == pytest.approx(want["fid"]["value"], rel=1e-9) != whole["fid"]["value"]
    assert known["reference"]["n"] == 40


def test_statistics_of_a_reference_need_no_samples(files):
    result = run(
        "evaluate", "fid", f"--features={files}/made.pt", f"--reference={files}/real.npz",
        f"--write-reference={files}/alone.npz",
    )  # fmt: skip
    assert result.exit_code == 0 and "alone.npz" in result.stdout and not (files / "quality-2.json").exists()
    np.testing.assert_allclose(np.load(files / "alone.npz")["mu"], features_of(real(files)).mean(0), rtol=1e-5)


def test_features_from_elsewhere(files):
    x, y = features_of(real(files)[::2]), features_of(real(files))
    np.save(files / "fake.npy", x)
    np.savez(files / "features.npz", features=y)
    samples = ("--samples", files / "fake.npy")
    both = report_of(files, "all", *samples, model=None, reference="features.npz", features="gone.pt")
    one = report_of(files, "all", *samples, model=None)
    assert both["fid"]["value"] == pytest.approx(frechet(x, y), rel=1e-4)
    assert one["fid"]["value"] == pytest.approx(both["fid"]["value"], rel=1e-4)
    assert "is" not in both and "is" not in one  # without logits


def test_the_inception_score_needs_no_reference(files):
    report = report_of(files, "is", "--n", N, reference=None)
    score = inception_score(logits_of(drawn(files, torch.arange(N) % 3)), splits=10, seed=2020)
    assert report["is"]["mean"] == pytest.approx(score.mean, rel=1e-4) and report["reference"] is None


def test_some_of_the_real_images_are_chosen_from_all_of_them(files):
    report = report_of(files, "fid", "--n", N, "--n-reference", 20)
    chosen = np.sort(np.random.default_rng(0).choice(40, 20, replace=False))
    x, y = features_of(drawn(files, IN_PROPORTION)), features_of(real(files)[chosen])
    assert report["fid"]["value"] == pytest.approx(frechet(x, y), rel=1e-4) and report["reference"]["n"] == 20


@pytest.fixture(scope="module")
def holding_out(files):
    """The model, if it had been trained on the real images but twelve; and the numbers of these."""
    whole = load_dataset(files / "real.npz")
    training, held_out = split_held_out(whole, 12)
    state, config = checkpoint.read_model(files / "model.safetensors")
    checkpoint.save_model(files / "holding_out.safetensors", state, config | {"training": training.recorded()})
    found = [k for k, image in enumerate(whole.images) if (held_out.images == image).flatten(1).all(1).any()]
    assert len(found) == len(held_out) == 12
    return np.array(found)


@pytest.mark.parametrize("part", ["all", "training", "held-out"])
def test_images_held_out_of_the_training_can_be_the_reference(files, holding_out, part):
    result = evaluate(files, "fid", "--n", N, "--part", part, model="holding_out.safetensors")
    report = json.loads((files / "quality.json").read_text())
    rest = np.setdiff1d(np.arange(40), holding_out)
    chosen = {"all": np.arange(40), "training": rest, "held-out": holding_out}[part]
    counts = np.bincount(np.repeat([2, 0, 1], [20, 5, 15])[chosen], minlength=3)
    x = features_of(drawn(files, classes.in_proportion(counts.tolist(), N)))
    assert report["fid"]["value"] == pytest.approx(frechet(x, features_of(real(files)[chosen])), rel=1e-4)
    assert report["reference"]["n"] == len(chosen) and report["reference"]["training_set"] is (part != "held-out")
    assert ("was held out of the training" in result.stdout) is (part == "all")


def test_a_part_that_is_not_known_is_refused(files, holding_out):
    result = evaluate(files, "fid", "--n", N, "--part", "held-out")
    assert result.exit_code == 2 and "does not say that images were held out of its training" in result.stderr
    result = evaluate(
        files, "fid", "--n", N, "--part", "held-out", model="holding_out.safetensors", reference="few.npz"
    )
    assert result.exit_code == 2 and "would be held out" in result.stderr


def test_the_statistics_that_adm_ships_beside_images_count_for_inception_alone(files):
    dataset, mean = load_dataset(files / "plain.npz"), torch.arange(3.0)
    known = FeatureSet(Kind("", ""), "adm", Statistics.from_moments(0, mean, torch.eye(3)))
    reference = Reference("adm", StoredImages(dataset), known)
    assert reference.statistics_for(Kind("inception-2015-12-05", "any")) is known.statistics
    assert reference.statistics_for(Kind("efficientnet-lite0", "any")) is None


@pytest.mark.parametrize("counts", [[5, 15, 20], [1, 0, 7], [3, 3, 3], [1]])
def test_classes_are_in_proportion_at_every_n(counts):
    drawn = classes.in_proportion(counts, 50).numpy()
    share = np.array(counts) / sum(counts)
    for n in range(1, 51):
        assert np.abs(np.bincount(drawn[:n], minlength=len(counts)) - share * n).max() < 1
    if len(set(counts)) == 1:
        assert np.array_equal(drawn, np.arange(50) % len(counts))


def test_samples_can_be_had_one_by_one(files):
    loaded = df.load_model(files / "model.safetensors")
    options = SamplingOptions(sampler="ddim", steps=3, seed=5)
    samples = DrawnImages.of(loaded, N, options, IN_PROPORTION.tolist())
    some = torch.tensor([17, 3, 3])
    images = drawn(files, IN_PROPORTION)[some.numpy()].transpose(0, 3, 1, 2)
    assert np.abs(samples.take(some).numpy().astype(int) - images).max() <= 1
    assert torch.equal(samples.labels(some), IN_PROPORTION[some])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["--n", 1], {}, "--n is 1; expected at least 2"),
        (["--n", 5], {}, "--n: pr needs at least 6 samples, and there are 5"),
        (["--n", N, "--batch-size", 0], {}, "--batch-size is 0"),
        (["--n", N, "--labels", "d"], {}, "d is no class of this model"),
        (["--n", N, "--steps", 21], {}, "21"),
        (["--n", N, "--sampler", "euler"], {}, "euler"),
        (["--n", N], {"reference": "large.npz"}, "images of 3x16x16, and the samples are 3x8x8"),
        (["--n", N], {"reference": "few.npz"}, "--reference: pr needs at least 6 real images, and there are 4"),
        (["--n", N], {"reference": "floats.npz"}, "has floats"),
        (["--n", N], {"reference": "missing.npz"}, "there is no file or folder"),
        (["--n", N], {"reference": None}, "without --reference there is nothing to compare the samples with"),
        (["--n", N], {"reference": "real.npz", "model": "grey.safetensors"}, "the samples are 1x8x8"),
        (["--n", N], {"model": None}, "there are no samples: give --model"),
        (["--n", N], {"features": "real.npz"}, "holds arrays, not a network"),
        (["--n", N, "--metrics", "is"], {"features": "no_logits.pt"}, "is cannot be had: it needs logits"),
        (["--n", N, "--metrics", "fib"], {}, "expected some of fid,kid,pr,is"),
        (["--n", N, "--n-reference", 41], {}, "--n-reference is 41, but real.npz has 40 images"),
        (["--n", N, "--keep", "x.png"], {}, "expected a name ending in .npz, or a folder"),
        (["--n", N, "--write-reference", "x.json"], {}, "is to be an .npz"),
        (["--samples", "real.npz"], {}, "--samples real.npz is a file, to which --model adds nothing"),
        (["--split", "train"], {}, "has no splits"),
    ],
)
def test_refusals_come_before_any_work(files, tmp_path, monkeypatch, arguments, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DrawnImages, "drawn", lambda *_: pytest.fail("nothing must be drawn"))
    result = evaluate(files, "all", *arguments, out=tmp_path / "none.json", **options)
    assert result.exit_code == 2 and message in " ".join((result.stdout + result.stderr).split())
    assert not list(tmp_path.iterdir())


def test_statistics_alone_are_for_fid_alone(files):
    report_of(files, "fid", "--n", N, "--write-reference", files / "some.npz")
    result = evaluate(files, "kid", "--n", N, reference="some.npz")
    assert result.exit_code == 2 and "which is enough for fid alone" in result.stderr
    np.savez(files / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    result = evaluate(files, "fid", "--n", N, reference="wide.npz")
    assert result.exit_code == 2 and "is of 7 features, and made gives 5" in result.stderr


def test_a_file_with_images_is_written_of_images(files, monkeypatch):
    report_of(files, "fid", "--n", N, "--write-reference", files / "some.npz")
    write = ("--write-reference", files / "never.npz", "--reference-form", "adm")
    result = evaluate(files, "fid", "--n", N, *write, reference="some.npz")
    assert result.exit_code == 2 and "--reference has none: give the real images" in result.stderr
    monkeypatch.setattr(opening, "_MOST_WRITTEN", 40 * 192 - 1)
    result = evaluate(files, "fid", "--n", N, *write)
    assert result.exit_code == 2 and "give --n-reference" in result.stderr and not (files / "never.npz").exists()


def test_metrics_are_for_all(files):
    result = evaluate(files, "fid", "--n", N, "--metrics", "kid")
    assert result.exit_code == 2 and "--metrics is for `evaluate all`" in result.stderr


def test_all_leaves_out_what_cannot_be_had(files):
    report = report_of(files, "all", "--n", N, features="no_logits.pt")
    assert set(report) & {"fid", "kid", "pr", "is"} == {"fid", "kid", "pr"}
    report_of(files, "fid", "--n", N, "--write-reference", files / "statistics.npz")
    report = report_of(files, "all", "--n", N, reference="statistics.npz")
    assert set(report) & {"fid", "kid", "pr", "is"} == {"fid", "is"}
