"""The progress report never stops a run and never changes what it reports."""

import warnings

import pytest

from inference import _errors
from inference.runtime.progress import Progress


def test_one_line_on_standard_error(capfd):
    with Progress(10, "training") as progress:
        progress.update(4, loss=1.5)
        progress.update(10, loss=0.25)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training" in err and "10/10" in err and "loss=0.25" in err


def test_off_prints_nothing(capfd):
    with Progress(10, "training", False) as progress:
        progress.update(10, loss=0.0)
    assert capfd.readouterr() == ("", "")


def test_a_function_gets_every_field(capfd):
    seen = []
    with Progress(10, "training", seen.append) as progress:
        progress.update(3, loss=2.0)
        progress.update(10)
    assert seen == [
        {"description": "training", "step": 3, "total": 10, "loss": 2.0},
        {"description": "training", "step": 10, "total": 10},
    ]
    assert capfd.readouterr().err == ""


def test_a_failing_function_warns_once_and_stops_nothing():
    calls = []

    def fail(fields):
        calls.append(fields)
        raise ZeroDivisionError("mine")

    with Progress(10, "training", fail) as progress:
        with pytest.warns(_errors.SamplerWarning, match=r"training.*ZeroDivisionError"):
            progress.update(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            progress.update(2)
    assert len(calls) == 2


def test_an_interrupt_passes_through():
    def interrupt(fields):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Progress(10, "training", interrupt) as progress:
        progress.update(1)


def test_closing_twice_is_harmless(capfd):
    progress = Progress(1, "training")
    progress.close()
    progress.close()


@pytest.mark.parametrize("enabled", [None, "yes", 1])
def test_other_switches_are_refused(enabled):
    with pytest.raises(TypeError, match="progress"):
        Progress(1, "training", enabled)
