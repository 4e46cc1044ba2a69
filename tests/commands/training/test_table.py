"""log.csv of a run: one row for each point of the curves, cut where a run is taken up again."""

import csv
import math

import pytest
from support.train_command import command, start

from ddpm_fast.commands.training.table import COLUMNS, Table
from ddpm_fast.loops.metrics import Look


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def look(step, loss=0.5, **more):
    return Look(step, 1, loss, 1.25, **more)


def filled(folder, steps, start=0):
    table = Table(folder, start)
    for step in steps:
        table.look(look(step, step / 7), 12.5, 0.25)
    return table


def steps_of(folder):
    return [int(row["step"]) for row in rows(folder)]


def test_a_row_has_what_was_measured(tmp_path):
    Table(tmp_path, 0).look(look(50, 1 / 3, skipped=2, quarters=(0.1, math.nan, 0.3, 0.4)), 12.5, 0.25)
    (row,) = rows(tmp_path)
    assert tuple(row) == COLUMNS and math.isclose(float(row["loss"]), 1 / 3, rel_tol=1e-8)
    expected = {"step": "50", "loss_q0": "0.1", "loss_q1": "", "loss_q3": "0.4", "gradient_norm": "1.25"}
    expected |= {"skipped_steps": "2", "images_per_second": "12.5", "waiting_share": "0.25"}
    assert expected.items() <= row.items() and row["time"].endswith("Z")


def test_the_rows_after_the_step_that_is_resumed_are_cut(tmp_path):
    filled(tmp_path, [10, 20, 30])
    before = rows(tmp_path)
    filled(tmp_path, [30, 40], start=20)
    assert steps_of(tmp_path) == [10, 20, 30, 40] and rows(tmp_path)[:2] == before[:2]
    filled(tmp_path, [5], start=0)
    assert steps_of(tmp_path) == [5]


@pytest.mark.parametrize("cut", range(1, 50, 7))
def test_a_row_that_a_killed_process_left_incomplete_is_cut(tmp_path, cut):
    filled(tmp_path, [10, 20])
    path = tmp_path / "log.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    filled(tmp_path, [30], start=20)
    assert steps_of(tmp_path) == [10, 30]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"\xff\xfe\n1,2\n",
        b"a,b\n1,2\n",
        b"step\n" + b"9" * 5000 + b"\n",
        b"step,loss",
        b"x" * 10**5,
    ],
    ids=["empty", "zeros", "no text", "another table", "a huge step", "a header cut off", "one long line"],
)
def test_what_is_no_such_table_is_replaced(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    filled(tmp_path, [30], start=20)
    assert steps_of(tmp_path) == [30]


def test_a_table_with_other_columns_keeps_those_that_it_shares(tmp_path):
    (tmp_path / "log.csv").write_text("step,colour,loss\n10,red,0.5\n30,blue,0.25\n")
    filled(tmp_path, [30], start=20)
    first, last = rows(tmp_path)
    assert (first["step"], first["loss"], first["gradient_norm"]) == ("10", "0.5", "") and last["step"] == "30"


def test_a_table_that_is_deleted_or_cannot_be_written_goes_on(tmp_path):
    table = filled(tmp_path, [10])
    (tmp_path / "log.csv").unlink()
    table.look(look(20), 1, 0)
    assert steps_of(tmp_path) == [20]
    (tmp_path / "log.csv").unlink()
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(Exception, match=r"log\.csv"):
        table.look(look(30), 1, 0)
    (tmp_path / "log.csv").rmdir()
    table.look(look(40), 1, 0)
    assert steps_of(tmp_path) == [40]


def test_a_run_writes_a_row_for_each_look_and_goes_on_where_it_is_resumed(tmp_path, data):
    out = tmp_path / "out"
    start(data, out, "--steps=4", "--save-every=2")
    assert steps_of(out) == [1, 2, 3, 4] and all(float(row["loss"]) > 0 for row in rows(out))
    straight = [row["loss"] for row in rows(out)]
    (out / "step-00000004.safetensors").unlink()
    with open(out / "log.csv", "a") as file:
        file.write("5,0.1")  # of a process that was killed
    command("--out", out, "--resume")
    assert [row["loss"] for row in rows(out)] == straight
