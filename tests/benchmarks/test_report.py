"""`python -m benchmarks report`: result files read, drawn as a page, and compared."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.report import compare, drawings, page
from benchmarks.report.results import exponent, read_result
from ddpm_fast.errors import InputError

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
CEILINGS = {"bytes": 1e8, "normals": 2.5e6, "flops fp32": 2e11, "flops bf16": 8e11}


def row(
    what="q_sample", place="2x3x4x4", baseline="torch", speedup=4.0, dtype="float32", seconds=1e-3, **counts
) -> dict:
    """Ours takes 1 ms, moves 10,000 bytes and draws 2,000 normals."""
    return {
        "subject": {
            "what": what,
            "text": f"{what} {dtype} {place}",
            "name": f"{what} {dtype}",
            "place": place,
            "dtype": dtype,
            "batch": 2,
            "steps": 1,
        },
        "setting": "calls",
        "measured": "ddpm_fast",
        "baseline": baseline,
        "speedup": speedup,
        "low": 0.95 * speedup,
        "high": 1.05 * speedup,
        "ours": {"median_s": seconds, "error": 1e-7},
        "peer": {"median_s": seconds * speedup, "error": 2e-7},
        "counts": counts or {"bytes": 10_000, "normals": 2_000},
    }


def made(rows: list, **more) -> dict:
    machine = {"cpu": "A Processor", "architecture": "x86_64", "cores": 2, "threads": 2, "isa": "avx2"}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {**machine, "backend": "cpu", "load_average": [0.5, 0.25, 0.125]},
        "versions": {"python": "3.11", "torch": "2.13.0", "diffusers": "0.42.1", "ddpm_fast": "0.1.0"},
        "git": {"commit": "c0ffee" + 34 * "0", "changed_files": []},
        "rounds": 60,
        "ceilings": CEILINGS,
        "absent": {},
        "notes": {},
        "failures": [],
        "left_out": [],
        "rows": rows,
        **more,
    }


FIXED = {"network": "cifar10", "dtype": "fp32", "image_size": 32, "steps": 1, "threads": 0}
GROWTH = {
    "task": "training",
    "axis": "batch",
    "fixed": FIXED,
    "points": [{"x": x, "seconds": 0.1 * x, "peak_bytes": (x - 1) * 2**20} for x in (1, 2, 4)],
    "noise_bytes": 2**20,
}
NOISE = {
    "task": "step",
    "axis": "stored",
    "fixed": {**FIXED, "batch": 8},
    "points": [{"x": 1, "seconds": 1.0, "peak_bytes": 3 * 2**20}, {"x": 0, "seconds": 1.0, "peak_bytes": 2**21}],
    "noise_bytes": 2**20,
}


@pytest.fixture
def read(tmp_path):
    def reading(holds, name: str = "result"):
        path = tmp_path / f"{name}.json"
        path.write_text(holds if isinstance(holds, str) else json.dumps(holds))
        return read_result(path)

    return reading


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


# --- reading


def test_the_committed_results_are_read():
    for path in COMMITTED.glob("*.json"):
        result = read_result(path)
        assert not result.quick and not result.found["failures"], path
    result = read_result(COMMITTED / "epyc-avx512-2-cores-ops.json")
    first = next(each for each in result.rows if each.subject.text == "q_sample float32 128x3x32x32")
    assert (first.subject.name, first.subject.place, first.setting) == ("q_sample float32", "128x3x32x32", "calls")
    assert first.floors(result.ceilings).keys() == {"bytes", "normals"}
    assert "q_sample bfloat16 128x3x32x32" in result.absent["diffusers"]


@pytest.mark.parametrize(
    ("header", "quick"),
    [({"rounds": 3}, True), ({"rounds": 5}, False), ({"quick": True}, True), ({"rounds": None}, False)],
)
def test_quick_files_are_known(read, header, quick):
    assert read(made([row()], **header)).quick is quick


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        pytest.param("{", "cannot read", id="no JSON"),
        pytest.param([1], "holds a list; expected the JSON that", id="a list"),
        pytest.param({"results": []}, "is no result: date, machine", id="another file"),
        pytest.param(made([]), "has no results: nothing was timed; measure again", id="empty"),
        pytest.param(made([row(), {**row(), "low": None}]), r"rows\[1\] is no row", id="no interval"),
        pytest.param(made([{**row(), "low": -1.0}]), r"rows\[0\] is no row .*above 0", id="below 0"),
        pytest.param(made([{**row(), "subject": {}}]), r"rows\[0\] is no row", id="of what"),
        pytest.param(made([7]), r"rows\[0\] is no row", id="a number"),
    ],
)
def test_what_is_no_result_says_why(read, holds, message):
    with pytest.raises(InputError, match=message):
        read(holds)


def test_the_exponent_of_points():
    x = (1, 2, 4, 8)
    assert exponent(x, tuple(3 * n**1.5 for n in x)) == pytest.approx(1.5)
    assert exponent(x, (7.0,) * 4) == pytest.approx(0, abs=1e-12)
    assert exponent((1,), (1.0,)) is None


# --- drawings


def bars(axes) -> list:
    """(where it starts, where it ends, colour) of each bar, from the top."""
    boxes = sorted(axes.patches, key=lambda bar: bar.get_y())
    return [(bar.get_x(), bar.get_x() + bar.get_width(), to_hex(bar.get_facecolor()).upper()) for bar in boxes]


def test_bars_of_speed_up(read):
    lines = [row(), row(baseline="diffusers", speedup=0.5), row(place="1x3x8x8", speedup=9.0)]
    lines.append(row("reverse_step", baseline="diffusers", speedup=3.0))
    figure = drawings.draw_speedups(read(made(lines)).rows, "A title")
    small, large = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["2x3x4x4", "1x3x8x8"]
    blue, orange = drawings.PEERS["diffusers"], drawings.PEERS["torch"]
    assert bars(small) == [(1, 0.5, blue), (1, 4.0, orange), (1, 3.0, blue)], "not from the line at 1 to the ratio"
    assert bars(large) == [(1, 9.0, orange)]
    assert [label.get_text() for label in small.get_yticklabels()] == ["q_sample float32", "reverse_step float32"]
    low, high = small.get_xlim()
    assert low < 0.5 * 0.95 and high > 9.0 * 1.05, "an interval is cut off"
    assert [text.get_text() for text in large.texts] == ["9x"]
    segments = sorted(bar.get_segments()[0][:, 0].tolist() for bar in small.collections)
    np.testing.assert_allclose(segments, [[0.475, 0.525], [2.85, 3.15], [3.8, 4.2]])


def test_tall_figures_are_split():
    result = read_result(COMMITTED / "epyc-avx512-2-cores-ops.json")
    found = [each for each in result.rows if each.subject.what != "copy"]
    figures = drawings.portions(found)
    assert len(figures) == 2 and sum(map(len, figures)) == len(found)
    for some in figures:
        assert drawings.draw_speedups(some, "A title").get_figheight() < 9


def test_the_roof_is_what_the_machine_does(read):
    """3e10 operations on 3e8 bytes: 0.3 s of ours are 1e11 a second at 100 a byte."""
    work = {"flops": 3e10, "bytes": 3e8}
    lines = [row("sampling", "cifar10", "diffusers", 1.5, "fp32", 0.3, **work)]
    lines += [row("sampling", "cifar10", "torch", 1.2, "fp32", 0.3, **work)]
    lines += [row("sampling", "cifar10", "diffusers", 1.5, "bf16", 0.3, **work)]
    result = read(made(lines))
    fp32, bf16 = drawings.draw_roofline(result.rows, CEILINGS, "flops", "A title").axes
    for axes, peak in ((fp32, 2e11), (bf16, 8e11)):
        roof = axes.lines[0].get_xydata()
        np.testing.assert_allclose(roof[1], [peak / 1e8, peak])
        assert roof[0][1] / roof[0][0] == pytest.approx(1e8) and roof[2][1] == peak
    points = {line.get_label(): tuple(line.get_xydata()[0]) for line in fp32.lines[1:]}
    case = "sampling fp32 cifar10 [calls], ddpm_fast compared with"
    assert points[f"{case} torch"] == pytest.approx((100, 1e11)), "the fastest peer stands for all"
    assert points[f"{case} torch: peer"] == pytest.approx((100, 1e11 / 1.2))
    assert f"{case} diffusers" not in points


def test_growth(read):
    curves = read(made([], growth=[GROWTH, {**GROWTH, "task": "sampling"}, NOISE])).curves("seconds")
    (axes,) = drawings.draw_growth(curves, "time (s)", "A title").axes
    assert axes.get_xlabel() == "batch" and axes.get_ylabel() == "time (s)"
    assert axes.lines[0].get_label() == "training cifar10 fp32, 32 pixels:\nexponent 1.00"
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.1, 0.2, 0.4])
    memory = read(made([], growth=[GROWTH])).curves("peak_bytes")
    assert memory[0].x == (2, 4), "a point at 0, which no logarithmic axis shows"


# --- the page


def test_a_page_with_its_pictures(read, tmp_path):
    absent = {"diffusers: it is not installed": ["q_sample float32 2x3x4x4"]}
    notes = {"torch: another network": ["q_sample float32 2x3x4x4"]}
    fine = read(made([row(), row("copy", baseline="clone", bytes=1e4), row(speedup=0.8, baseline="composed")]), "fine")
    failed = made([row()], quick=True, absent=absent, notes=notes, failures=["x is wrong"], left_out=["y"])
    written = page.draw([fine, read(failed, "failed")], tmp_path / "page.md", "a command")
    text = (tmp_path / "page.md").read_text()
    for part in (
        "Drawn by `a command`",
        "| q_sample float32 | 1 ms | 0.01 | 800 us | normals | 80% | 4 ms, **4.00x** (3.80..4.20) |",
        "- compared with torch: 4.00x to 4.00x; 4.00x is the median of 1 rows",
        "- **not faster**: q_sample float32 2x3x4x4 [calls], ddpm_fast compared with composed: 0.80x (0.76..0.84)",
        "**Not for timing.**",
        "- diffusers: it is not installed (q_sample float32 2x3x4x4)",
        "- torch: another network (q_sample float32 2x3x4x4)",
        "failed:\n\n- x is wrong",
        "Left out when the time was over: y.",
        "All results matched.",
    ):
        assert part in text, part
    assert len(written) == 1 + 2 * 2
    for path in written[1:]:
        assert f"](images/{path.name})" in text and Image.open(path).size[0] > 1000
    with pytest.raises(InputError, match="expected different names"):
        page.draw([fine, fine], tmp_path / "page.md", "a command")


def test_a_page_of_growth_and_fidelity(read, tmp_path):
    line = {"mode": "bf16", "seconds": 60.0, "mean_levels": 0.5, "differing_share": 0.125, "p_value": 0.25}
    line["worst_image_mean_levels"] = 1.5
    fidelity = {"fidelity": [line], "n": 500, "steps": 50, "control": {"steps": 10, "p_value": 0.006}}
    page.draw([read(made([], growth=[GROWTH, NOISE], **fidelity))], tmp_path / "page.md", "a command")
    text = (tmp_path / "page.md").read_text()
    assert "| training cifar10 fp32, 32 pixels | batch | 1, 2, 4 | 0.1, 0.2, 0.4 | 1.00 |" in text
    assert "| step cifar10 fp32, batch 8, 32 pixels | 3 | 2 | 1 |" in text
    assert "| bf16 | 60 s | 0.5 | 12.50% | 1.5 | 0.25 |" in text and "| control: 10 steps |" in text


def test_the_committed_page_is_what_the_commands_draw(tmp_path):
    results = [COMMITTED / f"epyc-avx512-2-cores-{name}.json" for name in ("growth", "fidelity")]
    assert run("draw", *results, "--out", tmp_path / "benchmarks.md").exit_code == 0
    committed = (COMMITTED.parents[1] / "docs" / "benchmarks.md").read_text()
    section = (tmp_path / "benchmarks.md").read_text().split("## epyc-avx512-2-cores-growth")[1]
    table = [line for line in section.splitlines() if line.startswith("| sampling cifar10")]
    assert table and all(line in committed for line in table), "draw docs/benchmarks.md again"


# --- comparing


def test_what_changed_beyond_noise(read):
    before = [row(), row("a", speedup=2.0), row("b", speedup=2.0), row("gone")]
    after = [row(speedup=4.1), row("a", speedup=1.0), row("b", speedup=3.0), row("new")]
    grown = copy.deepcopy(GROWTH)
    grown["points"][2]["peak_bytes"] *= 2
    found = compare.compare(read(made(before, growth=[GROWTH]), "before"), read(made(after, growth=[grown]), "after"))
    memory = "peak memory of training cifar10 fp32, 32 pixels, batch 4"
    assert [name.split(" [")[0] for name in found.slower] == ["a float32 2x3x4x4", memory]
    assert found.slower[memory] == "+100%; before 3 MiB; now 6 MiB"
    ((name, text),) = found.faster.items()
    assert name.startswith("b float32 2x3x4x4") and text.startswith("-33%; before 2.00x (1.90..2.10), ours 1 ms")
    assert found.same == 3 and len(found.only_old) == len(found.only_new) == 1


def test_another_machine_is_warned_of(read):
    other = made([row()])
    other["machine"]["threads"], other["versions"]["torch"] = 4, "2.14.0"
    found = compare.compare(read(made([row()]), "before"), read(other, "after"))
    assert found.warnings == [
        "the threads differs: 2, then 4",
        "the version of torch differs: 2.13.0, then 2.14.0",
    ]


def test_what_cannot_be_compared(read):
    with pytest.raises(InputError, match="have nothing in common: 1 rows in the first"):
        compare.compare(read(made([row()]), "one"), read(made([row("other")]), "other"))
    with pytest.raises(InputError, match="which time nothing; expected at least 5"):
        compare.compare(read(made([row()], rounds=2), "one"), read(made([row()]), "other"))


def test_the_command_compares(tmp_path):
    for name, speedup in (("old", 2.0), ("new", 1.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(made([row(speedup=speedup)])))
    slower = run("compare", tmp_path / "old.json", tmp_path / "new.json")
    assert slower.exit_code == 1 and "Slower: q_sample float32 2x3x4x4" in slower.output
    assert "1 slower, 0 faster beyond noise" in slower.output
    assert run("compare", tmp_path / "new.json", tmp_path / "old.json").exit_code == 0
    assert run("compare", tmp_path / "none.json", tmp_path / "old.json").exit_code == 2
