"""Where a run's draws go: arrays in memory, or memory-mapped ``.npy`` files that survive the process and keep memory
flat.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from inference._errors import CheckpointError

__all__ = ["DrawStore"]


class DrawStore:
    """Named arrays ``(chain, draw, *shape)`` that are filled draw by draw.

    Args:
        num_chains, num_draws: the leading sizes.
        folder: where the files go; ``None`` keeps the draws in memory.
    """

    def __init__(self, num_chains: int, num_draws: int, folder: Path | None = None) -> None:
        self.num_chains, self.num_draws, self.folder = num_chains, num_draws, folder
        self._arrays: dict[str, np.ndarray] = {}

    def allocate(self, names: Mapping[str, Tensor], *, resume: bool) -> None:
        """Make room for arrays like the ``(chain, *shape)`` examples given; with ``resume``, open those that an
        earlier process wrote.

        Raises:
            CheckpointError: the disk has no room, or the files there are of another run.
        """
        for index, (name, example) in enumerate(names.items()):
            shape = (self.num_chains, self.num_draws, *example.shape[1:])
            dtype = torch.empty((), dtype=example.dtype).numpy().dtype
            if self.folder is None:
                self._arrays[name] = np.full(shape, np.nan if dtype.kind == "f" else 0, dtype=dtype)
                continue
            path = self.folder / f"draws_{index:03d}.npy"
            try:
                if resume:
                    array = np.load(path, mmap_mode="r+", allow_pickle=False)
                    if array.shape != shape or array.dtype != dtype:
                        raise CheckpointError(
                            f"{path} holds {array.dtype}{array.shape}, this "
                            f"run draws {dtype}{shape}; use another folder"
                        )
                else:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    array = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
                    with open(
                        path, "r+b"
                    ) as file:  # reserve the blocks now: a disk that fills up later would kill the process on a write
                        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"cannot keep draws in {path}: {error}. Free space there, or give another checkpoint folder"
                ) from error
            self._arrays[name] = array

    def write(self, start: int, values: Mapping[str, Tensor]) -> None:
        """Put ``(chain, k, *shape)`` values at draws ``start`` to ``start + k``."""
        for name, value in values.items():
            self._arrays[name][:, start : start + value.shape[1]] = value.detach().cpu().numpy()

    def flush(self) -> None:
        """Wait until what was written is on the disk."""
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()

    def tensors(self, stop: int) -> dict[str, Tensor]:
        """The first ``stop`` draws of each array, without a copy."""
        return {name: torch.from_numpy(array[:, :stop]) for name, array in self._arrays.items()}
