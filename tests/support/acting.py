"""Something that happens at a certain call of a function, such as a signal."""

import signal


def act_at(monkeypatch, owner, name, call, act, first=None):
    """Makes act(*arguments) run before the call number `call`, from 1, of a function. Returns the calls so far.

    first: Only calls with this first argument count.
    """
    plain, calls = getattr(owner, name), []

    def acting(*arguments, **keywords):
        if first is None or arguments[0] == first:
            calls.append(name)
        if len(calls) == call:
            act(*arguments)
        return plain(*arguments, **keywords)

    monkeypatch.setattr(owner, name, acting)
    return calls


def interrupt(number=signal.SIGTERM):
    return lambda *_: signal.raise_signal(number)
