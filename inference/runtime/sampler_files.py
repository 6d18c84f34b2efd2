"""What a sampling run keeps in its checkpoint folder: the state to resume from, beside the draws.

One process writes to the folder itself, each of several ranks to its own ``rank_<r>_of_<n>`` within.  Ranks save after
the same step, one a little before another; where a job was killed in between, those that are ahead go back by one.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference._errors import CheckpointError
from inference.runtime import distributed
from inference.runtime.checkpoint import load_checkpoint, save_checkpoint
from inference.runtime.state import leaves
from inference.runtime.streams import Streams

__all__ = ["SamplerFiles"]

_KIND = "mcmc"
_STATE = "state.safetensors"


class SamplerFiles:
    """The checkpoint of this process's chains.

    Args:
        folder: the run's; all ranks are given the same.
        identity: of the run; only the same resumes.

    Attributes:
        folder: where this process writes, its draws too.

    Raises:
        CheckpointError: the folder holds a run of another number of ranks.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        ranks = distributed.world_size()
        found = {int(re.sub(".*_of_", "", path.parent.name)) for path in folder.glob(f"rank_*_of_*/{_STATE}")}
        found |= {1} if (folder / _STATE).exists() else set()
        if found - {ranks}:
            raise CheckpointError(
                f"{folder} holds a run of {min(found - {ranks})} process(es) and this job has {ranks}: start as many "
                "to resume it, or give another checkpoint folder"
            )
        self.folder = folder if ranks == 1 else folder / f"rank_{distributed.rank()}_of_{ranks}"
        self._file, self._identity = self.folder / _STATE, identity

    def save(self, state: Any, streams: Streams, meta: Mapping[str, Any]) -> None:
        """Write the state after step ``meta["step"]``."""
        tensors = {f"state/{i}": leaf.contiguous() for i, leaf in enumerate(leaves(state))}
        tensors |= {f"streams/{n}": g for n, g in streams.state_dict().items()}
        save_checkpoint(self._file, tensors, {"identity": self._identity, **meta}, kind=_KIND)

    def load(self, streams: Streams) -> tuple[list[Tensor], dict[str, Any]] | None:
        """The state's tensors and ``meta`` of the last step that all ranks have saved, with ``streams`` put back to
        it; None if some have saved none.

        Raises:
            CheckpointError: the files are of another run, damaged, or of steps that do not fit.
        """
        found = load_checkpoint(self._file, kind=_KIND)
        step = -1 if found is None else found[1]["step"]
        steps = distributed.gather_rows(torch.tensor([step], device="cpu"), to_all=True)
        common = int(steps.min())
        if found is None or common < 0:
            return None
        if step > common:
            previous = self._file.with_name(self._file.name + ".previous")
            found = load_checkpoint(previous, kind=_KIND, fallback=False)
            if found is None or found[1]["step"] != common:
                raise CheckpointError(
                    f"the ranks' checkpoints in {self.folder.parent} are of steps {steps.tolist()} and do not fit: "
                    "delete the folder to start afresh"
                )
            os.replace(previous, self._file)
        tensors, meta = found
        if meta["identity"] != self._identity:
            raise CheckpointError(
                f"{self._file} belongs to a run with other settings, "
                "data or model; give the same ones, or another checkpoint folder"
            )
        groups: dict[str, dict[str, Tensor]] = {"state": {}, "streams": {}}
        for name, tensor in tensors.items():
            group, key = name.split("/", 1)
            groups[group][key] = tensor
        streams.load_state_dict(groups["streams"])
        return [groups["state"][str(i)] for i in range(len(groups["state"]))], meta
