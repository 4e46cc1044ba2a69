"""`--sweep` measures every combination from the same noise as the command by itself would, goes on where it was
stopped, and leaves out what makes no sense."""

import json
import os
import signal

import numpy as np
import pytest
from support.commands import run, save_small_model
from support.made_features import save_network

from ddpm_fast.commands.quality import sweep as sweeping
from ddpm_fast.commands.quality.sweep_report import figure_of, markdown_of, read_sweep
from ddpm_fast.commands.stopping import Stopping
from ddpm_fast.errors import InputError
from ddpm_fast.pictures.canvas import save_figure

pytestmark = pytest.mark.usefixtures("wide_terminal", "no_figure")


@pytest.fixture
def no_figure(monkeypatch):
    """The figure, which takes longer than the rest, is not drawn."""
    monkeypatch.setattr(sweeping, "save_figure", lambda figure, path: path.touch())
    monkeypatch.setattr(sweeping, "figure_of", lambda report: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two class-conditional models, one without classes, features, and labelled images."""
    folder = tmp_path_factory.mktemp("sweep")
    save_small_model(folder / "a.safetensors")
    save_small_model(folder / "b.safetensors", training={"steps": 2})
    save_small_model(folder / "plain.safetensors", classes=0)
    save_network(folder / "features.pt")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(folder / "real.npz", images=images, labels=np.arange(12) % 3)
    return folder


def measure(place, out, *arguments, command="fid", model="a", n=10):
    options = {
        "--model": place / f"{model}.safetensors",
        "--reference": place / "real.npz",
        "--features": place / "features.pt",
        "--n": n,
        "--batch-size": 3,
        "--out": out,
    }
    return run("evaluate", command, *(part for option in options.items() for part in option), *arguments)


def sweep(place, out, *axes, **others):
    return measure(place, out, *(part for axis in axes for part in ("--sweep", axis)), **others)


def rows(out):
    """The combinations of a report, by sampler, steps and guidance."""
    report = json.loads(out.read_text())
    return {(row["sampler"], row["steps"], row["guidance"]): row for row in report["combinations"]}


def test_each_combination_has_the_numbers_of_the_command_alone(place, tmp_path):
    out = tmp_path / "sweep.json"
    result = sweep(place, out, "steps=2", "sampler=ddim,ddpm", "guidance=1,2", command="all")
    assert result.exit_code == 0, result.output
    found = rows(out)
    assert set(found) == {(sampler, 2, guidance) for sampler in ("ddim", "ddpm") for guidance in (1.0, 2.0)}
    for sampler, steps, guidance in [("ddim", 2, 1.0), ("ddpm", 2, 2.0)]:
        alone = tmp_path / "alone.json"
        options = ("--sampler", sampler, "--steps", steps, "--guidance", guidance)
        assert measure(place, alone, *options, command="all").exit_code == 0
        row, expected = found[sampler, steps, guidance], json.loads(alone.read_text())
        for metric in ("fid", "kid", "pr", "is"):
            assert row[metric] == pytest.approx(expected[metric])
        assert row["network_calls"] == steps and row["seconds"] > 0
        assert row["seconds_per_image"] == row["seconds"] / 10


def test_the_best_combination_is_marked_in_the_table_that_is_written_and_printed(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "figure_of", figure_of)
    monkeypatch.setattr(sweeping, "save_figure", save_figure)
    out = tmp_path / "sweep.json"
    result = sweep(place, out, "steps=2,3,5")
    found = rows(out)
    best = min(found, key=lambda key: found[key]["fid"]["value"])
    table = (tmp_path / "sweep.md").read_text()
    assert table in result.stdout
    (bold,) = (line for line in table.splitlines() if "**" in line)
    assert f"**{found[best]['fid']['value']:.4g}**" in bold and bold.split("|")[2].strip() == str(best[1])
    assert f"Best by Frechet distance: ddpm {best[1]}." in table
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    assert report["combinations"][report["best"]["row"]] == found[best]


def test_a_sweep_that_was_stopped_goes_on_where_it_was(place, tmp_path, monkeypatch):
    out, counted = tmp_path / "sweep.json", []
    row = sweeping.Sweep._row

    def counting(self, combination, drawn, outcome):
        counted.append(combination.steps)
        return row(self, combination, drawn, outcome)

    monkeypatch.setattr(sweeping.Sweep, "_row", counting)
    check = Stopping.check

    def stop(self, *_):
        if len(counted) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        check(self)

    with monkeypatch.context() as stopped:
        stopped.setattr(Stopping, "check", stop)
        result = sweep(place, out, "steps=2,3,4,5")
    assert result.exit_code == 130 and counted == [2, 3]
    assert f"2 combinations are in {out}; the same command with --out {out} goes on" in result.stdout
    before = rows(out)
    result = sweep(place, out, "steps=2,3,4,5")
    assert result.exit_code == 0, result.output
    assert counted == [2, 3, 4, 5] and "2 of 4 combinations are finished already" in result.stdout
    after = rows(out)
    assert len(after) == 4 and all(after[key] == before[key] for key in before)
    sweep(place, out, "steps=2,3,4,5,6")
    assert counted == [2, 3, 4, 5, 6]


def test_another_sweep_is_not_continued(place, tmp_path):
    out = tmp_path / "sweep.json"
    sweep(place, out, "steps=2")
    before = out.read_text()
    result = sweep(place, out, "steps=2", n=9)
    assert result.exit_code == 2 and "a sweep with another n, classes: give the same options" in result.stderr
    assert out.read_text() == before


def test_models_are_an_axis_and_a_changed_file_is_measured_again(place, tmp_path):
    out = tmp_path / "sweep.json"
    models = [str(place / f"{name}.safetensors") for name in "ab"]
    assert sweep(place, out, f"model={','.join(models)}", "steps=2").exit_code == 0
    first, second = json.loads(out.read_text())["combinations"]
    assert [first["model"], second["model"]] == models and first["model_digest"] != second["model_digest"]
    assert first["fid"] == second["fid"], "both have the same weights"
    report = json.loads(out.read_text())
    report["combinations"][1]["model_digest"] = "0" * 64
    out.write_text(json.dumps(report))
    assert (
        "1 of 2 combinations are finished already" in sweep(place, out, f"model={','.join(models)}", "steps=2").stdout
    )
    result = sweep(place, tmp_path / "other.json", f"model={models[0]},{place / 'plain.safetensors'}")
    assert result.exit_code == 2 and "has another classes than" in result.stderr


def test_what_makes_no_sense_is_left_out_and_said(place, tmp_path):
    out = tmp_path / "sweep.json"
    result = sweep(place, out, "steps=2,50,ddim4", "spacing=even,quadratic", "eta=0,1", "sampler=ddpm,ddim")
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    drawn = {(row["sampler"], row["steps"], row["spacing"], row["eta"]) for row in report["combinations"]}
    expected = {(2, "even"), (2, "quadratic"), ("ddim4", "even")}
    assert drawn == {(name, *one, eta) for name, eta in [("ddpm", None), ("ddim", 0), ("ddim", 1)] for one in expected}
    said = " ".join(report["left_out"])
    assert "eta belongs to ddim: ddpm is drawn without it, once" in said
    assert "cannot take 50 steps: the model's chain has T = 20" in said and "quadratic spacing needs a number" in said
    assert all(line in result.stdout for line in report["left_out"])


@pytest.mark.parametrize(
    ("axes", "others", "message"),
    [
        (["guidance=1,2"], {"model": "plain"}, "has no classes, so there is nothing to guide towards"),
        (["guidance=1,2", "steps=100"], {}, "no combination can be drawn"),
        (["sampler=euler"], {}, "--sweep sampler"),
    ],
)
def test_an_error_comes_before_anything_is_drawn(place, tmp_path, monkeypatch, axes, others, message):
    monkeypatch.setattr(sweeping.Sweep, "run", lambda self: pytest.fail("drew something"))
    result = sweep(place, tmp_path / "sweep.json", *axes, **others)
    assert result.exit_code == 2 and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_guidance_needs_labels(place, tmp_path):
    options = ("--labels", "none", "--sweep", "guidance=1,2")
    result = measure(place, tmp_path / "sweep.json", *options)
    assert result.exit_code == 2 and "the samples have no classes" in result.stderr


@pytest.mark.parametrize("option", ["--keep", "--page", "--write-reference"])
def test_what_is_for_one_way_of_drawing_is_refused(place, tmp_path, option):
    name = "page.html" if option == "--page" else "x.npz"
    result = measure(place, tmp_path / "sweep.json", option, tmp_path / name, "--sweep", "steps=2")
    assert result.exit_code == 2 and f"{option} is for one way of drawing" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot read"),
        ("[1]", "is not the report of a sweep"),
        ('{"kind": "sweep", "axes": {}, "combinations": []}', "lacks settings, axes or combinations"),
        ('{"kind": "sweep", "axes": {}, "settings": {}, "combinations": [3]}', "one of its combinations is none: 3"),
        ('{"kind": "sweep", "axes": {}, "settings": {"features": 3}, "combinations": []}', "lacks settings"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_sweep(tmp_path / "a.json")


def test_the_table_is_even_and_names_cannot_break_it():
    made = [
        {
            "model": f"{name}|x\n**y",
            "sampler": "ddim",
            "steps": 5,
            "spacing": "even",
            "eta": 0.0,
            "guidance": 1.0,
            "network_calls": 5,
            "seconds": 1.0,
            "seconds_per_image": 0.25,
            "fid": {"value": value, "bias": None},
        }
        for name, value in (("a", 3.0), ("b", 2.0))
    ]
    table = markdown_of(made).split("\n\n")[0].splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    assert table[2].count("|") - table[2].count("\\|") == table[0].count("|")
    assert "a\\|x\\x0a**y" in table[2] and table[3].rstrip(" |").endswith("**2**")
