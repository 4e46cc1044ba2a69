"""Training from Python, with a progress bar and saves: what `Trainer.train` does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.files import checkpoint
from ddpm_fast.files.averages import remove_averages_after
from ddpm_fast.files.lock import FolderLock
from ddpm_fast.loops.distributed import in_first_process, rank, world_size
from ddpm_fast.loops.metrics import Metrics
from ddpm_fast.loops.training_step import TrainingStep

LOOK_EVERY = 20  # training steps between two looks at the loss
# How often power-function averages are saved in a run, if nobody says how often. From those of the widths 0.05 and 0.1
# the profiles of other widths between 0.02 and 0.2 are then made to 4% (docs/measured.md); half as many give 12%.
_AVERAGES = 32


def average_every(steps: int) -> int:
    """The number of training steps between two saves of the power-function averages, of a run of so many steps."""
    return max(1, -(-steps // _AVERAGES))


def train(trainer: TrainingStep, steps: int, saves: Sequence[tuple[int, Callable[[], object]]]) -> None:
    """Train up to training step `steps`, or until the processes want to stop.

    Args:
        trainer: What is trained.
        steps: How many training steps there will have been in all.
        saves: What saves something of what has been reached, after the number of training steps between two saves.
            Each saves at the end, too, and they do so in this order.

    Raises:
        NonFiniteLoss: At the first training step that is not finite. Nothing after the last good step is saved.
    """
    check_integer("steps", steps, 0)
    metrics = Metrics(trainer.step, scaled=trainer.config.precision == "fp16")
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), disable=rank() > 0) as bar:
        task = bar.add_task("", total=steps, completed=trainer.step, loss=float("nan"))
        while trainer.step < steps and not trainer.stopping:
            metrics.add(*trainer.train_step())
            is_last = trainer.step == steps or trainer.stopping
            due = [save for every, save in saves if is_last or trainer.step % every == 0]
            waits = is_last or bool(due)
            # Before anything is saved it must be known to be good. And all processes must end after the same step.
            if waits or trainer.step % LOOK_EVERY == 0:
                for look in metrics.look(wait=waits or world_size() > 1):
                    bar.update(task, loss=look.loss)
            bar.update(task, completed=trainer.step)
            for save in due:
                save()


@contextlib.contextmanager
def kept_folder(out: Path | None, step: int) -> Iterator[None]:
    """Inside, the folder is there and locked. The first process sees to it, and all raise what is wrong.

    Args:
        out: The folder; None: there is none.
        step: The training step that what will be saved there has reached.

    Raises:
        InputError: If it has a training state that is further, which a save would remove, or averages though step is 0,
            or another process writes there, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if out is not None:
            in_first_process(lambda: _open(out, step, stack))
        yield


def _open(out: Path, step: int, stack: contextlib.ExitStack) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror or error}; choose another place") from error
    stack.enter_context(FolderLock(out))
    newest = checkpoint.latest_checkpoint(out)
    if newest is not None and newest > checkpoint.checkpoint_path(out, step):
        raise InputError(
            f"{out} has {newest.name}, and this training is at step {step}: go on from it with trainer.load(path), or "
            "choose another folder"
        )
    remove_averages_after(out, step)
