"""Runs a case on two processes under ``torchrun``, for the tests of many processes.

    torchrun --nproc-per-node=2 -m tests.inference.ranks MODULE CASE FOLDER

``MODULE.CASES[CASE]`` is called with the folder on every rank, which leaves what it returns in ``FOLDER/rank<r>.pt``.
"""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from inference.runtime import distributed

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240  # a case takes a few on an idle core


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


def main(module: str, case: str, folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.save(importlib.import_module(module).CASES[case](folder), folder / f"rank{distributed.rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
