"""The one door to the benchmarks: `python -m benchmarks ops|network|loops|ledger|...`, see --help."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import convolutions as convolutions_
from benchmarks import fidelity as fidelity_
from benchmarks import growth as growth_
from benchmarks import kernels as kernels_
from benchmarks import layers, networks
from benchmarks import loading as loading_
from benchmarks import ops as ops_
from benchmarks import trace as trace_
from benchmarks import warm as warm_
from benchmarks.ledger import command as ledger_
from benchmarks.quality import compare as quality_
from benchmarks.quality import speedrun as speedrun_
from benchmarks.report.compare import MEMORY_THRESHOLD, THRESHOLD
from benchmarks.report.compare import compare as compared
from benchmarks.report.page import draw as drawn
from benchmarks.report.results import read_result
from benchmarks.runs import Options, say
from ddpm_fast.commands.common import plain_errors

Out = Annotated[Path, typer.Option(help="The file for the results, as JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Only = Annotated[str, typer.Option(help="Only the cases whose name contains this, such as 'q_sample uint8'.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds: does all of it run and match?")]
Rounds = Annotated[int, typer.Option(help="Rounds for each comparison; 0 is the usual number.")]
Minutes = Annotated[float | None, typer.Option(help="Start no new case after this time; say what is left out.")]
Backends = Annotated[list[str], typer.Option("--backend", help="Measure this backend of ours alone (repeatable).")]
Compile = Annotated[bool, typer.Option("--compile", help="Also time diffusers' networks under torch.compile.")]
Autotune = Annotated[bool, typer.Option("--max-autotune", help="And by mode='max-autotune', which takes minutes.")]
Sizes = Annotated[list[str], typer.Option("--size", help=f"Only {', '.join(layers.ALL_SIZES)} (repeatable).")]
Kernels = Annotated[Path | None, typer.Option("--kernels", help="The log of ncu of `kernels`: see gpu.sh.")]
Images = Annotated[int, typer.Option(help="The number of images in a set.")]
Steps = Annotated[int, typer.Option(help="The number of steps of the chain.")]
Size = Annotated[str, typer.Option("--size", help=f"The network: {', '.join(networks.SIZES)}.")]
Ledger = Annotated[Path | None, typer.Option("--out", help="A file for the counts, as JSON.")]
Text = Annotated[Path, typer.Option("--out", help="The file for the profiler's tables, as text.")]
Picture = Annotated[Path | None, typer.Option("--figure", help="A picture of them, .png or .svg.")]
Results = Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Files that the benchmarks wrote.")]
Old = Annotated[Path, typer.Argument(metavar="OLD.json", help="The earlier result.")]
New = Annotated[Path, typer.Argument(metavar="NEW.json", help="The later result.")]
Page = Annotated[Path, typer.Option("--out", help="The page; its pictures go to images/ in the same folder.")]

HELP = "Measure ddpm_fast and what one would use instead, alternately and on the same tensors."
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=HELP)
report = typer.Typer(no_args_is_help=True, help="Draw result files as a page, or compare two of them.")
app.add_typer(report, name="report")


@app.command()
def ops(
    out: Out,
    device: Device = "cpu",
    only: Only = "",
    quick: Quick = False,
    rounds: Rounds = 0,
    minutes: Minutes = None,
    backend: Backends = [],  # noqa: B006
    kernels: Kernels = None,
) -> None:
    """Time each fused op, compared with diffusers, denoising-diffusion-pytorch, plain torch and torch.compile."""
    with plain_errors():
        options = Options(out, device, only, quick, rounds, minutes, backends=tuple(backend))
        ops_.main(options, kernels_.read(kernels, options) if kernels else {})


def _layers(kind: tuple[str, ...], name: str, text: str) -> None:
    def command(
        out: Out,
        device: Device = "auto",
        only: Only = "",
        quick: Quick = False,
        rounds: Rounds = 0,
        minutes: Minutes = None,
        compiling: Compile = False,
        autotuning: Autotune = False,
        size: Sizes = [],  # noqa: B006
    ) -> None:
        with plain_errors():
            options = Options(out, device, only, quick, rounds, minutes, compiling, autotuning=autotuning)
            layers.main(options, kind, tuple(size))

    app.command(name, help=text)(command)


_layers(layers.NETWORK, "network", "Time the U-Net, compared with diffusers' network with the same weights.")
_layers(layers.LOOPS, "loops", "Time training steps and sampling, compared with the loops of other libraries.")


@app.command()
def growth(out: Out, device: Device = "auto", only: Only = "", quick: Quick = False, minutes: Minutes = None) -> None:
    """Measure how time and peak memory grow with batch size, image size, number of steps and number of threads."""
    with plain_errors():
        growth_.main(Options(out, device, only, quick, minutes=minutes))


@app.command()
def loading(out: Out, only: Only = "", quick: Quick = False, minutes: Minutes = None) -> None:
    """Measure how reading images on demand grows with their number: time to open, memory, images a second, waiting."""
    with plain_errors():
        loading_.main(Options(out, "cpu", only, quick, minutes=minutes))


@app.command()
def fidelity(out: Out, device: Device = "auto", n: Images = 500, steps: Steps = 50) -> None:
    """Compare the samples of the faster modes with those of plain torch in fp32."""
    with plain_errors():
        fidelity_.main(Options(out, device), n, steps)


@app.command()
def kernels(device: Device = "cuda", only: Only = "", quick: Quick = False, backend: Backends = []) -> None:  # noqa: B006
    """Call each op of ours once on a GPU, for ncu to count the instructions: gpu.sh has the command."""
    with plain_errors():
        kernels_.main(Options(Path(), device, only, quick, backends=tuple(backend)))


@app.command()
def warm(
    device: Device = "auto",
    only: Only = "",
    quick: Quick = False,
    autotuning: Autotune = False,
    size: Sizes = [],  # noqa: B006
) -> None:
    """Compile the networks of `loops`, all at once, into the caches on disk."""
    with plain_errors():
        warm_.main(Options(Path(), device, only, quick, compiling=True, autotuning=autotuning), size)


@app.command()
def convolutions(
    out: Out,
    device: Device = "auto",
    only: Only = "",
    quick: Quick = False,
    rounds: Rounds = 0,
    minutes: Minutes = None,
) -> None:
    """Time the library's convolutions by the shapes of CIFAR-10's network, forward and backward."""
    with plain_errors():
        convolutions_.main(Options(out, device, only, quick, rounds, minutes))


@app.command()
def trace(out: Text, device: Device = "auto", only: Only = "", quick: Quick = False) -> None:
    """Profile a forward and a training step, ours and diffusers'."""
    with plain_errors():
        trace_.main(Options(out, device, only, quick))


@app.command()
def ledger(size: Size = "cifar10", only: Only = "", out: Ledger = None, figure: Picture = None) -> None:
    """Count the kernels and bytes of a forward, a training step and a sampling step on a GPU, without one."""
    with plain_errors():
        ledger_.main(size, only, out, figure)


Work = Annotated[Path, typer.Option(help="A folder for the trainings, which are gone on with if they are there.")]
Features = Annotated[str | None, typer.Option(help="What images are compared in; efficientnet-lite0 if not given.")]
Data = Annotated[Path | None, typer.Option(help="The images; digits are there if none is given.")]
Parts = Annotated[list[str], typer.Option("--part", help=f"Put back {', '.join(speedrun_.PARTS)} alone (repeatable).")]
AllParts = Annotated[bool, typer.Option("--parts", help="Put back each part alone.")]
OursOnly = Annotated[bool, typer.Option("--ours-only", help="Train ours alone, to the fixed goals or for --parts.")]
Codes = Annotated[list[str], typer.Option("--code", help="Only this recipe (repeatable).")]
OwnSamplers = Annotated[bool, typer.Option("--own-samplers", help="Also draw as each code does: up to 1000 steps.")]


@app.command()
def quality(
    out: Out,
    work: Work,
    images: Annotated[int, typer.Option(help="Images that each training sees.")] = 30_000,
    seeds: Annotated[int, typer.Option(help="Trainings of each code.")] = 3,
    n: Annotated[int, typer.Option(help="Images that are drawn from each.")] = 2000,
    own_samplers: OwnSamplers = False,
    code: Codes = [],  # noqa: B006
    variants: Annotated[bool, typer.Option("--variants", help="Also ours with one thing otherwise.")] = False,
    features: Features = None,
    device: Device = "auto",
    quick: Quick = False,
) -> None:
    """Train one network by three codes as each does by itself, and compare what its samples are worth."""
    with plain_errors():
        settings = quality_.Settings(
            out, work, images, seeds, n, own_samplers, tuple(code), variants, features, device, quick
        )
        quality_.main(settings)


@app.command()
def speedrun(
    subject: Annotated[str, typer.Argument(help="digits, or cifar10, for which --data is needed.")],
    out: Out,
    work: Work,
    data: Data = None,
    features: Features = None,
    part: Parts = [],  # noqa: B006
    parts: AllParts = False,
    images: Annotated[int | None, typer.Option(help="Images that ours sees; enough for the goal if not given.")] = None,
    ours_only: OursOnly = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the trainings.")] = 0,
    quick: Quick = False,
) -> None:
    """Measure the time from nothing to a given quality, ours beside the loop of diffusers' example."""
    with plain_errors():
        chosen = speedrun_.PARTS if parts else tuple(part)
        settings = speedrun_.Settings(
            subject, out, work, data, features, images, device, seed, chosen, ours_only, quick
        )
        speedrun_.main(settings)


@report.command()
def draw(results: Results, out: Page = Path("docs/benchmarks.md")) -> None:
    """Draw a page of tables and pictures from result files."""
    with plain_errors():
        command = shlex.join(["python", "-m", "benchmarks", "report", "draw", *map(str, results), "--out", str(out)])
        for path in drawn([read_result(path) for path in results], out, command):
            say(f"Wrote {path}")


@report.command()
def compare(old: Old, new: New) -> None:
    """Name what became slower or faster beyond noise; exit with status 1 if anything became slower."""
    with plain_errors():
        before, after = read_result(old), read_result(new)
        found = compared(before, after)
        for result in (before, after):
            git, date = result.found["git"], result.found["date"]
            say(f"{result.path}: commit {git.get('commit')}, with {len(git.get('changed_files', []))} changes, {date}")
        for warning in found.warnings:
            say(f"Warning: {warning}")
        for what, changes in (("Slower", found.slower), ("Faster", found.faster)):
            for name, text in changes.items():
                say(f"{what}: {name}: {text}")
        rule = f"the 95% intervals do not overlap, and more than {THRESHOLD:.0%}; memory: {MEMORY_THRESHOLD:.0%}"
        say(f"{len(found.slower)} slower, {len(found.faster)} faster beyond noise ({rule}); {found.same} as before")
        for names, result in ((found.only_old, before), (found.only_new, after)):
            for name in names:
                say(f"Only in {result.path.name}: {name}")
        for message in after.found["failures"]:
            say(f"Failed: {message}")
        if found.slower:
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
