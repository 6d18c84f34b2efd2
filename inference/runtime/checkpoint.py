"""Files that a run can be resumed from: written whole or not at all, verified when read, never executed.

A checkpoint is one safetensors file: the tensors, and in its header the caller's ``meta`` as JSON with a SHA-256 over
both.  It is written beside its place, flushed to the disk, and renamed; what stood there before stays as
``<name>.previous``.  Whenever the process dies, at least one of the two is a good file.
"""

import contextlib
import dataclasses
import enum
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import struct
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from inference._errors import CheckpointError, SamplerWarning

__all__ = ["fingerprint", "flatten_state", "identify", "load_checkpoint", "save_checkpoint", "unflatten_state"]

_FORMAT = "ppl-models checkpoint"
_VERSION = 1
_STALE_SECONDS = 3600.0  # no write takes this long, so an older temporary file belongs to a process that was killed
# fmt: off
_DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
})
# fmt: on


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, kind: str) -> None:
    """Write tensors and plain data to one file, atomically; the file that stood there is kept as ``<path>.previous``.

    Args:
        path: the file. Its folder is made if it is missing; a symbolic link is followed.
        tensors: dense tensors of any device, saved bit for bit. Names are free.
        meta: plain data: dictionaries with string keys, lists, tuples (read back as lists), strings, numbers,
            booleans, None.
        kind: what the file is for (``"fit"``, ``"mcmc"``); only the same kind reads it.

    Raises:
        TypeError: a tensor or an entry of ``meta`` cannot be stored exactly.
        CheckpointError: the file cannot be written (no space, no permission, ...). The last good file stands as it was.
    """
    path = _real(path)
    stored = {name: _dense(name, value) for name, value in tensors.items()}
    text = json.dumps(_plain(meta, "meta"), sort_keys=True)
    header = {"format": _FORMAT, "version": str(_VERSION), "kind": kind, "meta": text}
    header["sha256"] = _digest(stored, kind, text)
    content = safetensors.torch.save(stored, metadata=header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        _replace(path, content)
    except OSError as error:
        _refuse_write(path, error)


def load_checkpoint(
    path: str | Path, *, kind: str, fallback: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a checkpoint and verify it; nothing in the file is executed.

    A damaged file (truncated, overwritten, not a checkpoint) gives way to ``<path>.previous`` with a
    :class:`SamplerWarning`. A sound file of another kind or of a newer version is never passed over.

    Args:
        path: the file that :func:`save_checkpoint` wrote.
        kind: the kind it was written with.
        fallback: whether ``<path>.previous`` may stand in for a damaged or missing file.

    Returns:
        The tensors (on the CPU) and ``meta``, or None if there is no file.

    Raises:
        CheckpointError: no sound file of this kind and version is left, or the file cannot be read.
    """
    path = _real(path)
    previous = _beside(path, ".previous")
    damage: CheckpointError | None = None
    try:
        found = _read(path, kind)
    except _Damaged as error:
        found, damage = None, error
    if found is not None:
        return found
    problem = damage or CheckpointError(f"checkpoint {path} is missing")
    if fallback:
        try:
            found = _read(previous, kind)
        except _Damaged as error:
            problem = CheckpointError(f"{problem}; {error}")
        if found is not None:
            warnings.warn(
                f"{problem}; going on from {previous}, which is older. Delete both to start afresh.",
                SamplerWarning,
                stacklevel=2,
            )
            return found
        if damage is None and not previous.exists():
            return None
    elif damage is None:
        return None
    raise CheckpointError(f"{problem}. Delete the file to start afresh, or put a sound copy in its place.")


def fingerprint(*objects: Any) -> str:
    """A SHA-256 that identifies the configuration and the data of a run, the same in every process.

    Covers tensors and arrays (dtype, shape and values; not the device), numbers, strings, paths, None, enums, dtypes,
    devices, sequences (a list and a tuple are alike), mappings and sets (in any order), dataclasses. A function or a
    class counts as its module and qualified name, and not its code; ``functools.partial`` as its parts.

    Raises:
        TypeError: an object of another type, whose contents could not be told apart.
    """
    return _encode(objects).hex()


def flatten_state(state: Any, prefix: str = "state") -> tuple[dict[str, Tensor], Any]:
    """Split nested plain data with tensors in it, such as an optimiser's ``state_dict``, into tensors and JSON data.

    Dictionaries (with string, integer or boolean keys), lists, tuples, numbers, strings, None and tensors come back
    exactly from :func:`unflatten_state`.

    Args:
        state: the nested data.
        prefix: the tensors' names begin with it.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            name = where if where not in tensors else f"{where}#{len(tensors)}"  # "a.b" may be a key as well as a path
            tensors[name] = value.detach()
            return {"tensor": name}
        if isinstance(value, np.generic):
            return pack(value.item(), where)
        if isinstance(value, Mapping):
            for key in value:
                if type(key) not in (str, int, bool):
                    raise TypeError(f"{where} has a key of type {type(key).__name__}; keys must be strings or integers")
            return {"dict": [[key, pack(item, f"{where}.{key}")] for key, item in value.items()]}
        if isinstance(value, tuple | list):
            name = "tuple" if isinstance(value, tuple) else "list"
            return {name: [pack(item, f"{where}.{i}") for i, item in enumerate(value)]}
        raise TypeError(f"{where} is of type {type(value).__name__}, which a checkpoint cannot hold")

    return tensors, pack(state, prefix)


def unflatten_state(tensors: Mapping[str, Tensor], packed: Any) -> Any:
    """Put back together what :func:`flatten_state` split.

    Raises:
        CheckpointError: a tensor is missing or the layout is unknown.
    """
    if not isinstance(packed, dict):
        return packed
    try:
        ((name, content),) = packed.items()
        if name == "tensor":
            return tensors[content]
        if name == "dict":
            return {key: unflatten_state(tensors, item) for key, item in content}
        return {"list": list, "tuple": tuple}[name](unflatten_state(tensors, item) for item in content)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's state has an unknown layout ({error!r})") from error


class _Damaged(CheckpointError):
    """The file is not a whole checkpoint."""


def _real(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a string or a Path, got {path!r}")
    return Path(os.path.realpath(path))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _dense(name: str, value: Tensor) -> Tensor:
    """An own, contiguous copy on the CPU: safetensors takes neither views nor tensors that share memory."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise TypeError(f"tensors must map strings to tensors, got {name!r}: {type(value).__name__}")
    if name == "__metadata__":
        raise TypeError("the tensor name '__metadata__' is reserved by the file format")
    if value.layout != torch.strided or value.is_meta or value.dtype not in _DTYPES:
        raise TypeError(f"tensor {name!r} ({value.layout}, {value.dtype}, {value.device}) cannot be stored")
    value = value.detach().resolve_neg()
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _plain(value: Any, where: str) -> Any:
    """The value itself if JSON gives it back as it is (tuples as lists)."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}; keys must be strings")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} is of type {type(value).__name__}; it must be plain data (put tensors among the tensors)")


def _bytes(value: Tensor) -> memoryview:
    return value.reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor], kind: str, meta: str) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, _VERSION, kind, meta]).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])["__metadata__"]
        found = header["format"], header["kind"], int(header["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damaged(f"{path} is truncated or is not a checkpoint (nothing in it was executed)") from error
    if len(found[0]) == len(_FORMAT) and sum(a != b for a, b in zip(found[0], _FORMAT, strict=True)) == 1:
        # One byte off is a flipped bit, not another program's name.
        raise _Damaged(f"checkpoint {path} is damaged in its header")
    if found[0] != _FORMAT:
        raise CheckpointError(f"{path} is a file of another program ({found[0]!r}); give another path")
    if found[2] != _VERSION:
        raise CheckpointError(
            f"checkpoint {path} has version {found[2]} and this library reads version {_VERSION}: "
            "use the release that wrote it"
        )
    if found[1] != kind:
        raise CheckpointError(f"checkpoint {path} is of the kind {found[1]!r}, not {kind!r}; give another path")
    try:
        tensors = safetensors.torch.load(content)
        if _digest(tensors, kind, header["meta"]) != header["sha256"]:
            raise ValueError("the SHA-256 does not match")
        return tensors, json.loads(header["meta"])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise _Damaged(f"checkpoint {path} is truncated or damaged ({error})") from error


def _replace(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``.

    The file that stands there is demoted last: should it be damaged, ``.previous`` is the only good one until then.
    """
    new, old = _temporary(path), _temporary(path)
    try:
        with open(new, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        kept = path.exists()
        if kept:
            _duplicate(path, old)
        os.replace(new, path)
        if kept:
            os.replace(old, _beside(path, ".previous"))
        _sync_folder(path.parent)
    except BaseException:
        for leftover in (new, old):
            with contextlib.suppress(OSError):
                leftover.unlink()
        raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")


def _duplicate(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        with open(source, "rb") as reader, open(target, "xb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the renames durable, as the data already is. Windows and some network mounts cannot sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_stale(path: Path) -> None:
    """Delete the temporary files that killed processes left."""
    prefix = f".{path.name}."
    for entry in path.parent.iterdir():
        if entry.name.startswith(prefix) and entry.name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                    entry.unlink()


def _refuse_write(path: Path, error: OSError) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "the disk or the quota is full: free some space, or give a checkpoint path on another disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "the folder may not be written to: give a checkpoint path in a folder of yours"
    else:
        advice = "check the path"
    raise CheckpointError(
        f"checkpoint {path} could not be written ({error}); {advice}. "
        "The last good checkpoint, if there was one, is untouched."
    ) from error


def _encode(value: Any) -> bytes:
    """A digest of one object: type, length and content are all delimited, so that no two objects share an encoding."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise TypeError(f"fingerprint cannot read a tensor of layout {value.layout} on {value.device}")
        value = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        yield from (b"tensor", str(value.dtype).encode(), repr(tuple(value.shape)).encode(), _bytes(value))
    elif isinstance(value, np.ndarray | np.generic):
        array = np.ascontiguousarray(value)
        if array.dtype.hasobject:
            raise TypeError("fingerprint cannot read an array of Python objects")
        yield from (b"array", array.dtype.str.encode(), repr(np.shape(value)).encode(), array.tobytes())
    elif value is None or isinstance(value, bool | torch.dtype | torch.device):
        yield from (b"constant", repr(value).encode())
    elif isinstance(value, enum.Enum):
        yield from (b"enum", _name(type(value)), value.name.encode())
    elif isinstance(value, int):
        yield from (b"int", repr(int(value)).encode())
    elif isinstance(value, float):
        yield from (b"float", struct.pack("<d", value))
    elif isinstance(value, complex):
        yield from (b"complex", struct.pack("<dd", value.real, value.imag))
    elif isinstance(value, str):
        yield from (b"str", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes | bytearray):
        yield from (b"bytes", bytes(value))
    elif isinstance(value, os.PathLike):
        yield from (b"path", os.fsencode(value))
    elif isinstance(value, Mapping):
        yield b"mapping"
        yield from (part for pair in sorted((_encode(k), _encode(v)) for k, v in value.items()) for part in pair)
    elif isinstance(value, Set):
        yield b"set"
        yield from sorted(_encode(item) for item in value)
    elif isinstance(value, Sequence):
        yield b"sequence"
        yield from (_encode(item) for item in value)
    elif isinstance(value, functools.partial):
        yield b"partial"
        yield from (_encode(part) for part in (value.func, value.args, value.keywords))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (b"dataclass", _name(type(value)))
        yield from (_encode((field.name, getattr(value, field.name))) for field in dataclasses.fields(value))
    elif isinstance(value, type | types.FunctionType) or _is_builtin(value):
        yield from (b"callable", _name(value))
    else:
        raise TypeError(f"fingerprint does not know how to identify an object of type {_name(type(value)).decode()}")


def _is_builtin(value: Any) -> bool:
    """A function of a module or a class; a method bound to an object would need the object's fingerprint too."""
    owner = getattr(value, "__self__", None)
    return isinstance(value, types.BuiltinFunctionType) and isinstance(owner, type | types.ModuleType | None)


def _name(value: type | Callable[..., Any]) -> bytes:
    return f"{value.__module__}.{value.__qualname__}".encode()


def identify(value: Any) -> str:
    """The fingerprint of ``value``, or the name of its type where it has none."""
    try:
        return fingerprint(value)
    except TypeError:
        return type(value).__qualname__
