"""Signals that stop a command: heard at once, obeyed at the next step, and the second Ctrl-C at once."""

import signal

import pytest
import typer

from ddpm_fast.commands.stopping import Stopped, stop_signals

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_said_at_once_and_obeyed_at_the_next_check(capfd, number):
    before = signal.getsignal(number)
    with stop_signals("saving first", lambda: "aborted") as stopping:
        stopping.check()
        assert not stopping and stopping.status == 0
        signal.raise_signal(number)
        assert capfd.readouterr().err == f"\n{signal.Signals(number).name}: saving first\n"
        with pytest.raises(Stopped):
            stopping.check("as", "a", "callback")
    assert stopping and stopping.status == 128 + number
    assert signal.getsignal(number) == before


def test_a_signal_stops_work_that_has_nothing_to_save_wherever_it_is(capfd):
    with stop_signals("stopping", lambda: "aborted") as stopping, pytest.raises(Stopped), stopping.anywhere():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("it was taken for a failure of the work")
    assert stopping.status == 143 and capfd.readouterr().err == "\nSIGTERM: stopping\n"


def test_what_other_languages_make_of_a_signal_is_one_again():
    with stop_signals("stopping", lambda: "aborted") as stopping:
        with pytest.raises(ZeroDivisionError), stopping.anywhere():
            raise ZeroDivisionError
        with pytest.raises(Stopped), stopping.anywhere():
            try:
                signal.raise_signal(signal.SIGTERM)
            except Stopped:
                raise ValueError from None
        with pytest.raises(Stopped), stopping.anywhere():
            pytest.fail("a signal that came before was overlooked")


def test_work_that_is_held_goes_on_to_the_next_check():
    with stop_signals("saving first", lambda: "aborted") as stopping:
        with pytest.raises(ZeroDivisionError), stopping.anywhere():
            stopping.hold()
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError
        with pytest.raises(Stopped):
            stopping.check()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_ctrl_c_ends_the_command_wherever_it_is(capfd, number):
    with pytest.raises(typer.Exit) as ended, stop_signals("saving first", lambda: "aborted") as stopping:
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # says no more than the first signal
        stopping.abort = lambda: "aborted; saved until step 7"
        capfd.readouterr()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the command went on")
    assert ended.value.exit_code == 130
    assert capfd.readouterr().err == "\naborted; saved until step 7\n"


def test_a_signal_that_the_process_ignores_stays_ignored(capfd):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signals("saving first", lambda: "aborted") as stopping:
            signal.raise_signal(signal.SIGHUP)
            assert not stopping and capfd.readouterr().err == ""
    finally:
        signal.signal(signal.SIGHUP, before)
