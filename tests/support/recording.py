"""A CUDA graph without a GPU: records the operations of a run and repeats them with the tensors they had then.

That is what a graph does: a replay uses the addresses and numbers of the recording and does not run Python again.
Where the operations would stop a capture on a GPU, because they read back from it or copy from the host, this one
raises too. It stands in for ddpm_fast.loops.graphs.CudaGraph.
"""

import contextlib
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ddpm_fast import compat
from ddpm_fast.loops import graphs
from ddpm_fast.nn import UNet

READS_BACK = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "allclose")


class NoSync(TorchDispatchMode):
    """Raises RuntimeError where a GPU's values would have to be read back, or the host's be copied to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in READS_BACK or any(i is not None and i.dtype == torch.bool for i in indices):
            raise RuntimeError(f"{function} waits for the device")
        if name == "lift_fresh":  # what torch.tensor(data) makes
            raise RuntimeError(f"{function} copies from the host")
        return function(*args, **(kwargs or {}))


def tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def storage_of(tensor):
    return tensor.untyped_storage().data_ptr()


class _Recorder(NoSync):
    def __init__(self):
        super().__init__()
        self.operations, self.before, self.fresh = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for i, argument in enumerate(function._schema.arguments):
            if argument.is_write:
                written = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in tensors(written):
                    place = storage_of(tensor)
                    if place not in self.fresh:
                        self.before.setdefault(place, (tensor.untyped_storage(), tensor.untyped_storage().clone()))
        results = super().__torch_dispatch__(function, types, args, kwargs)
        given = {storage_of(tensor) for tensor in tensors((args, kwargs))}
        own = [None if storage_of(tensor) in given else tensor for tensor in tensors(results)]
        self.fresh.update(storage_of(tensor) for tensor in own if tensor is not None)
        self.operations.append((function, args, kwargs, own))
        return results


class RecordingGraph:
    """ddpm_fast.loops.graphs.CudaGraph's two methods, and how often each was called, over all.

    `generator_captures` is the flag of torch 2.11's CUDA generator (CUDAGeneratorImpl.cpp): capture_prologue sets it,
    and only capture_epilogue clears it, which a capture that fails never reaches.
    """

    captures = replays = 0
    generator_captures = False

    def __init__(self, pool):
        self.operations = []

    def capture(self, run):
        type(self).captures += 1
        type(self).generator_captures = True
        recorder, generator = _Recorder(), torch.get_rng_state()
        try:
            with recorder:
                run()
            self.operations = recorder.operations
            type(self).generator_captures = False
        finally:
            # A capture executes nothing: what was written is as it was, and what was made is not there yet.
            torch.set_rng_state(generator)
            for storage, content in recorder.before.values():
                storage.copy_(content)
        with torch.no_grad(), compat.below_autograd():
            for *_, own in self.operations:
                for tensor in own:
                    if tensor is not None and tensor.is_floating_point():
                        tensor.fill_(torch.nan)

    @classmethod
    def check_generator(cls):
        """Raises RuntimeError, as torch 2.11 does for random numbers and replays, if a capture seems to go on."""
        if cls.generator_captures:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def replay(self):
        self.check_generator()
        type(self).replays += 1
        with torch.no_grad(), compat.below_autograd():
            for function, args, kwargs, own in self.operations:
                for tensor, result in zip(own, tensors(function(*args, **kwargs)), strict=True):
                    if tensor is not None:
                        tensor.copy_(result)


class DeviceGenerator(TorchDispatchMode):
    """Inside, random numbers come from a generator that knows of captures: RecordingGraph's flag stops them."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.graph.check_generator()
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def recorded():
    """Inside, captures on the CPU, by recording: yields RecordingGraph, its counts at 0."""

    class Counted(RecordingGraph):
        captures = replays = 0
        generator_captures = False

    with (
        mock.patch.object(graphs, "CudaGraph", Counted),
        mock.patch.object(graphs, "cannot_capture", lambda device, model=None: ""),
        mock.patch.object(graphs, "_no_waiting", contextlib.nullcontext),
        # On the CPU alone, this looks at the labels' values.
        mock.patch.object(UNet, "_check", lambda *_: None),
    ):
        yield Counted


@pytest.fixture
def recording():
    """As recorded()."""
    with recorded() as counted:
        yield counted
