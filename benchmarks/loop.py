"""The layers above the ops, end to end: `python -m benchmarks.loop --out FILE.json`.

The U-Net forward, and forward and backward; a training step, data in to weights out; sampling, by the batch and one
image at a time. Each beside what one would use otherwise, with the same weights wherever both can hold them: see
unet.py, training.py and sampling.py.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Annotated

import torch
import typer
from ddpm_fast.comparison import COMPILED, Case, Comparison
from rich.markup import escape

from ddpm_fast import machine, networks, peers, report, unet
from ddpm_fast.commands.common import DTYPE_NAMES, choose_device, console, plain_errors
from ddpm_fast.errors import InputError
from ddpm_fast.loops import sampling, training

QUICK_ROUNDS = 2
QUICK_SIZES = (networks.DIGITS, "quick")
ALL_SIZES = (networks.DIGITS, "cifar10", "64x64", "256x256")
# Batches of the U-Net by itself and in training, batches in sampling and steps of a chain. On the CPU such that a call
# takes at most seconds on two cores: training at CIFAR-10's size at 16, which every peer takes, and at 256x256 a pass
# forward alone.
BATCHES = {
    "cpu": {
        networks.DIGITS: (64, 64, (1, 16), 20),
        "cifar10": (8, 16, (1, 8), 4),
        "64x64": (1, 2, (1,), 2),
        "256x256": (1, None, (), 0),
    },
    "cuda": {
        networks.DIGITS: (512, 512, (1, 512), 50),
        "cifar10": (128, 128, (1, 64, 512), 50),
        "64x64": (64, 64, (1, 64), 50),
        "256x256": (8, 8, (1, 8), 20),
    },
}
QUICK_BATCHES = (2, 16, (1, 2), 3)
TRAINING_STEPS = {"cpu": 1, "cuda": 10}  # in a round

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def cases(quick: bool, device: torch.device, sizes: tuple[str, ...] = ()) -> list[Case]:
    """Every case of the sizes (all of them for none), in the order in which they are measured."""
    known = QUICK_SIZES if quick else ALL_SIZES
    if unknown := [size for size in sizes if size not in known]:
        raise InputError(f"size {unknown[0]!r} is unknown; there are {', '.join(known)}")
    made = []
    for size in sizes or known:
        calls, batch, samples, steps = QUICK_BATCHES if quick else BATCHES[device.type][size]
        for dtype in DTYPE_NAMES.values():
            made.append(Case("unet forward", size, dtype, calls))
            if batch:
                made.append(Case("unet forward+backward", size, dtype, calls))
                made.append(Case("training", size, dtype, batch, TRAINING_STEPS[device.type]))
            made += [Case("sampling", size, dtype, n, steps) for n in samples]
    return made


def matching(only: str, quick: bool, device: torch.device, sizes: tuple[str, ...] = ()) -> list[Case]:
    """The cases whose name holds `only`. Raises InputError if none does."""
    every = cases(quick, device, sizes)
    chosen = [case for case in every if only in str(case)]
    if not chosen:
        names = "\n  ".join(map(str, every))
        raise InputError(f"no case's name holds {only!r}; there are\n  {names}")
    return chosen


def labels(case: Case, device: torch.device) -> tuple[str, ...]:
    """The variants of a case, ours first; what of them there is here build() says."""
    if case.layer.startswith("unet"):
        return ("ddpm_fast", peers.DIFFUSERS, unet.CHANNELS_LAST, COMPILED)
    ours = (*sampling.WAYS[device.type], "torch", peers.DIFFUSERS, COMPILED, peers.LUCIDRAINS)
    return (*ours, sampling.PIPELINE) if case.layer == "sampling" else ours


@functools.lru_cache(maxsize=1)  # one case's networks at a time: variants of a case follow each other
def build(case: Case, device: torch.device, compiling: bool) -> Comparison:
    """The variants of a case, compared."""
    module = {"training": training, "sampling": sampling}.get(case.layer, unet)
    return module.build(case, device, compiling)


COLUMNS = (
    *("case", "ours", "a step", "images/s", "MFU", "floor", "floor is", "error"),
    *("baseline", "a step", "images/s", "error", "speed-up", "95% interval"),
)


def cells(line: dict) -> list[str]:
    """A result as text, under COLUMNS."""
    ours, baseline = line[line["measured"]], line["baseline"]

    def error(label: str) -> str:
        return f"{line['errors'][label]:.0e}" if label in line["errors"] else "-"

    made = [
        *(f"{line['what']} {line['network']} {line['dtype']} batch {line['batch']}", line["measured"]),
        *(report.duration(ours["median_s"]), f"{ours['images_per_s']:.4g}", f"{ours['mfu']:.0%}"),
        *(report.duration(line["floor_s"]), line["floor_is"], error(line["measured"])),
    ]
    if baseline is None:
        return made + ["-"] * (len(COLUMNS) - len(made))
    low, high = line["speedup_95"]
    return [
        *(*made, baseline, report.duration(line[baseline]["median_s"]), f"{line[baseline]['images_per_s']:.4g}"),
        *(error(baseline), f"{line['speedup']:.2f}", f"{low:.2f}..{high:.2f}"),
    ]


def markdown(made: dict) -> str:
    """The results as a page."""
    rates = made["ceilings"]
    text = f"# Networks and loops\n\n{report.title(made)}; {made['rounds']} rounds, medians. {made['date']}.\n"
    text += "images/s in sampling: of chains of as many steps as the JSON says.\n\nMeasured ceilings: "
    text += ", ".join(f"{name} matrices {1e-12 * rate:.3g} Tflop/s" for name, rate in rates["flops_per_s"].items())
    text += f", a large copy {1e-9 * rates['copy_bytes_per_s']:.3g} GB/s"
    text += f", {1e-6 * rates['normals_per_s_per_thread']:.3g} M normals/s a thread.\n\n"
    text += report.markdown_table(COLUMNS, map(cells, made["results"]))
    notes = dict.fromkeys(note for line in made["results"] for note in line["notes"])
    absent = [f"Absent from {len(names)} cases: {reason}" for reason, names in made["absent"].items()]
    return text + "".join(f"\n{line}\n" for line in [*notes, *absent, *made["failures"]])


@app.command()
def main(
    out: report.Out,
    page: report.Page = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny networks, few steps: does it run and match?")] = False,
    compiling: Annotated[
        bool, typer.Option("--compile", help="Beside diffusers' networks under torch.compile too; minutes.")
    ] = False,
    device: report.Device = "auto",
    only: Annotated[str, typer.Option(help="Only cases whose name holds this, such as 'sampling cifar10 bf16'.")] = "",
    size: Annotated[list[str], typer.Option(help=f"Only {', '.join(ALL_SIZES)} (may be repeated).")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Rounds per comparison.")] = 5,
    minutes: report.Minutes = None,
) -> None:
    """Time networks, training and sampling beside what one would use otherwise; write the results to a file."""
    with plain_errors():
        started, place = time.monotonic(), choose_device(device)
        report.check(out, page)
        if rounds < 1:
            raise InputError(f"rounds is {rounds}; expected at least 1")
        chosen = matching(only, quick, place, tuple(size))
        rounds = QUICK_ROUNDS if quick else rounds
        where, ceilings = machine.environment(place), machine.ceilings(place)
        used = dict.fromkeys(case.size for case in chosen)
        absent: dict[str, list[str]] = {}
        results, failures = [], []

        def write() -> None:
            made = {
                **where,
                "device": str(place),
                "rounds": rounds,
                "ceilings": ceilings.to_dict(torch.get_num_threads()),
                "networks": {name: networks.network(name).model.config.to_dict() for name in used},
                "tf32": {
                    "convolutions": torch.backends.cudnn.allow_tf32,
                    "matrix_products": torch.backends.cuda.matmul.allow_tf32,
                },
                "absent": absent,
                "failures": failures,
                "results": results,
            }
            report.write(made, markdown(made), out, page)

        for case in chosen:
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                failures.append(f"{case}: the {minutes:g} minutes were over")
                continue
            console.print(str(case))
            try:
                comparison = build(case, place, compiling)
                for label, reason in comparison.absent.items():
                    absent.setdefault(f"{label}: {reason}", []).append(str(case))
                failures += comparison.failures.values()
                results += comparison.results(rounds, place, ceilings)
            except (InputError, torch.OutOfMemoryError) as error:
                failures.append(f"{case}: {str(error).splitlines()[0]}")
            comparison = None  # its networks go before the next case's come
            build.cache_clear()
            if place.type == "cuda":
                with contextlib.suppress(RuntimeError):  # of a GPU that is beyond help: the next case says so
                    torch.cuda.empty_cache()
            write()  # after each case, of minutes: what stops the run leaves what there is
        write()
        for line in results:
            what, ours, step, rate, mfu, _, _, error, baseline, other, _, _, speedup, interval = cells(line)
            beside = f"; {baseline} {other}: {speedup}x ({interval})" if line["baseline"] else ", beside nothing"
            console.print(
                escape(f"{what} [{ours}] {step} a step, {rate} images/s, MFU {mfu}, error {error}{beside}"),
                soft_wrap=True,
            )
        for reason, names in absent.items():
            console.print(
                f"[yellow]Absent[/] from {len(names)} of {len(chosen)} cases: {escape(reason)}", soft_wrap=True
            )
        for message in failures:
            console.print("[red]Failed:[/]", escape(message), soft_wrap=True)
        if failures:
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
