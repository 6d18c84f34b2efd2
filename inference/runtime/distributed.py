"""Many processes: what the engines need of ``torch.distributed``, and nothing below it.

``torchrun --nproc-per-node=4 script.py`` starts the same script four times and describes the job in environment
variables. The first collective call here joins the processes into a group (gloo for tensors in host memory, NCCL for
those on CUDA devices); a group that the script has made itself is used as it is. Without either there is one rank,
every function is the identity, and nothing is opened or waited for.

Every rank must make the same calls in the same order. Values of Python travel as JSON in byte tensors, never as pickle.
"""

import atexit
import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from inference._errors import CheckpointError, RankError

__all__ = [
    "barrier",
    "broadcast",
    "broadcast_plain",
    "ending_together",
    "from_main",
    "gather_rows",
    "is_main",
    "own_device",
    "rank",
    "require_same",
    "shard",
    "sum_flat",
    "sum_over_ranks",
    "world_size",
]

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = timedelta(minutes=30)  # for one collective call: ranks may compile, or load data, at different speeds
_ROLL_CALL_SECONDS = 3.0  # the others meet the same broken connection, or torchrun's SIGTERM, within tenths of a second
_ADVICE = (
    "All ranks are needed. Run the same command again: with a checkpoint it goes on from the last one "
    "(torchrun --max-restarts=N does so by itself)"
)
_barriers = 0  # how many this process has met: their keys in the store differ
_in_roll_call = False


# -- who is there


def rank() -> int:
    """This process's number among the job's, from 0."""
    if _joined():
        return dist.get_rank()
    return int(os.environ["RANK"]) if _launched() else 0


def world_size() -> int:
    """The number of processes in the job, 1 without a launcher."""
    if _joined():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and gathers."""
    return rank() == 0


def shard(count: int, what: str = "chains", of: int | None = None) -> range:
    """The part of ``range(count)`` that a rank owns: contiguous, in the order of the ranks, sizes at most one apart.

    Args:
        count: how many there are in all.
        what: their name, for the error.
        of: the rank; this one if None.

    Raises:
        ValueError: a rank would own none.
    """
    ranks, own = world_size(), rank() if of is None else of
    if count < ranks:
        raise ValueError(
            f"{count} {what} cannot be split over {ranks} ranks: each needs one. Start at most {count} processes "
            f"(torchrun --nproc-per-node) or use at least {ranks} {what}"
        )
    share, extra = divmod(count, ranks)
    start = own * share + min(own, extra)
    return range(start, start + share + (own < extra))


def own_device(device: torch.device) -> torch.device:
    """The rank's own among the machine's devices of this type, as ``torchrun`` numbers them."""
    if world_size() == 1 or device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


# -- tensors


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors of this shape, the same bits on each rank; the tensor itself in one process.

    The terms are added in the order of the ranks, so that the sum depends on nothing but them. Not differentiable.
    """
    if world_size() == 1:
        return tensor
    return torch.stack(_gather(tensor)).sum(0).to(tensor.device)


def sum_flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over ranks of several tensors, in one collective call for each dtype and device among them.

    For many or large tensors: memory does not grow with the number of ranks, and the order of the terms is the
    backend's. All ranks get the same bits.
    """
    if world_size() == 1:
        return list(tensors)
    sums = list(tensors)
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, value in enumerate(tensors):
        groups.setdefault((value.dtype, value.device), []).append(index)
    for indices in groups.values():
        flat = _carried(torch.cat([tensors[i].detach().reshape(-1) for i in indices]))
        _collective(dist.all_reduce, flat)
        parts = flat.split([tensors[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            sums[i] = part.view(tensors[i].shape).to(tensors[i].device)
    return sums


@overload
def gather_rows(tensor: Tensor, *, to_all: Literal[True]) -> Tensor: ...


@overload
def gather_rows(tensor: Tensor) -> Tensor | None: ...


def gather_rows(tensor: Tensor, *, to_all: bool = False) -> Tensor | None:
    """The ranks' shards ``(rows, ...)`` one below the other, in the order of the ranks; rows may differ in number.

    Args:
        tensor: this rank's shard.
        to_all: whether every rank gets the whole. Otherwise rank 0 does, and the others get None.
    """
    if world_size() == 1:
        return tensor
    lengths = [int(n) for n in _gather(torch.tensor([len(tensor)], device="cpu"))]
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    # As bytes: every dtype travels, booleans included.
    parts = _gather(padded.view(torch.uint8), only_main=not to_all)
    if not parts:
        return None
    return torch.cat([p.view(tensor.dtype)[:n] for p, n in zip(parts, lengths, strict=True)]).to(tensor.device)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Put rank 0's values into the other ranks' tensors, which must have the same shapes and dtypes."""
    if world_size() == 1:
        return
    for tensor in tensors:
        sent = _carried(tensor.detach().clone(memory_format=torch.contiguous_format))
        _collective(dist.broadcast, sent, src=0)
        if not is_main():
            with torch.no_grad():
                tensor.copy_(sent)


# -- plain values


def broadcast_plain(value: Any) -> Any:
    """Rank 0's value on all ranks: numbers, strings, None, and lists and dictionaries of them (a tuple is a list)."""
    if world_size() == 1:
        return value
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if is_main() else None
    length = torch.tensor([0 if content is None else len(content)], device="cpu")
    broadcast([length])
    content = torch.empty(int(length), dtype=torch.uint8, device="cpu") if content is None else content
    broadcast([content])
    return json.loads(content.numpy().tobytes())


def from_main(
    function: Callable[[], tuple[dict[str, Tensor], dict[str, Any]] | None],
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Call ``function`` on rank 0 alone and give what it returns, or the CheckpointError that it raises, to all ranks.

    For a file that only rank 0 can see: tensors by name (on the CPU) and plain data, or None.
    """
    if world_size() == 1:
        return function()
    found, error = None, None
    if is_main():
        try:
            found = function()
        except CheckpointError as raised:
            error = raised
    layout = None if found is None else [[n, str(t.dtype)[6:], list(t.shape)] for n, t in found[0].items()]
    sent = broadcast_plain([None if error is None else str(error), layout, None if found is None else found[1]])
    if error is not None:
        raise error
    if sent[0] is not None:
        raise CheckpointError(sent[0])
    if sent[1] is None:
        return None
    tensors = {n: torch.empty(shape, dtype=getattr(torch, dtype), device="cpu") for n, dtype, shape in sent[1]}
    if found is not None:
        tensors = found[0]
    broadcast([t.reshape(-1).view(torch.uint8) for t in tensors.values() if t.numel()])
    return tensors, sent[2]


def require_same(values: Mapping[str, str]) -> None:
    """Make sure that all ranks hold these strings.

    Raises:
        ValueError: on all ranks, naming those that differ.
    """
    if world_size() == 1:
        return
    theirs = broadcast_plain(dict(values))
    names = sorted(theirs)
    flags = torch.tensor([float(values.get(n) != theirs[n]) for n in names], device="cpu")
    different = [n for n, flag in zip(names, sum_over_ranks(flags).tolist(), strict=True) if flag]
    if different:
        raise ValueError(
            f"the ranks were given different things ({', '.join(different)}): each needs the same arguments and the "
            "whole data, and takes its part itself"
        )


# -- ends


def barrier(timeout: float = _TIMEOUT.total_seconds()) -> None:
    """Wait until all ranks are here.

    Raises:
        RankError: some are not within ``timeout`` seconds; the message says which.
    """
    global _barriers
    if world_size() == 1:
        return
    _join()
    _barriers += 1
    missing = _roll_call(f"barrier/{_barriers}", timeout)
    if missing:
        raise RankError(f"{_named(missing)} did not come to the barrier within {timeout:g} s. {_ADVICE}")


class Ending:
    """Whether the job's ranks should stop: see :func:`ending_together`."""

    def __init__(self) -> None:
        self.requested = False

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all, which must ask together."""
        if world_size() == 1:
            return self.requested
        return bool(sum_over_ranks(torch.tensor(float(self.requested), device="cpu")))


@contextmanager
def ending_together() -> Iterator[Ending]:
    """Inside, with several ranks, signals end all of them alike and between steps.

    Ctrl-C reaches each rank at another step. It only sets ``requested`` here, and the ranks agree on the step after
    which they stop. SIGTERM, by which torchrun ends those that are left when one has failed, becomes a
    :class:`RankError` that says which rank is gone, unless the script handles it itself.
    """
    ending = Ending()
    if world_size() == 1 or threading.current_thread() is not threading.main_thread():
        yield ending
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        ending.requested = True

    def terminate(number: int, frame: FrameType | None) -> None:
        if not _in_roll_call:
            raise RankError(_who_is_gone("was told to end (SIGTERM)"))

    before: dict[signal.Signals, Any] = {}
    try:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            before[signal.SIGTERM] = signal.signal(signal.SIGTERM, terminate)
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _who_is_gone(event: str) -> str:
    missing = _roll_call("alive", _ROLL_CALL_SECONDS)
    if not missing:
        return f"rank {rank()} of {world_size()} {event}, although every rank still answers. {_ADVICE}"
    return f"{_named(missing)} of {world_size()} gone: rank {rank()} {event}. {_ADVICE}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _roll_call(name: str, seconds: float) -> list[int]:
    """The ranks that have not written their name within so many seconds; all but this one if the store is gone."""
    global _in_roll_call
    others = [r for r in range(world_size()) if r != rank()]
    _in_roll_call = True
    try:
        store = dist.distributed_c10d._get_default_store()
        key = f"inference/{_attempt()}/{name}"
        store.set(f"{key}/{rank()}", "here")
        stop, pause = time.monotonic() + seconds, 0.001
        while others and time.monotonic() < stop:
            others = [r for r in others if not store.check([f"{key}/{r}"])]
            if others:
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
    except RuntimeError:  # the store was rank 0's own and died with it
        others = [0] if 0 in others else others
    finally:
        _in_roll_call = False
    return others


# -- the group


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _launched() -> bool:
    return dist.is_available() and all(name in os.environ for name in _LAUNCHER)


def _join() -> None:
    if not _joined():
        # NCCL refuses two ranks on one device; gloo carries device tensors through host memory.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        one_each = kind is not None and kind.type == "cuda" and local <= torch.accelerator.device_count()
        store, own, ranks = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        # torchrun keeps its store when it starts the ranks again: addresses of the dead must not be found there.
        store = dist.PrefixStore(f"inference/{_attempt()}", store)
        # Defaults of its functions are the group that is there when it is imported, by torch._dynamo for one: they
        # would keep this group, and its threads, beyond its end.
        importlib.import_module("torch.distributed.nn.functional")
        backend = "cpu:gloo,cuda:nccl" if one_each else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=ranks, timeout=_TIMEOUT)
        # A thread of gloo's lets go of the last call's tensors after the call has returned, for which it takes the
        # interpreter's lock. If the interpreter ends first, the process aborts: the group's end waits for its threads.
        atexit.register(_leave)


def _leave() -> None:
    if _joined():
        dist.destroy_process_group()


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _carried(tensor: Tensor) -> Tensor:
    """The tensor where the group can take it: a group of NCCL alone takes nothing from host memory."""
    _join()
    if tensor.device.type == "cpu" and "gloo" not in dist.get_backend_config():
        return tensor.to(own_device(torch.accelerator.current_accelerator() or tensor.device))
    return tensor


def _gather(tensor: Tensor, *, only_main: bool = False) -> list[Tensor]:
    sent = _carried(tensor.detach()).contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())] if is_main() or not only_main else []
    if only_main:
        _collective(dist.gather, sent, parts or None, dst=0)
    else:
        _collective(dist.all_gather, parts, sent)
    return parts


def _collective(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except RuntimeError as error:
        raise RankError(_who_is_gone("lost the connection")) from error
