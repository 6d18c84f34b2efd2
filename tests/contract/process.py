"""What contract tests do in other processes: read a saved model, or be killed in the middle of a fit.

python -m tests.contract.process load NAME FILE OUT
python -m tests.contract.process kill NAME FOLDER
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inference import MCMC, fit
from tests.contract.case import ModelCase, model_case


def load(case: ModelCase, file: str, out: str) -> None:
    """The answers of the model in ``file``, after an export."""
    model = type(case.build()).load(file)
    torch.save(case.answers(model), out)


def save_often() -> None:
    """Checkpoints after every few steps, which users want rarely."""
    assert fit.__kwdefaults__ is not None and MCMC.__init__.__kwdefaults__ is not None
    fit.__kwdefaults__["checkpoint_every"] = 2
    MCMC.__init__.__kwdefaults__["checkpoint_every"] = 0.0


def count_replacements(*, kill_at: int | None = None) -> list[int]:
    """Counts the renames that end each save, and dies right after one of them."""
    calls, replace = [0], os.replace

    def counted(*arguments: Any, **options: Any) -> None:
        replace(*arguments, **options)
        calls[0] += 1
        if calls[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    return calls


def in_child(function: Callable[[], None]) -> int:
    """The exit code of a forked process."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(case: ModelCase, folder: str) -> None:
    """A whole run, one killed in the middle, and one that goes on from there, in three processes."""
    save_often()

    def run(name: str, checkpoint: str) -> None:
        calls = count_replacements()
        model, _ = case.fitted(checkpoint=Path(folder, checkpoint))
        torch.save({"answers": case.answers(model), "replacements": calls[0]}, f"{folder}/{name}.pt")

    def die(at: int) -> None:
        count_replacements(kill_at=at)
        case.fitted(checkpoint=Path(folder, "cut"))

    assert in_child(lambda: run("whole", "undisturbed")) == 0
    half = torch.load(f"{folder}/whole.pt")["replacements"] // 2
    code = in_child(lambda: die(half))
    assert code == -signal.SIGKILL, f"the run ended with {code} before it was killed"
    assert in_child(lambda: run("resumed", "cut")) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, command, name, *arguments = sys.argv
    {"load": load, "kill": kill}[command](model_case(name), *arguments)
