"""Files come back bit for bit, survive what kills a process or fills a disk, and never run anything."""

import enum
import errno
import functools
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from inference._errors import CheckpointError, SamplerWarning
from inference.runtime import checkpoint
from inference.runtime.checkpoint import (
    fingerprint,
    flatten_state,
    load_checkpoint,
    save_checkpoint,
    unflatten_state,
)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shared = torch.arange(6.0)
    return {
        "float64": torch.randn(3, 4, generator=draw, dtype=torch.float64),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64),
        "a NaN with a payload": torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32),
        "float32": torch.randn(5, generator=draw),
        "bfloat16": torch.randn(7, generator=draw).bfloat16(),
        "float16": torch.randn(7, generator=draw).half(),
        "int64": torch.tensor([2**62 + 1, -1]),
        "int32": torch.tensor([-7], dtype=torch.int32),
        "bool": torch.tensor([True, False, True]),
        "generator": draw.get_state(),
        "scalar": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "shared": shared,
        "view of shared": shared[2:],
        "expanded": torch.ones(1).expand(4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def test_bit_for_bit(tmp_path):
    meta = {
        "step": 3,
        "rate": 0.1,
        "names": ["a", "ü"],
        "none": None,
        "on": True,
        "nan": float("nan"),
        "nested": {"x": -1},
    }
    save_checkpoint(tmp_path / "run", tensors(), meta, kind="test")
    found, read = load_checkpoint(tmp_path / "run", kind="test")
    assert list(sorted(found)) == sorted(tensors())
    for name, value in tensors().items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert bits(found[name]) == bits(value.detach()), name
    assert repr(read) == repr({key: meta[key] for key in sorted(meta)})
    assert os.listdir(tmp_path) == ["run"]


def test_nothing_there_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "run", kind="test") is None
    assert load_checkpoint(tmp_path / "no folder" / "run", kind="test") is None


def test_folders_are_made_and_links_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "run")
    for step in (1, 2):
        save_checkpoint(str(tmp_path / "link"), {}, {"step": step}, kind="test")
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == ["run", "run.previous"]
    assert load_checkpoint(tmp_path / "link", kind="test") == ({}, {"step": 2})


@pytest.mark.parametrize(
    ("values", "meta"),
    [
        ({}, {1: "integer key"}),
        ({}, {"x": {1, 2}}),
        ({}, {"x": np.float64(1.0)}),
        ({}, {"x": torch.ones(1)}),
        ({"x": 1.0}, {}),
        ({1: torch.ones(1)}, {}),
        ({"x": torch.ones(1, dtype=torch.complex128)}, {}),
        ({"x": torch.ones(2).to_sparse()}, {}),
        ({"x": torch.ones(2, device="meta")}, {}),
        ({"__metadata__": torch.ones(2)}, {}),
    ],
)
def test_what_would_not_come_back_exactly_is_refused(tmp_path, values, meta):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "run", values, meta, kind="test")
    assert os.listdir(tmp_path) == []


# -- damage


@pytest.fixture
def two(tmp_path) -> Path:
    """A folder whose ``run`` holds step 2 and whose ``run.previous`` holds step 1."""
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", {"x": torch.full((50,), float(step))}, {"step": step}, kind="test")
    return tmp_path / "run"


def step_of(path: Path) -> int:
    found, meta = load_checkpoint(path, kind="test")
    assert (found["x"] == meta["step"]).all()
    return meta["step"]


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def damages(whole: bytes):
    yield "empty", b""
    yield from ((f"cut at {n}", whole[:n]) for n in (1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1))
    yield "longer", whole + b"\0"
    yield "zeros", bytes(len(whole))
    yield "text", b"step 2\n" * 100
    yield "pickle", pickle.dumps(Exploit())
    # a flipped bit in the length, the header, and the first and the last tensor byte
    for place in (0, 60, len(whole) - 200, len(whole) - 1):
        yield f"flipped at {place}", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


def test_damage_gives_way_to_the_previous_file(two, monkeypatch):
    monkeypatch.chdir(two.parent)
    whole = two.read_bytes()
    for name, content in damages(whole):
        two.write_bytes(content)
        with pytest.warns(SamplerWarning, match="previous"):
            assert step_of(two) == 1, name
        with pytest.raises(CheckpointError):
            load_checkpoint(two, kind="test", fallback=False)
    assert not Path("executed").exists()


def test_every_flipped_bit_is_seen(two):
    whole = two.read_bytes()
    start = int.from_bytes(whole[:8], "little") + 8
    for place in [*range(0, start, 13), *range(start, len(whole), 17)]:
        two.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            load_checkpoint(two, kind="test", fallback=False)


def test_both_damaged_is_an_error_that_names_both(two):
    for path in (two, two.with_name("run.previous")):
        path.write_bytes(b"gone")
    with pytest.raises(CheckpointError, match=r"run.*run\.previous.*[Dd]elete"):
        load_checkpoint(two, kind="test")


def test_damage_without_a_previous_file_is_an_error(tmp_path):
    (tmp_path / "run").write_bytes(b"gone")
    with pytest.raises(CheckpointError, match="truncated or is not a checkpoint"):
        load_checkpoint(tmp_path / "run", kind="test")


def test_a_missing_file_gives_way_to_the_previous_one(two):
    two.unlink()
    with pytest.warns(SamplerWarning, match="missing"):
        assert step_of(two) == 1
    assert load_checkpoint(two, kind="test", fallback=False) is None


def test_a_damaged_file_never_replaces_a_good_previous_one_first(two, monkeypatch):
    """At each rename of a save over a damaged file, one of the two names must lead to a good file."""
    two.write_bytes(b"gone")
    seen = []
    replace = os.replace

    def look(source, target):
        seen.append([_sound(two), _sound(two.with_name("run.previous"))])
        replace(source, target)
        seen.append([_sound(two), _sound(two.with_name("run.previous"))])

    monkeypatch.setattr(os, "replace", look)
    save_checkpoint(two, {"x": torch.full((50,), 3.0)}, {"step": 3}, kind="test")
    assert len(seen) == 4 and all(any(sound) for sound in seen)
    assert step_of(two) == 3


def _sound(path: Path) -> bool:
    try:
        return load_checkpoint(path, kind="test", fallback=False) is not None
    except CheckpointError:
        return False


def test_other_kinds_versions_and_programs_are_refused_even_with_a_good_previous_file(two):
    with pytest.raises(CheckpointError, match="kind 'test', not 'fit'"):
        load_checkpoint(two, kind="fit")
    whole = two.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for key, value, message in (("version", "2", "version 2"), ("format", "other", "another program")):
        changed = {**header, "__metadata__": {**header["__metadata__"], key: value}}
        text = json.dumps(changed).encode()
        two.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(two, kind="test")
    safetensors.torch.save_file({"x": torch.ones(1)}, two)
    two.with_name("run.previous").unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(two, kind="test")


# -- what stops a write


@pytest.mark.parametrize(
    ("name", "number", "advice"),
    [
        ("fsync", errno.ENOSPC, "free some space"),
        ("fsync", errno.EDQUOT, "free some space"),
        ("link", errno.ENOSPC, "free some space"),
        ("replace", errno.EACCES, "may not be written"),
        ("replace", errno.EROFS, "may not be written"),
        ("fsync", errno.EIO, "check the path"),
    ],
)
def test_a_refused_write_leaves_the_last_good_file_and_no_litter(two, monkeypatch, name, number, advice):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, refuse)
    with pytest.raises(CheckpointError, match=advice) as caught:
        save_checkpoint(two, {"x": torch.full((50,), 3.0)}, {"step": 3}, kind="test")
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.undo()
    assert sorted(os.listdir(two.parent)) == ["run", "run.previous"]
    assert step_of(two) == 2


def test_a_folder_that_may_not_be_written(two, monkeypatch):
    def refuse(path, mode="r", *rest):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "open", refuse, raising=False)
    with pytest.raises(CheckpointError, match="folder of yours"):
        save_checkpoint(two, {}, {"step": 3}, kind="test")
    monkeypatch.undo()
    assert step_of(two) == 2


def test_a_path_that_is_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(tmp_path, {}, {}, kind="test")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path, kind="test")


def test_a_disk_that_fills_up_in_the_middle_of_a_write(two):
    """A real short write: the kernel refuses the file's bytes beyond 20,000."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match="free some space"):
            save_checkpoint(two, {"x": torch.zeros(100_000)}, {"step": 3}, kind="test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(two.parent)) == ["run", "run.previous"]
    assert step_of(two) == 2


def test_a_file_system_without_hard_links(two, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(two, {"x": torch.full((50,), 3.0)}, {"step": 3}, kind="test")
    assert step_of(two) == 3
    assert step_of(two.with_name("run.previous")) == 2


# The child dies without any clean-up right before or after the k-th call of an operating system function.
_KILLED = """
import os, sys, torch
from inference.runtime.checkpoint import save_checkpoint
path = sys.argv[1]
outcomes = []
for after in (False, True):
    for k in range(100):
        save_checkpoint(path, {"x": torch.full((50,), 1.0)}, {"step": 1}, kind="test")
        save_checkpoint(path, {"x": torch.full((50,), 2.0)}, {"step": 2}, kind="test")
        child = os.fork()
        if child == 0:
            calls = 0
            def wrap(function):
                def run(*arguments, **keywords):
                    global calls
                    calls += 1
                    if calls == k + 1 and not after:
                        os._exit(9)
                    result = function(*arguments, **keywords)
                    if calls == k + 1:
                        os._exit(9)
                    return result
                return run
            for name in ("fsync", "link", "replace"):
                setattr(os, name, wrap(getattr(os, name)))
            save_checkpoint(path, {"x": torch.full((50,), 3.0)}, {"step": 3}, kind="test")
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        os.system(f"cp {path} {path}.{k}.{int(after)}; cp {path}.previous {path}.{k}.{int(after)}.previous")
        if not died:
            break
    outcomes.append(k)
print(*outcomes)
"""


def test_killed_at_every_point_of_a_write(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "run")],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    before, after = (int(count) for count in done.stdout.split())
    assert before == after == 5  # fsync of the file, link, two renames, fsync of the folder
    for when, kills in ((0, before), (1, after)):
        steps = [step_of(tmp_path / f"run.{k}.{when}") for k in range(kills + 1)]  # a warning would be an error
        assert steps == sorted(steps) and {2, 3} == set(steps)


def test_what_killed_processes_leave_is_removed_and_fresh_files_are_not(two):
    stale, fresh = (two.with_name(f".run.1-{name}.tmp") for name in ("stale", "fresh"))
    other = two.with_name(".other.1-stale.tmp")
    for path in (stale, fresh, other):
        path.write_bytes(b"half")
    long_ago = time.time() - 7200
    for path in (stale, other):
        os.utime(path, (long_ago, long_ago))
    save_checkpoint(two, {}, {}, kind="test")
    assert not stale.exists() and fresh.exists() and other.exists()


# -- fingerprints


@dataclass
class Config:
    a: int = 1


class Ab(enum.Enum):
    C = 1


class A(enum.Enum):
    bC = 1


def _objects():
    return [
        None, True, 1, 1.0, 1j, "1", b"1", -0.0, 0.0, float("nan"), "", (), {}, set(), Path("1"),
        (1, 2), (2, 1), (1, (2,)), ((1,), 2), ("ab", "c"), ("a", "bc"), {1: 2}, {2: 1}, {"1": 2}, {1, 2}, {(1, 2)},
        torch.float32, torch.float64, torch.device("cpu"), torch.device("cuda"),
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(1, 2), torch.zeros(2).double(), torch.zeros(2).int(),
        torch.tensor(0.0), torch.tensor([-0.0, 0.0]), torch.zeros(0), torch.zeros(0, 2), torch.zeros(2).bfloat16(),
        torch.zeros(1, dtype=torch.complex64), np.zeros(2), np.zeros(2, dtype=np.float32), np.float64(0.0), np.zeros(1),
        torch.optim.SGD, torch.optim.Adam, torch.relu, os.path.join, functools.partial(os.path.join, 1),
        functools.partial(os.path.join, 2), Config(), Config(2), Ab.C, A.bC,
    ]  # fmt: skip


def test_fingerprints_tell_apart():
    found = [fingerprint(value) for value in _objects()]
    assert len(set(found)) == len(found)
    assert fingerprint(1, 2) != fingerprint(2, 1) != fingerprint((2, 1))
    assert all(len(value) == 64 for value in found)


def test_fingerprints_agree_where_the_values_do():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) == fingerprint((1, 2))
    assert fingerprint({"x", "y", "z"}) == fingerprint({"z", "y", "x"})
    value = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(value.T) == fingerprint(value.T.contiguous())
    assert fingerprint(value) == fingerprint(torch.nn.Parameter(value))
    assert fingerprint(Config()) == fingerprint(Config(1))


def test_fingerprints_are_the_same_in_every_process():
    code = (
        "import torch; from inference.runtime.checkpoint import fingerprint;"
        "print(fingerprint({'x', 'y', 'z'}, {'b': 1, 'a': torch.arange(3.0)}, torch.optim.SGD, [1.5, None]))"
    )
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
        found.add(done.stdout.strip())
    found.add(fingerprint({"z", "y", "x"}, {"a": torch.arange(3.0), "b": 1}, torch.optim.SGD, (1.5, None)))
    assert len(found) == 1


@pytest.mark.parametrize(
    "value",
    [object(), torch.nn.Linear(1, 1), [object()], {"x": object()}, np.array([object()]), "x".join, iter([])],
    ids=["object", "module", "list", "dict", "array", "method", "iterator"],
)
def test_unknown_objects_have_no_fingerprint(value):
    with pytest.raises(TypeError, match="fingerprint"):
        fingerprint(value)


# -- nested state


def test_nested_state_comes_back_exactly(tmp_path):
    x = torch.ones(3)
    state = {
        "state": {0: {"step": torch.tensor(2.0), "old": [x, None, (x, 1.5)]}, 1: {}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1], "fused": None, "on": True}],
        "inf": float("inf"),
    }
    values, packed = flatten_state(state)
    save_checkpoint(tmp_path / "run", values, {"state": packed}, kind="test")
    values, meta = load_checkpoint(tmp_path / "run", kind="test")
    assert repr(unflatten_state(values, meta["state"])) == repr(state)


@pytest.mark.parametrize("value", [object(), {1.5: 2}, [lambda: None]], ids=["object", "float key", "function"])
def test_nested_state_refuses_what_it_cannot_hold(value):
    with pytest.raises(TypeError, match="state"):
        flatten_state(value)


@pytest.mark.parametrize("packed", [{"tensor": "x"}, {"other": []}, {}, {"list": 3}, {"dict": [1]}])
def test_an_unknown_layout_is_a_checkpoint_error(packed):
    with pytest.raises(CheckpointError, match="layout"):
        unflatten_state({}, packed)


def test_keys_that_read_like_paths_come_back() -> None:
    state = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 0: torch.full((1,), 5.0), "0": torch.full((1,), 6.0)}
    back = unflatten_state(*flatten_state(state))
    assert [float(v) for v in (back["a"]["b"], back["a.b"], back[0], back["0"])] == [0.0, 1.0, 5.0, 6.0]
