"""Training a model, with checkpoints from which a run resumes bit for bit.

Everything random in training step k is a function of (seed, k), see training_step.py. There is no generator state to
save, so a resumed run equals an uninterrupted one, on any number of processes. (Importance sampling also uses the
losses so far; those are saved.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.data import ImageSet
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.files import checkpoint
from ddpm_fast.files.averages import average_prefix
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.files.optimizer import load_optimizer_tensors, optimizer_to_tensors
from ddpm_fast.loops import distributed, running
from ddpm_fast.loops.fine_tuning import Start, starting_weights
from ddpm_fast.loops.snapshot import KEEP_CHECKPOINTS, MODEL_NAME, Snapshot
from ddpm_fast.loops.train_config import TrainConfig
from ddpm_fast.loops.training_state import check_network, check_tensors, machine, read_state, versions
from ddpm_fast.loops.training_step import TrainingStep
from ddpm_fast.nn import PowerAverage, UNet, UNetConfig

__all__ = ["MODEL_NAME", "TrainConfig", "Trainer"]


class Trainer(TrainingStep):
    """What trains a network: its training steps (see TrainingStep for its attributes), and what is saved of them.

        trainer = df.Trainer(df.UNetConfig.for_images(data), diffusion, df.TrainConfig(batch_size=64), data)
        trainer.train(10_000, out="run")

    Attributes:
        history: What was changed in the course of the run, one entry for each time: {"step": the steps taken by then,
            the name of what was changed: [before, since then]}.
    """

    def __init__(
        self,
        network: UNetConfig,
        diffusion: GaussianDiffusion,
        config: TrainConfig,
        dataset: ImageSet,
        device: torch.device | str = "auto",
        cuda_graph: bool | None = None,
        compile: bool = False,
        grad_checkpoint: bool = False,
    ):
        """Start from new weights. Where several processes train together, each makes a Trainer of the same arguments.

        Args:
            network: The network to build.
            diffusion: The diffusion to train it for.
            config: How to train it.
            dataset: The images.
            device: Where to train; a name is as for distributed.local_device.
            cuda_graph: Whether a training step is replayed from a CUDA graph, with the same weights bit for bit. None:
                from the third step on, wherever that is possible (where it is not, the logger "ddpm_fast.graphs" says
                why). True: where it is not possible, raise InputError. False: never.
            compile: Whether the network is called through torch.compile, which gives the same weights to rounding, at
                the price of up to some minutes before the first step.
            grad_checkpoint: Whether the backward computes again what the forward does not keep, which takes less memory
                and more time. It changes no number.

        Raises:
            InputError: If the dataset does not fit the network (size, channels, classes), the network's output the
                diffusion's variance, or what it is told the augmentation; if the batch does not divide among the
                processes; or if torch.compile was asked for and does not work here.
        """
        _check_fit(network, diffusion, dataset)
        _check_told(network, config)
        super().__init__(network, diffusion, config, dataset, device, cuda_graph, compile, grad_checkpoint)
        self.history: list[dict[str, Any]] = []

    def start_from(self, loaded: LoadedModel) -> Start:
        """Begin with the weights of a model, before the first step. The average begins with the same ones.

        The model's config must be the network's, but for the size and the classes: those that the model has, by name,
        keep what it has learned of them. The history says which model it was. Where several processes train together,
        each must call it.

        Args:
            loaded: The model.

        Returns:
            What became of the classes.

        Raises:
            InputError: If steps have been taken already, or the network has other weights than the model.
        """
        if self.step:
            raise InputError(f"{self.step} steps have been taken already; start from a model before the first one")
        start = starting_weights(loaded, self.model, self.dataset.label_names)
        self.model.load_state_dict(start.weights)
        for average in (self.ema, *self.averages.values()):
            average.load_state_dict(dict(self.model.named_parameters()))
        before = f"{loaded.name}, SHA-256 {loaded.digest}"
        self.history.append({"step": 0, "weights": ["random", before]})
        return start

    def averaged_model(self) -> UNet:
        """A copy of the network with the averaged weights, for sampling."""
        with torch.random.fork_rng(devices=[]):
            model = UNet(self.model.config).to(self.device)
        self.ema.copy_to(model)
        return model.eval()

    def model_config(self) -> dict[str, Any]:
        """What a model file says about its model."""
        settings = dataclasses.asdict(self.config)
        settings["dropout"] = settings.pop("dropout_version")
        training = {
            **settings,
            **self.dataset.recorded(),
            "steps": self.step,
        }
        value_range = self.dataset.value_range
        return {
            "unet": self.model.config.to_dict(),
            "diffusion": self.diffusion.to_dict(),
            "label_names": self.dataset.label_names,
            "training": training | ({"history": self.history} if self.history else {}),
            **({} if value_range is None else {"value_range": value_range.to_dict()}),
        }

    def snapshot(self, arguments: dict[str, Any]) -> Snapshot:
        """What the training has reached, to be written now or, once copied, while it goes on.

        Where several processes train together all of them must call it. One of them writes.

        Args:
            arguments: Kept in the training state, for resuming.

        Raises:
            NonFiniteLoss: If a weight is not finite.
            RanksDiffer: If the processes differ in what they have reached.
        """
        now = self._state(arguments)
        if distributed.world_size() > 1:
            distributed.check_same(f"the state of step {self.step}", distributed.of_each_process(now.checksum()))
        now.check_finite()
        return now

    def _state(self, arguments: dict[str, Any]) -> Snapshot:
        optimizer = optimizer_to_tensors(self.optimizer, self.model.named_parameters())
        tensors = checkpoint.add_prefix("model.", self.model.state_dict())
        tensors |= checkpoint.add_prefix("ema.", self.ema.state_dict())
        for width, average in self.averages.items():
            tensors |= checkpoint.add_prefix(average_prefix(width), average.state_dict())
        tensors |= checkpoint.add_prefix("optim.", optimizer)
        tensors |= checkpoint.add_prefix("timesteps.", self.timestep_sampler.state_dict())
        tensors |= checkpoint.add_prefix("loss_scale.", self.loss_scale.state_dict())
        config = self.model_config()
        meta = {
            "step": self.step,
            "examples": self._first_example + self.step * self.config.batch_size,
            "arguments": arguments,
            "machine": self.machine(),
            **config,
        }
        return Snapshot(tensors, meta, config)

    def save(self, folder: Path | str, arguments: dict[str, Any] | None = None) -> Path:
        """Write a training state, and the averaged weights as model.safetensors. Then remove all but the newest states.

        Where several processes train together all of them must call it, and the first one writes.

        Args:
            folder: Where to write them.
            arguments: Kept in the training state, for resuming.

        Returns:
            The path of the training state.

        Raises:
            NonFiniteLoss: If a weight is not finite; nothing is written.
            RanksDiffer: If the processes differ in what they have reached; nothing is written.
            InputError: If they cannot be written.
        """
        now = self.snapshot(arguments or {})
        distributed.in_first_process(lambda: now.write(Path(folder)))
        return checkpoint.checkpoint_path(folder, self.step)

    def save_averages(self, folder: Path | str) -> None:
        """Write the power-function averages into a run's folder. files/averages.py makes those of other widths of them.

        All processes must call it, as `save`; it raises what that raises.
        """
        now = self.snapshot({})
        distributed.in_first_process(lambda: now.write_averages(Path(folder)))

    def train(
        self, steps: int, out: Path | str | None = None, save_every: int = 1000, average_every: int | None = None
    ) -> None:
        """Train, with a progress bar. `python -m ddpm_fast.train` does more: curves, sample grids, and stopping at a
        signal.

        Args:
            steps: How many training steps there will have been in all, those before this call included.
            out: The folder for training states, and for the model to sample from. None: nothing is saved.
            save_every: How many training steps there are between two saves. There is one at the end, too.
            average_every: The same of the power-function averages. None: a 32nd of `steps`.

        Raises:
            NonFiniteLoss: At the first training step that is not finite. Nothing after the last good step is saved.
            InputError: If `out` has the states of a run that is further than this one, which a save would remove; if
                another process writes there; or if it cannot be written.
        """
        check_integer("steps", steps, 0)
        check_integer("save_every", save_every, 1)
        if average_every is None:
            average_every = running.average_every(steps)
        check_integer("average_every", average_every, 1)
        folder = None if out is None else Path(out)
        saves: list[tuple[int, Callable[[], object]]] = []
        if folder is not None:
            saves = [(save_every, partial(self.save, folder))]
            if self.averages:
                saves.insert(0, (average_every, partial(self.save_averages, folder)))
        with running.kept_folder(folder, self.step):
            running.train(self, steps, saves)

    def close(self) -> None:
        """End what reads images ahead. There are no training steps after that."""
        self._examples.close()

    def machine(self) -> dict[str, Any]:
        """What the bits of a training step depend on besides its config: kept in the training states."""
        return {**machine(self.device), "ranks": distributed.world_size(), "micro_batch": self._share.size}

    def complete(self, folder: Path) -> bool:
        """Finish what a process that was killed after it had written the training state of this step left undone.

        It may have left no model.safetensors or that of another step, unfinished files, and states that are too old.

        Returns:
            Whether model.safetensors was written.

        Raises:
            InputError: If it cannot be written.
        """
        try:
            found, config = checkpoint.read_model(folder / MODEL_NAME)
        except InputError:
            found, config = {}, {}
        averages = self.ema.state_dict()
        same = found.keys() == averages.keys() and all(
            torch.equal(found[name], average.detach().to("cpu", found[name].dtype))
            for name, average in averages.items()
        )
        same = same and config["training"]["steps"] == self.step
        if not same:
            self._state({}).write_model(folder)
        checkpoint.prune_checkpoints(folder, KEEP_CHECKPOINTS)
        return not same

    def load(self, path: Path) -> None:
        """Continue from a training state.

        Raises:
            InputError: If it is damaged, or was saved with another network or another timestep sampling.
        """
        tensors, meta = read_state(path)
        check_network(path, meta, self.model.config)
        kept = versions(meta)
        averages = {width: PowerAverage(self.model, width) for width in kept["average_widths"]}
        mine = {average_prefix(width): average.state_dict() for width, average in averages.items()}
        for prefix, own in {"model.": self.model.state_dict(), "ema.": self.ema.state_dict(), **mine}.items():
            check_tensors(path, checkpoint.take_prefix(prefix, tensors), own)
        self.timestep_sampler.load_state_dict(checkpoint.take_prefix("timesteps.", tensors))
        self.loss_scale.load_state_dict(checkpoint.take_prefix("loss_scale.", tensors))
        self.model.load_state_dict(checkpoint.take_prefix("model.", tensors))
        self.ema.load_state_dict(checkpoint.take_prefix("ema.", tensors))
        self.averages = averages
        for width, average in averages.items():
            average.load_state_dict(checkpoint.take_prefix(average_prefix(width), tensors))
        load_optimizer_tensors(self.optimizer, self.model.named_parameters(), checkpoint.take_prefix("optim.", tensors))
        # Whatever the config says: a run goes on as it began.
        self.config = dataclasses.replace(self.config, **kept)
        self._examples.close()
        self._examples = self._make_examples()
        self.step = meta["step"]
        self.history = meta["training"].get("history", [])
        # With another batch size the examples go on where they were.
        seen = meta.get("examples", self.step * meta["training"]["batch_size"])
        self._first_example = seen - self.step * self.config.batch_size
        self._step.fill_(self.step)
        self._advance = self._repeated()  # a new graph, because the optimiser's state is in new tensors


def _check_fit(network: UNetConfig, diffusion: GaussianDiffusion, dataset: ImageSet) -> None:
    """Raises InputError if the dataset does not fit the network, or the network's output the diffusion's variance."""
    if network.condition_channels:
        raise InputError(
            f"the network gets a second image of {network.condition_channels} channels beside the noised one, and "
            "training has none to give: such a network can only be sampled from"
        )
    if dataset.shape != network.shape:
        found, expected = ("x".join(map(str, shape)) for shape in (dataset.shape, network.shape))
        raise InputError(
            f"{dataset.name} has images of shape {found} and the network takes {expected}: give --image-size and "
            "--channels"
        )
    if network.num_classes and dataset.num_classes != network.num_classes:
        raise InputError(
            f"{dataset.name} has {dataset.num_classes or 'no'} classes and the network {network.num_classes}"
        )
    if network.learned_variance != diffusion.objective.learned:
        raise InputError(
            f"the diffusion's variance is {diffusion.objective.variance!r} and the network's learned_variance "
            f"{network.learned_variance}: make the network with UNetConfig(learned_variance="
            f"{diffusion.objective.learned}, ...), or choose another variance"
        )


def _check_told(network: UNetConfig, config: TrainConfig) -> None:
    """Raises InputError if the network cannot be told how images are augmented. It may be told that they are not."""
    told = config.augmentation
    if told is not None and told.channels != network.augment_channels:
        raise InputError(
            f"augment is {config.augment!r}, which is told by {told.channels} numbers, and the network's "
            f"augment_channels is {network.augment_channels}: make it with UNetConfig(augment_channels="
            f"{told.channels}, ...), or leave augment out"
        )
