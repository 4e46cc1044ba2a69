"""Whether a backend that one thread has chosen is seen by another."""

from __future__ import annotations

import random
import threading

from ddpm_fast import ops
from ddpm_fast.ops import active_backend
from tests.fuzz.supervise import Failed, Notes

NAMES = ("cpu", "reference")


def run(rng: random.Random, notes: Notes) -> int:
    """Threads that take turns enter and leave blocks of use_backend, and look at what is active."""
    count = rng.choice((2, 3))
    turns = [rng.randrange(count) for _ in range(rng.randrange(4, 12))]
    moves = [rng.choice((*NAMES, "leave", "look")) for _ in turns]
    notes(lambda: f"use_backend in turn: {list(zip(turns, moves, strict=True))}")
    ready = [threading.Semaphore(0) for _ in range(count)]
    done = threading.Semaphore(0)
    wrong: list[str] = []
    queue: dict[int, str] = {}

    def live(me: int) -> None:
        stack: list[tuple[ops.use_backend, str]] = []
        while True:
            ready[me].acquire()
            move = queue[me]
            if move == "end":
                while stack:
                    stack.pop()[0].__exit__(None, None, None)
                done.release()
                return
            if move in NAMES:
                chosen = ops.use_backend(move)
                chosen.__enter__()
                stack.append((chosen, move))
            elif move == "leave" and stack:
                stack.pop()[0].__exit__(None, None, None)
            expected = stack[-1][1] if stack else "cpu"
            if (found := active_backend("q_sample")) != expected:
                wrong.append(f"thread {me} is within {expected!r} and sees {found!r}")
            done.release()

    pool = [threading.Thread(target=live, args=(i,), daemon=True) for i in range(count)]
    for thread in pool:
        thread.start()
    for me, move in [*zip(turns, moves, strict=True), *((i, "end") for i in range(count))]:
        queue[me] = move
        ready[me].release()
        done.acquire()
    if wrong:
        raise Failed("use_backend: another thread's", f"{list(zip(turns, moves, strict=True))}\n{wrong[0]}")
    return 1
