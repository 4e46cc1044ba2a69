"""Compiles diffusers' networks before anything is timed: `python -m benchmarks warm`.

Each case is compiled in a process of its own, all at once, by doing what `loops` does before it times it.
What inductor and Triton make is kept in their caches on disk (TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR), from which a
later run takes it: of a network that took a minute it then takes seconds.
"""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from benchmarks import layers
from benchmarks.comparison import Case
from benchmarks.runs import Options, Run, say


def compile_case(case: Case, options: Options) -> tuple[float, list[str]]:
    """Makes the case's variants, and calls those that are compiled once for what is compiled at the first backward.
    Returns the seconds that took, and what failed or is absent."""
    started, run = time.monotonic(), Run(options, {})
    with run.surviving(str(case)):
        made = layers.compared(case, run)
        for label in [label for label in made.runs if "compile" in label]:
            made.runs[label]()
    return time.monotonic() - started, [*run.found["failures"], *run.found["absent"]]


def main(options: Options, sizes: Sequence[str]) -> None:
    """Compiles the cases in bf16, of CIFAR-10's network if no sizes are named."""
    chosen = sizes or (layers.QUICK_SIZES[1:] if options.quick else ("cifar10",))
    cases = layers.cases(options.quick, options.place, layers.LOOPS, tuple(chosen))
    cases = options.matching([case for case in cases if case.dtype == "bf16"])
    with ProcessPoolExecutor(len(cases), multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(compile_case, case, options): case for case in cases}
        for done in as_completed(waiting):
            seconds, problems = done.result()
            say(f"{waiting[done]}: {seconds:.0f} s{''.join(f'; {problem}' for problem in problems)}")
