"""The contract of every model: each test runs on each case of ``cases/``; a new model inherits all by being there."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import ppl_models
from inference import CheckpointError, ModelCheck
from inference.runtime.checkpoint import save_checkpoint
from ppl_models.base import Model
from tests.accelerator import fake_accelerator
from tests.arviz_versions import groups
from tests.contract.case import ModelCase, model_cases

CASES = model_cases()
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore::inference.SamplerWarning")  # runs this short have not mixed
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@lru_cache
def fitted(name: str) -> tuple[Model, Any]:
    """One fit a case, shared by the tests that only read it."""
    return next(case for case in CASES if case.name == name).fitted()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and torch.equal(a[n].nan_to_num(7e7), b[n].nan_to_num(7e7)) for n in a
    )


def run_process(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.contract.process", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_public_model_has_a_case() -> None:
    models = {
        value
        for name in ppl_models.__all__
        if isinstance(value := getattr(ppl_models, name), type) and issubclass(value, Model)
    }
    assert models == {type(case.build()) for case in CASES}


# ---------------------------------------------------------------- numbers
@every_model
def test_batch_is_loop(case: ModelCase) -> None:
    if case.rows is None:
        pytest.skip("no query of this model goes by rows")
    model, rows = fitted(case.name)[0], case.rows(torch.float32)
    for name, query in case.rowwise.items():
        batch = query(model, rows)
        loop = torch.cat([query(model, rows[i : i + 1]) for i in range(len(rows))])
        torch.testing.assert_close(
            batch, loop, rtol=case.tolerance, atol=case.tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_model
def test_answers_are_finite_and_of_the_dtype_of_the_data(case: ModelCase) -> None:
    for dtype in (torch.float32, torch.float64):
        model = fitted(case.name)[0] if dtype == torch.float32 else case.fitted(dtype=dtype)[0]
        for name, answer in case.answers(model).items():
            assert bool(torch.isfinite(answer).all()), f"{name} in {dtype}"
        if case.rows is not None and case.rows(dtype).is_floating_point():
            for name, query in case.rowwise.items():
                answer = query(model, case.rows(dtype))
                assert not answer.is_floating_point() or answer.dtype == dtype, f"{name}: {answer.dtype} from {dtype}"


def _parameters(model: nn.Module, without: tuple[str, ...] = ()) -> list[nn.Parameter]:
    named = model.named_parameters()
    parameters = [p for n, p in named if p.is_floating_point() and not (without and n.endswith(without))]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _prepared(case: ModelCase, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...], dict[str, Tensor]]:
    """What ``case.loss`` takes, in that precision; the module is a copy of the fitted one."""
    model = copy.deepcopy(fitted(case.name)[0]).to(dtype)
    latents = {n: x.to(dtype) if x.is_floating_point() else x for n, x in case.latents(model).items()}
    return case.pyro_model(model), case.call(model, case.data(dtype)), latents


@every_model
def test_single_precision_is_double_precision(case: ModelCase) -> None:
    values = []
    for dtype in (torch.float32, torch.float64):
        value = case.loss(*_prepared(case, dtype))
        assert value.dtype == dtype
        values.append(value.detach().double())
    torch.testing.assert_close(*values, rtol=case.tolerance, atol=case.tolerance)


@every_model
def test_gradient_is_the_difference(case: ModelCase) -> None:
    model, arguments, latents = _prepared(case, torch.float64)
    latents = {n: x for n, x in latents.items() if n not in case.simulated}
    parameters = _parameters(model, case.in_law)
    g = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
    gradients = torch.autograd.grad(case.loss(model, arguments, latents), parameters, allow_unused=True)
    used = [(p, v, s) for p, v, s in zip(parameters, directions, gradients, strict=True) if s is not None]
    slope = sum(float((v * s).sum()) for _, v, s in used)
    assert used and slope != 0.0
    values, step = [], 1e-7
    for sign in (1, -1):
        with torch.no_grad():
            for p, v, _ in used:
                p += sign * step * v
        values.append(float(case.loss(model, arguments, latents).detach()))
        with torch.no_grad():
            for p, v, _ in used:
                p -= sign * step * v
    # Central differences in float64: rounding eps |L| / step, a third derivative's step^2, and kinks of rectified units
    # within a step of the point, of which one of image_cate's counts for 1e-3 at 1e-6.
    rounding = 1e-16 * max(map(abs, values)) / step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e3 * rounding)


@every_model
def test_forward_and_backward_on_a_pretended_accelerator(case: ModelCase) -> None:
    if not case.accelerator:
        pytest.skip("its loss reads values back; see the model's own tests")
    model, arguments, latents = _prepared(case, torch.float32)
    with fake_accelerator() as device, pyro.validation_enabled(False):
        for module in model.modules():  # `Module.to` cannot swap fake tensors
            for key, value in module._parameters.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                    module._parameters[key] = nn.Parameter(empty, requires_grad=value.is_floating_point())
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        moved, there = tree_map_only(
            Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), (arguments, latents)
        )
        parameters = _parameters(model)
        loss = case.loss(model, moved, there)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        assert loss.device.type == device.type
        assert all(g.device.type == device.type for g in gradients if g is not None)


# ---------------------------------------------------------------- seeds, files, faults
@every_model
def test_same_seed_same_bits_and_another_seed_other_bits(case: ModelCase) -> None:
    """The second fit gets arrays and reports its progress to a function, neither of which must change it."""
    first = case.answers(fitted(case.name)[0])
    seen: list[dict[str, Any]] = []
    assert same(first, case.answers(case.fitted(progress=seen.append, arrays=True)[0]))
    assert seen and all({"step", "total"} <= fields.keys() for fields in seen)
    assert all(0 <= fields["step"] <= fields["total"] for fields in seen)
    assert same(first, case.answers(fitted(case.name)[0])), "a second fit or query changed the first model"
    assert not same(first, case.answers(case.fitted(seed=1)[0]))


@every_model
def test_saved_and_loaded_in_a_new_process_it_answers_the_same_bits(case: ModelCase, tmp_path: Path) -> None:
    model, _ = fitted(case.name)
    model.save(tmp_path / "model")
    run_process("load", case.name, str(tmp_path / "model"), str(tmp_path / "answers"))
    assert same(case.answers(model), torch.load(tmp_path / "answers", weights_only=True))
    type(model).load(tmp_path / "model").save(tmp_path / "again")
    assert same(case.answers(model), case.answers(type(model).load(tmp_path / "again")))


@every_model
def test_an_unfitted_model_can_be_saved(case: ModelCase, tmp_path: Path) -> None:
    model = case.build()
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    assert loaded.config() == model.config()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@every_model
def test_killed_in_the_middle_and_resumed_is_the_undisturbed_run(case: ModelCase, tmp_path: Path) -> None:
    if not case.resumes:
        pytest.skip("its fit takes no checkpoint")
    run_process("kill", case.name, str(tmp_path))
    whole, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "resumed"))
    assert same(whole["answers"], resumed["answers"])
    assert resumed["replacements"] < whole["replacements"], "the resumed run started afresh"


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.marker,)


@every_model
def test_damaged_hostile_and_foreign_files_are_refused(case: ModelCase, tmp_path: Path) -> None:
    model, path, marker = fitted(case.name)[0], tmp_path / "model", tmp_path / "executed"
    kind = type(model)
    with pytest.raises(FileNotFoundError):
        kind.load(path)
    model.save(path)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            kind.load(path)
    path.write_bytes(pickle.dumps(_Bomb(marker)))
    with pytest.raises(CheckpointError):
        kind.load(path)
    torch.save(_Bomb(marker), path)
    with pytest.raises(CheckpointError):
        kind.load(path)
    path.write_bytes(os.urandom(4096))
    with pytest.raises(CheckpointError):
        kind.load(path)
    assert not marker.exists()
    save_checkpoint(tmp_path / "other", {}, {}, kind="AnotherModel")
    with pytest.raises(CheckpointError, match="AnotherModel"):
        kind.load(tmp_path / "other")
    save_checkpoint(tmp_path / "odd", {}, {"config": {**model.config(), "command": "rm"}, "extra": {}}, kind=kind.kind)
    with pytest.raises(CheckpointError, match="command"):
        kind.load(tmp_path / "odd")


@every_model
def test_a_file_that_cannot_be_written_leaves_the_last_good_one(
    case: ModelCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = fitted(case.name)[0], tmp_path / "model"
    model.save(path)
    whole = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError):
        model.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == whole
    with pytest.raises(CheckpointError):
        model.save(path / "below" / "a file")


# ---------------------------------------------------------------- what a user sees
@every_model
def test_results_go_to_arviz(case: ModelCase, tmp_path: Path) -> None:
    arviz = pytest.importorskip("arviz")
    _, result = fitted(case.name)
    data = result.to_arviz()
    assert groups(data) and case.groups <= groups(data)
    data.to_netcdf(str(tmp_path / "result.nc"))
    if hasattr(arviz, "from_netcdf"):
        assert case.groups <= groups(arviz.from_netcdf(str(tmp_path / "result.nc")))


@every_model
def test_it_is_a_pyro_model_and_names_its_papers(case: ModelCase, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy.deepcopy(fitted(case.name)[0])
    data = case.data(torch.float32)
    check = model.check(*case.call(model, data))
    assert isinstance(check, ModelCheck) and check.sites
    assert len(vars(type(model)).get("papers", ())) or any(vars(b).get("papers") for b in type(model).__mro__)
    assert model.papers[0] in model.cite() and model.papers[0] in case.build().cite()
    assert isinstance(model.result, type(fitted(case.name)[1]))  # what the last fit returned stays at hand
    assert "@" in capsys.readouterr().out


def _spoiled(case: ModelCase) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Bad calls that make sense of every model: label, data, options."""
    data = case.data(torch.float32)
    for name, value in data.items():
        if name in case.not_finite:
            for bad in (float("nan"), float("inf")):
                broken = value.clone().view(-1)
                broken[min(7, len(broken) - 1)] = bad
                yield f"{name} with {bad}", {**data, name: broken.view(value.shape)}, {}
        if isinstance(value, Tensor):
            yield f"{name} empty", {**data, name: value[:0]}, {}
            yield f"{name} as text", {**data, name: "abc"}, {}
            yield f"{name} complex", {**data, name: value.to(torch.complex64)}, {}
    if "batch_size" in inspect.signature(case.build().fit).parameters:  # type: ignore[arg-type]
        yield "batch_size", data, {"batch_size": 1 + max(len(v) for v in data.values() if isinstance(v, Tensor))}
    yield "seed", data, {"seed": 0.5}
    yield "progress", data, {"progress": 3}


@every_model
def test_bad_input_is_refused_before_any_work(case: ModelCase) -> None:
    for label, data, options in _spoiled(case):
        model = case.build()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        settings: dict[str, Any] = {"seed": 0, "progress": False, **case.fit, **options}
        with pytest.raises((ValueError, TypeError)) as caught:
            model.fit(**data, **settings)  # type: ignore[operator]
            pytest.fail(f"{label} was accepted")
        argument = label.split()[0]
        assert argument.removesuffix("_train") in str(caught.value), f"{label}: {caught.value}"
        after = model.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before), f"{label} changed the model"
    for bad in case.bad:
        with pytest.raises(bad.error, match=bad.message):
            bad.call(case.build())
            pytest.fail(f"{bad.label} was accepted")


@every_model
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fits_and_answers_on_the_accelerator_as_on_the_processor(case: ModelCase) -> None:
    """Data on the device are all that it takes; what the fitted model answers there, its copy answers on the CPU."""
    moved = tree_map_only(Tensor, lambda x: x.to("cuda"), case.data(torch.float32))
    model = case.build()
    settings: dict[str, Any] = {"seed": 0, "progress": False, **case.fit}
    model.fit(**moved, **settings)  # type: ignore[operator]
    assert not [n for n, x in (*model.named_parameters(), *model.named_buffers()) if not x.is_cuda]
    if case.rows is None:
        return
    rows = case.rows(torch.float32)
    there = {name: query(model, rows.to("cuda")) for name, query in case.rowwise.items()}
    assert all(x.is_cuda for x in there.values())
    here = copy.deepcopy(model).to("cpu")
    for name, query in case.rowwise.items():
        torch.testing.assert_close(
            there[name].cpu(), query(here, rows), rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_model
def test_a_fitted_model_moves_with_its_posterior(case: ModelCase) -> None:
    """To a device without memory, which every machine has; draws that a model keeps are used beside its parameters."""
    model = copy.deepcopy(fitted(case.name)[0]).to("meta")
    held = [*model.parameters(), *model.buffers()]
    held += getattr(getattr(model, "result", None), "samples", {}).values()
    held += [x for x in getattr(model, "_data", None) or () if x.dim() > 1]  # times are read on the host
    assert not [x.shape for x in held if not x.is_meta]


@every_model
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_fitted_model_moves_to_the_accelerator(case: ModelCase) -> None:
    model = copy.deepcopy(fitted(case.name)[0]).to("cuda")
    for name, answer in case.answers(model).items():
        assert answer.is_cuda and bool(torch.isfinite(answer).all()), name
