"""Runs a case on two processes under ``torchrun``, for the tests of many processes.

    torchrun --nproc-per-node=2 -m tests.inference.ranks MODULE CASE FOLDER

``MODULE.CASES[CASE]`` is called with the folder on every rank, which leaves what it returns in ``FOLDER/rank<r>.pt``.
For many short jobs, :func:`forked` starts the ranks from one process that has imported everything already.
"""

import atexit
import importlib
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inference.runtime import distributed

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 500  # a case takes some ten on an idle core


def torchrun(module: str, case: str, folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], list[Any]]:
    """The finished job and what each rank left."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # a container's own host name often has no address
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*launcher, *options, "-m", __name__, module, case, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=SECONDS,
    )
    return finished, [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


def forked(function: Callable[..., Any], *arguments: Any, group: Path, leave: Path | None = None) -> list[int]:
    """Run ``function(*arguments)`` on two ranks forked from this process, in a group over the file ``group``.

    What it returns is left in ``<leave>.rank<r>.pt``. Returns the exit codes, negative for a signal.
    """
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                torch.distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=2)
                found = function(*arguments)
                if leave is not None:
                    torch.save(found, f"{leave}.rank{rank}.pt")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(module: str, case: str, folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    left = folder / "threads" / str(distributed.rank())
    left.parent.mkdir(exist_ok=True)
    atexit.register(lambda: left.write_text(" ".join(thread_names())))  # after whatever is registered from here on
    torch.save(importlib.import_module(module).CASES[case](folder), folder / f"rank{distributed.rank()}.pt")


def thread_names() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
