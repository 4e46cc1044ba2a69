"""The comparison of trainings: its loops go on where they stopped and are what the other codes do, its conclusions are
those of numbers that one can reckon by hand, and its commands run."""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import peers
from benchmarks.__main__ import app
from benchmarks.quality import recipes, speedrun, subjects, tables, training
from benchmarks.quality.compare import ALL_AVERAGES
from benchmarks.quality.recipes import DIFFUSERS, LUCIDRAINS, OURS
from ddpm_fast.errors import InputError
from ddpm_fast.nn import UNet

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")
needs_diffusers = pytest.mark.skipif(bool(peers.absent(peers.DIFFUSERS)), reason=peers.absent(peers.DIFFUSERS) or "-")
needs_lucidrains = pytest.mark.skipif(
    bool(peers.absent(peers.LUCIDRAINS)), reason=peers.absent(peers.LUCIDRAINS) or "-"
)


@pytest.fixture(scope="module")
def data():
    found = subjects.images_of("digits", None, quick=True)
    return dataclasses.replace(found, images=found.images[..., 4:12, 4:12].contiguous())  # small, to be fast


def tiny(loop):
    if loop != OURS:
        return recipes.theirs(loop, network=subjects.QUICK_NETWORK)
    return subjects.fast(64, 16, 1e-3, 2).replace(network=subjects.QUICK_NETWORK)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


# --- the loops


@pytest.mark.parametrize(
    "loop",
    [
        OURS,
        pytest.param(DIFFUSERS, marks=needs_diffusers),
        pytest.param(LUCIDRAINS, marks=needs_lucidrains),
    ],
)
def test_a_training_that_was_stopped_gives_the_same_weights(loop, data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)  # after each step
    others = [code for code in (OURS, DIFFUSERS) if not (code == DIFFUSERS and peers.absent(peers.DIFFUSERS))]
    whole = training.Training(tiny(loop), 3, tmp_path / "whole", others)
    whole.train(data, CPU, [32, 64])

    def stop(images):
        if images >= 48:
            raise KeyboardInterrupt

    first = training.Training(tiny(loop), 3, tmp_path / "stopped", others)
    with pytest.raises(KeyboardInterrupt):
        first.train(data, CPU, [32, 64], stop)
    again = training.Training(tiny(loop), 3, tmp_path / "stopped", others)
    again.train(data, CPU, [32, 64])
    assert [mark.images for mark in again.marks] == [mark.images for mark in whole.marks] == [32, 64]
    start = UNet(tiny(loop).unet(data)).state_dict()
    for average in whole.averages:
        for mark, other in zip(whole.marks, again.marks, strict=True):
            weights, same = whole.weights(mark, average), again.weights(other, average)
            assert weights.keys() == same.keys() == start.keys()
            assert all(torch.equal(weights[name], same[name]) for name in weights), average
    live = [whole.weights(mark, "live")["conv_in.weight"] for mark in whole.marks]
    assert not torch.equal(*live)
    with pytest.raises(InputError, match="another training"):
        training.Training(tiny(loop), 4, tmp_path / "whole", others).train(data, CPU, [32, 64])


@needs_diffusers
def test_the_script_trains_either_network_alike(data):
    """Ours as a module and diffusers' own, from the same weights."""
    from ddpm_fast.formats.diffusers.network import to_diffusers

    loops = [
        training.make_loop(recipes.theirs(DIFFUSERS, network=subjects.QUICK_NETWORK, own_network=own), data, 0, CPU, 96)
        for own in (False, True)
    ]
    state = loops[0].model.state_dict()
    loops[1].model.load_state_dict(to_diffusers(state, loops[1].model.state_dict(), loops[1].config))
    loops[1].ema.__init__(loops[1].model)  # its average begins with these weights, too
    before = {name: tensor.clone() for name, tensor in state.items()}
    for loop in loops:
        torch.manual_seed(1)
        for _ in range(3):
            loop.step()
    for average in ("own", "live"):
        one, other = (loop.weights(average) for loop in loops)
        moved = sum(float((one[name] - before[name]).norm() ** 2) for name in one) ** 0.5
        apart = sum(float((one[name] - other[name]).norm() ** 2) for name in one) ** 0.5
        assert moved > 1e-5 and apart < 0.01 * moved, (average, apart, moved)


@needs_diffusers
def test_the_script_is_sampled_with_what_it_was_trained_for(data):
    loop = training.make_loop(tiny(DIFFUSERS).replace(settings={"lr_warmup_steps": 2}), data, 0, CPU, 96)
    diffusion = tiny(DIFFUSERS).made_diffusion()
    torch.testing.assert_close(diffusion.schedule.alphas_cumprod.float(), loop.chain.alphas_cumprod, rtol=1e-4, atol=0)
    assert loop.chain.config.prediction_type == "epsilon" and diffusion.objective.prediction == "eps"
    # The cosine of the script ends with the last of its steps.
    for _ in range(loop.steps):
        loop.step()
    assert loop.images == 96 and loop.lr.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


@needs_lucidrains
def test_lucidrains_defaults_are_its_own(data):
    from denoising_diffusion_pytorch import Trainer

    signature = inspect.signature(Trainer.__init__).parameters
    assert {name: signature[name].default for name in recipes.TRAINER} == recipes.TRAINER
    loop = training.make_loop(tiny(LUCIDRAINS), data, 0, CPU, 96)
    diffusion = tiny(LUCIDRAINS).made_diffusion()
    torch.testing.assert_close(
        diffusion.schedule.alphas_cumprod.float(), loop.diffusion.alphas_cumprod, rtol=1e-4, atol=1e-7
    )
    assert loop.diffusion.objective == "pred_v" and diffusion.objective.prediction == "v"
    images = data.images[:4]
    t, noise = torch.tensor([3, 200, 500, 900]), torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    theirs = loop.diffusion(images.float() / 255, noise=noise, times=t, loss_reduction="none")
    x_t = loop.diffusion.q_sample(images.float() / 127.5 - 1, t, noise)
    ours = diffusion.training_losses(loop.model(x_t, t), images, t, noise)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


# --- the conclusions


def line(images, fid, seconds=None):
    return {"images": images, "seconds": images if seconds is None else seconds, "fid": {"value": fid}}


def test_who_was_there_sooner():
    ours, theirs = [line(10, 9.0), line(20, 4.0)], [line(100, 8.0), line(200, 5.0), line(300, 4.5)]
    found = speedrun.conclusion(4.5, ours, theirs)
    assert (found["ours"]["seconds"], found["theirs"]["seconds"], found["speedup"]) == (20, 300, 15.0)
    assert speedrun.conclusion(5.0, ours, theirs)["speedup"] == 10.0
    late = speedrun.conclusion(3.0, ours, theirs)
    assert late["ours"] is late["theirs"] is late["speedup"] is None


def committed(name):
    return json.loads((ROOT / f"benchmarks/results/quality/{name}.json").read_text())


@pytest.mark.parametrize(("name", "images"), [("quality", 30_000), ("variants", 30_000), ("long", 200_000)])
def test_the_page_says_what_the_committed_trainings_are_worth(name, images):
    found, page = committed(f"xeon-avx512-2-cores-{name}-digits"), (ROOT / "docs/quality.md").read_text()
    groups = {}
    for run in found["runs"]:
        groups.setdefault((run["name"], run["average"]), []).append(run)
    assert groups and found["images"] == images
    for (recipe, average), runs in groups.items():
        values = [tables.spread([read(run) for run in runs]) for read in tables.COLUMNS.values()]
        told = [recipe, *([average] if average != "own" else []), *values]
        assert f"| {' | '.join(told)} |" in page, told


@pytest.mark.parametrize("name", ["own-samplers", "long-own-samplers"])
def test_the_page_says_what_each_sampler_is_worth(name):
    page = (ROOT / "docs/quality.md").read_text()
    runs = [run for run in committed(f"xeon-avx512-2-cores-{name}-digits")["runs"] if run["average"] == "own"]
    assert len(runs) == 8 and {run["drawing"]["n"] for run in runs} == {500}
    for run in runs:
        values = [tables.spread([read(run)]) for read in tables.COLUMNS.values()]
        told = [run["name"], f"{run['drawing']['sampler']}, {run['drawing']['steps']}", *values]
        assert f"| {' | '.join(told)} |" in page, told


def test_the_page_says_what_each_average_is_worth():
    page = (ROOT / "docs/quality.md").read_text()
    first = [run for run in committed("xeon-avx512-2-cores-quality-digits")["runs"] if run["seed"] == 0]
    own = {run["name"]: tables.spread([run["fid"]["value"]]) for run in first if run["average"] == "own"}
    assert (
        f"ours is at a Frechet distance of {own['ours']}, ours, fast at {own['ours, fast']}, diffusers at "
        f"{own['diffusers']}, and lucidrains at {own['lucidrains']}."
    ) in page.replace("\n", " ")
    for name in own:  # our average is the best, or nearly
        worth = {run["average"]: run["fid"]["value"] for run in first if run["name"] == name}
        assert worth["own" if name.startswith("ours") else "ours"] < 1.011 * min(worth.values())


def test_the_readme_says_what_longer_trainings_are_worth():
    readme = (ROOT / "README.md").read_text().replace("\n", " ")

    def worth(name, steps_of_ours, steps_of_theirs):
        runs = [run for run in committed(f"xeon-avx512-2-cores-{name}-digits")["runs"] if run["average"] == "own"]
        steps = {code: steps_of_ours if code.startswith("ours") else steps_of_theirs for code in ALL_AVERAGES}
        runs = [run for run in runs if run["drawing"]["steps"] == steps[run["name"]]]
        assert len(runs) == 4
        return {run["name"]: f"{run['fid']['value']:.0f}" for run in runs}

    same, own = worth("long", 20, 20), worth("long-own-samplers", 50, 1000)
    assert (
        f"200,000 they are at {same['ours']}, the Trainer's at {same['lucidrains']}, and the example's at "
        f"{same['diffusers']} (one run of each, all drawn by the same 20 steps)"
    ) in readme
    assert (
        f"they are at {own['ours']} with 50 steps, and the two others at {own['lucidrains']} and {own['diffusers']} "
        "with 1,000 (of 500 samples)."
    ) in readme


def test_the_page_on_evaluating_says_what_the_committed_sweep_found():
    found = committed("xeon-avx512-2-cores-sweep-digits")
    page = (ROOT / "docs/evaluating.md").read_text().replace("\n", " ")
    at = {(row["sampler"], row["steps"], row["guidance"]): row for row in found["combinations"]}
    distance = {key: row["fid"]["value"] for key, row in at.items()}
    assert len(at) == 18 and min(distance, key=distance.get) == ("ddpm", 20, 1.0)
    assert f"the Frechet distance ({distance['ddpm', 20, 1.0]:.1f})" in page
    assert f"with 10 steps ({distance['ddim', 10, 1.0]:.1f})" in page
    assert f"much farther with 5 ({distance['dpmpp_2m', 5, 1.0]:.1f})" in page
    for sampler, steps, guidance in at:
        plain, guided = (at[sampler, steps, g]["pr"] for g in (1.0, 2.0))
        assert guided["precision"] > plain["precision"] and guided["recall"] < plain["recall"]
        assert distance["dpmpp_2m", steps, guidance] >= distance[sampler, steps, guidance]


def test_the_page_says_what_the_former_defaults_were_worth():
    page = (ROOT / "docs/quality.md").read_text().replace("\n", " ")
    worth = {
        run["name"]: run["fid"]["value"] for run in committed("xeon-avx512-2-cores-former-defaults-digits")["runs"]
    }
    assert f"the distance was {worth['ours']:,.0f}, behind the {worth['diffusers']:,.0f} of diffusers' script" in page
    assert f'where "ours, fast" itself is at {worth["ours, fast"]:.0f}' in page


def test_the_page_says_what_the_committed_parts_are_worth():
    parts, page = committed("xeon-avx512-2-cores-parts-digits")["parts"], (ROOT / "docs/quality.md").read_text()
    assert [row["part"] for row in parts] == list(speedrun.PARTS)
    for row in parts:
        if "fid" in row:
            assert f"| {row['part']} | {tables.spread([row['fid']])} | {row['images']:.2f} |" in page, row
    (kernels,) = [row["seconds"] for row in parts if row["part"] == speedrun.KERNELS]
    assert f"settings takes {kernels:.2f} times as long" in page.replace("\n", " ")


def test_the_page_says_what_the_committed_speedrun_measured():
    runs = committed("epyc-avx2-2-cores-speedrun-digits")["runs"]
    ours, theirs = ([run for run in runs if run["name"] == name] for name in ("ours", "theirs"))
    found = speedrun.conclusion(theirs[-1]["fid"]["value"], ours, theirs)
    page = (ROOT / "docs/quality.md").read_text()
    assert f"**{found['speedup']:.1f} times sooner**" in page and found["speedup"] >= 3
    for run in (theirs[-1], ours[1], ours[-1]):
        told = f"{run['images']:,} | {run['seconds'] / 60:.1f} | {run['fid']['value']:.1f} |"
        assert told in page, told


def test_what_a_part_costs():
    """Where the distance is 1000/images, a distance of 20 is that of 50 images: twice as many would have done."""
    curve = [line(n, 1000 / n) for n in (25, 50, 100)]
    found = speedrun.cost(line(100, 20.0, seconds=150), curve)
    assert found["images"] == pytest.approx(2.0) and found["seconds"] == 1.5 and found["time"] == pytest.approx(3.0)
    assert speedrun.cost(line(100, 10.0), curve)["images"] == pytest.approx(1.0)
    assert speedrun.cost(line(100, 100.0), curve)["images"] == pytest.approx(10.0)  # beyond the curve
    assert speedrun.cost(line(100, 8.0), curve)["images"] == pytest.approx(0.8)  # better without it


def test_one_part_alone_is_put_back():
    full = subjects.digits().ours
    flat = lambda recipe: {  # noqa: E731
        (group, name): value
        for group, fields in recipe.to_dict().items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }
    changed = {}
    for part, recipe in speedrun.put_back(full).items():
        before, after = flat(full), flat(recipe)
        changed[part] = {name for _, name in after if after[_, name] != before.get((_, name))}
    assert changed["weighting"] == {"loss_weighting"} and changed["timesteps"] == {"timestep_sampling"}
    assert changed["learning rate"] == {"lr", "warmup"} and changed["batch"] == {"batch_size", "lr_steps"}
    assert changed["schedule"] == {"schedule"} and changed["network"] == {"scale_shift"}
    # As many images at the end of the learning rate, whatever the batch.
    batch = speedrun.put_back(full)["batch"].config
    assert batch.lr_steps * batch.batch_size == pytest.approx(full.config.lr_steps * full.config.batch_size, abs=16)


def test_a_variant_differs_in_one_thing():
    recipe = subjects.digits(30_000).ours
    found = subjects.variants(recipe)
    for what, variant in found.items():
        assert variant != recipe, what
        config = variant.config
        assert config.batch_size * config.lr_steps == pytest.approx(30_000, abs=64), what
    assert len({json.dumps(variant.to_dict()) for variant in found.values()}) == len(found)


def test_the_table_has_means_and_deviations():
    def score(seed, fid):
        rest = {"kid": {"value": 1e-3 * fid}, "pr": dict.fromkeys(("precision", "recall", "density", "coverage"), 0.5)}
        drawing = {"sampler": "ddim", "steps": 5, "n": 100}
        return {"images": 30, "name": "a", "seed": seed, "average": "own", "drawing": drawing, **line(30, fid), **rest}

    (*_, row) = tables.scores([score(0, 1.0), score(1, 2.0), score(2, 3.0)]).splitlines()
    assert row.split(" | ")[5:8] == ["3", "2 ± 1", "2 ± 1"]
    assert tables.spread([0.25]) == "0.25" and tables.spread([1234.5]) == "1,234"
    assert tables.spread([1.0, 2.0]) == f"1.5 ± {math.sqrt(0.5):.2g}"


# --- the commands


@needs_diffusers
def test_the_speedrun_of_digits_runs_and_goes_on(tmp_path):
    options = ["speedrun", "digits", "--out", tmp_path / "s.json", "--work", tmp_path / "work", "--quick"]
    result = run(*options, "--device", "cpu", "--part", "kernels", "--part", "average", "--part", "timesteps")
    assert result.exit_code in (0, 1), result.output  # 1 where the few steps of ours do not reach the goal
    found = json.loads((tmp_path / "s.json").read_text())
    (goal,) = found["results"]
    theirs = [x for x in found["runs"] if x["name"] == "theirs"]
    assert goal["goal"] == theirs[-1]["fid"]["value"] and [x["images"] for x in theirs] == [32, 64]
    assert [row["part"] for row in found["parts"]] == ["kernels", "average", "timesteps"]
    assert all(row["time"] > 0 for row in found["parts"]) and found["about"]["features"] == "made up"
    assert "| timesteps |" in (tmp_path / "s.md").read_text()
    assert (tmp_path / "s.png").stat().st_size > 10_000
    again = run(*options, "--device", "cpu")
    assert again.exit_code == result.exit_code and "images," not in again.output, "what was found is measured again"
    other = run(*options, "--device", "cpu", "--seed", 1)
    assert other.exit_code == 2 and "differs in" in other.output


def test_parts_are_measured_without_the_other_code(tmp_path):
    options = ["speedrun", "digits", "--out", tmp_path / "s.json", "--work", tmp_path / "work"]
    options += ["--quick", "--ours-only"]
    refused = run(*options)
    assert refused.exit_code == 2 and "no fixed goal" in refused.output and "--parts" in refused.output
    assert run(*options, "--device", "cpu", "--part", "timesteps").exit_code == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["results"] == [] and [row["part"] for row in found["parts"]] == ["timesteps"]
    assert "theirs" not in {x["name"] for x in found["runs"]}
    assert (tmp_path / "s.md").read_text().startswith("| part put back |")


def test_the_speedrun_of_cifar10_runs(tmp_path):
    import numpy as np

    np.savez(tmp_path / "c.npz", images=np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8))
    options = ["speedrun", "cifar10", "--out", tmp_path / "s.json", "--work", tmp_path / "work", "--quick"]
    missing = run(*options, "--ours-only")
    assert missing.exit_code == 2 and "give --data" in missing.output
    run(*options, "--data", tmp_path / "c.npz", "--ours-only", "--device", "cpu")
    found = json.loads((tmp_path / "s.json").read_text())
    assert [result["goal"] for result in found["results"]] == [4.0, 3.17]
    assert [x["images"] for x in found["runs"] if x["average"] == "own"] == [16, 32]


@pytest.mark.parametrize("name", list(subjects.SUBJECTS))
def test_the_trainings_are_planned_to_their_end(name):
    chosen = subjects.subject(name)
    config = chosen.ours.config
    assert chosen.marks_of(chosen.images)[-1] == chosen.images
    assert abs(config.lr_steps * config.batch_size - chosen.images) < config.batch_size
    with pytest.raises(InputError, match="unknown"):
        subjects.subject("cifar100")


@needs_diffusers
def test_the_codes_are_compared(tmp_path):
    options = ["quality", "--out", tmp_path / "q.json", "--work", tmp_path / "work", "--quick", "--seeds", 1]
    result = run(*options, "--code", "ours", "--code", "diffusers", "--own-samplers", "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "q.json").read_text())
    assert {(x["name"], x["drawing"]["sampler"]) for x in found["runs"]} == {
        (name, sampler) for name in ("ours", "diffusers") for sampler in ("dpmpp_2m", "ddpm")
    }
    assert "| diffusers | own |" in (tmp_path / "q.md").read_text()
    with Image.open(tmp_path / "q.png") as picture:  # a row of images for each code
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert run(*options, "--code", "nobody").exit_code == 2


def test_a_comparison_of_nothing_is_an_error(tmp_path, monkeypatch):
    options = ["quality", "--out", tmp_path / "q.json", "--work", tmp_path / "work", "--quick", "--device", "cpu"]
    result = run(*options, "--seeds", 0)
    assert result.exit_code == 2 and "seeds" in result.output
    monkeypatch.setattr(peers, "absent", lambda peer: f"{peer} is not installed")
    result = run(*options, "--seeds", 1, "--code", "diffusers")
    assert result.exit_code == 2 and "nothing was trained" in result.output
