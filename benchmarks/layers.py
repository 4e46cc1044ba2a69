"""The layers above the ops, end to end: `python -m benchmarks network` has the U-Net, `python -m benchmarks loops` has
training steps and sampling, by the batch and one image at a time."""

import torch

from benchmarks import machine, networks, peers, sampling, training, unet
from benchmarks.comparison import WAYS, Case, Comparison, compiled_labels
from benchmarks.runs import Options, Run
from ddpm_fast.errors import InputError

ROUNDS, QUICK_ROUNDS = 5, 2
NETWORK = ("unet forward", "unet forward+backward")
LOOPS = ("sampling", "training")
QUICK_SIZES = (networks.DIGITS, "quick")
ALL_SIZES = ("cifar10", networks.DIGITS, "64x64", "256x256")
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
        "cifar10": (256, 128, (256, 1), 25),
        "64x64": (64, 64, (1, 64), 50),
        "256x256": (8, 8, (1, 8), 20),
    },
}
QUICK_BATCHES = (2, 16, (1, 2), 3)
TRAINING_STEPS = {"cpu": 1, "cuda": 10}  # in a round


def cases(
    quick: bool, device: torch.device, layers: tuple[str, ...] = NETWORK + LOOPS, sizes: tuple[str, ...] = ()
) -> list[Case]:
    """Every case of the layers at the sizes (all of them for none), in the order in which they are measured: what a run
    that is stopped should have comes first, CIFAR-10's size and bf16. Raises InputError for a size that there is
    not."""
    known = QUICK_SIZES if quick else ALL_SIZES
    if unknown := [size for size in sizes if size not in known]:
        raise InputError(f"size {unknown[0]!r} is unknown; there are {', '.join(known)}")
    made = []
    for size in sizes or known:
        calls, batch, samples, steps = QUICK_BATCHES if quick else BATCHES[device.type][size]
        for dtype in ("bf16", "fp32"):
            made += [Case("sampling", size, dtype, n, steps) for n in samples]
            made.append(Case("unet forward", size, dtype, calls))
            if batch:
                made.append(Case("training", size, dtype, batch, TRAINING_STEPS[device.type]))
                made.append(Case("unet forward+backward", size, dtype, calls))
    return [case for case in made if case.layer in layers]


def labels(case: Case, device: torch.device) -> tuple[str, ...]:
    """The variants of a case, ours first. Not all of them can be had everywhere."""
    if case.layer in NETWORK:
        return ("ddpm_fast", peers.DIFFUSERS, unet.CHANNELS_LAST, *compiled_labels(device))
    made = (*WAYS[device.type], "torch", peers.DIFFUSERS, *compiled_labels(device), peers.LUCIDRAINS)
    return (*made, sampling.PIPELINE, sampling.FOLDER) if case.layer == "sampling" else made


def compared(case: Case, run: Run) -> Comparison:
    """The variants of a case, compared with each other."""
    made = Comparison(case, run)
    module = {"training": training, "sampling": sampling}.get(case.layer, unet)
    module.add_variants(made)
    return made


def main(options: Options, layers: tuple[str, ...], sizes: tuple[str, ...] = ()) -> None:
    """Times networks or loops and all their peers, and writes the results to a file."""
    options = options.checked(ROUNDS, QUICK_ROUNDS)
    chosen = options.matching(cases(options.quick, options.place, layers, sizes))
    used = {name: networks.network(name).model.config.to_dict() for name in dict.fromkeys(case.size for case in chosen)}
    tf32 = {"convolutions": torch.backends.cudnn.allow_tf32}
    tf32["matrix_products"] = torch.backends.cuda.matmul.allow_tf32
    run = Run(options, machine.ceilings(options.place, matrices=not options.quick), networks=used, tf32=tf32)
    run.each(chosen, lambda case: run.add(compared(case, run).rows()))
    run.finish()
