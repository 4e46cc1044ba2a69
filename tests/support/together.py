"""The train command in several processes, as torchrun would start them, but forked from one that has imported
everything: so they start in a fraction of a second."""

import functools
import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from support import forked

from ddpm_fast.files import checkpoint

ROOTS = Path(__file__).parents[1], Path(__file__).parents[2]
SECONDS = 120  # until a test that would hang fails; a busy machine takes some


def _run(arguments, environment, log, before):
    """A process: one rank."""
    from support import warm  # not in the tests' own process

    forked.begin(log)
    os.environ.update(environment)
    before()
    try:
        warm.app(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def nothing():
    """Before the command."""


@functools.cache
def _server():
    """What forks the processes. It is started with one thread, and with this module where Python finds it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.warm"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([*map(str, ROOTS)]), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


@dataclass
class Ended:
    """How the processes ended, and what each has said."""

    statuses: list
    said: list


class Together:
    """Processes that train together."""

    def __init__(self, folder, *arguments, befores=(nothing, nothing)):
        """folder: For their output. arguments: The command's; a list has one for each rank."""
        context = _server()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = len(befores)
        self._logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        self.processes = []
        for rank, before in enumerate(befores):
            own = [str(each[rank] if isinstance(each, list) else each) for each in arguments]
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "COLUMNS": "400"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = context.Process(target=_run, args=(own, environment, self._logs[rank], before), daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self):
        """Wait for all."""
        end = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hung = [process for process in self.processes if process.exitcode is None]
        for process in hung:
            process.kill()
        said = [log.read_text() for log in self._logs]
        assert not hung, said
        return Ended([process.exitcode for process in self.processes], said)

    def signal(self, number, *ranks):
        """Send a signal to some."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)


def wait_until(happened):
    """Wait until a function gives something true."""
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_for_step(out, step):
    """Wait for the state of a step, or of a later one."""
    wanted = checkpoint.checkpoint_path(out, step)
    wait_until(lambda: (newest := checkpoint.latest_checkpoint(out)) is not None and newest >= wanted)
