"""The optimisation loop comes back exactly from kills, interrupts, NaNs, full disks and damaged files."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inference._errors import CheckpointError, NonFiniteError, SamplerWarning
from inference.fit import fit
from tests.inference import fit_cases
from tests.inference.fit_cases import (
    QUIET,
    LeastSquares,
    Noisy,
    Overshoot,
    overshoot,
    regression,
    same,
    state,
)

# -- non-finite values


class Bomb(nn.Module):
    """The gradient of ``second`` (or the loss, or the value) is NaN at one update."""

    def __init__(self, update: int, what: str = "gradient"):
        super().__init__()
        self.first = nn.Parameter(torch.ones(2))
        self.second = nn.Parameter(torch.ones(2))
        self.register_buffer("clock", torch.zeros((), dtype=torch.long))
        self.update, self.what = update, what

    def forward(self) -> Tensor:
        self.clock += 1
        loss = self.first.square().sum() + self.second.sum()
        struck = self.clock == self.update
        if self.what == "loss":
            return torch.where(struck, loss.detach() / 0.0, loss)
        link = self.second * 1.0
        link.register_hook(lambda gradient: torch.where(struck, math.nan, gradient))
        return loss + link.sum()


@pytest.mark.parametrize("update", [1, 2, 37, 150])
def test_a_nan_names_the_step_and_the_parameter_and_keeps_the_last_finite_ones(update):
    objective, reference = Bomb(update), Bomb(10**6)
    optimizer = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}
    with pytest.raises(NonFiniteError, match=rf"gradient of parameter 'second'.*step {update} of 150") as caught:
        fit(objective, num_steps=150, **optimizer, **QUIET)
    assert "'first'" not in str(caught.value)
    if update > 1:
        fit(reference, num_steps=update - 1, **optimizer, **QUIET)
    assert same(state(objective), state(reference))


def test_a_loss_that_is_infinite_with_finite_gradients():
    objective = Bomb(5, "loss")
    with pytest.raises(NonFiniteError, match=r"the loss is inf and every gradient is finite in step 5 of 20"):
        fit(objective, num_steps=20, **QUIET)


def test_a_value_that_overflows_in_the_update():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self) -> Tensor:
            return 1e30 * self.weight.sum()

    objective = Steep()
    with pytest.raises(NonFiniteError, match=r"parameter 'weight' became NaN or infinite in step 1 "):
        fit(objective, num_steps=20, optimizer=torch.optim.SGD, lr=1e20, **QUIET)
    assert objective.weight.item() == 0.0


def test_a_norm_that_overflows_when_clipping():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def forward(self) -> Tensor:
            return 1e30 * self.weight.sum()

    with pytest.raises(NonFiniteError, match="norm overflows"):
        fit(Steep(), num_steps=3, clip_norm=1.0, **QUIET)


def test_a_nan_that_does_not_come_again_is_still_an_error():
    class Moody(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self) -> Tensor:
            self.calls += 1
            return self.weight.sum() * (math.nan if self.calls == 7 else 1.0)

    with pytest.raises(NonFiniteError, match="depends on more than its tensors"):
        fit(Moody(), num_steps=20, **QUIET)


def test_a_nan_on_held_out_data_is_an_error():
    class Held(LeastSquares):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y) * (1.0 if self.training else math.nan)

    x, y = regression()
    with pytest.raises(NonFiniteError, match="validation loss after step 0 is NaN"):
        fit(Held(), (x, y), num_steps=3, validation=(x, y), **QUIET)


# -- interrupts and callbacks


class Interrupting(Noisy):
    """Raises in the middle of an update: after the gradients of some parameters are known."""

    def __init__(self, call: int):
        super().__init__()
        self.call, self.calls = call, 0
        self.second.register_hook(self._count)

    def _count(self, gradient: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt
        return gradient


def test_an_interrupt_keeps_whole_steps_and_can_be_resumed(tmp_path):
    x, y = regression(dtype=torch.float32)
    keywords = dict(num_steps=60, batch_size=7, lr=0.01, **QUIET)
    objective, shorter, reference = Interrupting(40), Noisy(), Noisy()
    result = fit(objective, (x, y), checkpoint=tmp_path / "run", **keywords)
    assert result.interrupted and 0 < result.num_steps < 40 and "interrupted" in result.summary()
    assert len(result.losses) == result.num_steps
    fit(shorter, (x, y), **{**keywords, "num_steps": result.num_steps})
    assert same(state(objective), state(shorter))
    objective.call = -1
    resumed = fit(objective, (x, y), checkpoint=tmp_path / "run", **keywords)
    whole = fit(reference, (x, y), **keywords)
    assert same(state(objective), state(reference)) and torch.equal(resumed.losses, whole.losses)
    assert not resumed.interrupted


def test_an_interrupt_from_the_callback():
    def stop(fields):
        if fields["step"] > 3:
            raise KeyboardInterrupt

    result = fit(LeastSquares(), regression(), num_steps=10_000, progress=stop)
    assert result.interrupted and 3 < result.num_steps < 100


def test_callbacks_see_the_run_and_cannot_stop_it():
    x, y = regression()
    seen = []
    fit(LeastSquares(), (x, y), num_steps=30, lr=0.5, validation=(x, y), validate_every=10, progress=seen.append)
    steps = [fields["step"] for fields in seen]
    assert steps == sorted(set(steps)) and {10, 20, 30} <= set(steps)
    assert all(fields["total"] == 30 and fields["learning_rate"] == 0.5 for fields in seen)
    assert all(math.isfinite(fields["loss"]) and math.isfinite(fields["validation_loss"]) for fields in seen)

    def fail(fields):
        raise RuntimeError("mine")

    with pytest.warns(SamplerWarning, match="mine"):
        assert fit(LeastSquares(), (x, y), num_steps=30, progress=fail).num_steps == 30


def test_one_line_of_progress(capfd):
    fit(LeastSquares(), regression(), num_steps=30)
    out, err = capfd.readouterr()
    assert out == "" and "30/30" in err and "loss=" in err and "learning_rate=" in err


# -- checkpoints

# Each case is killed at several points and resumed; nothing in the parent runs torch's autograd, so that it may fork.
_KILLS = """
import importlib.util, os, signal, sys, torch
import torch._dynamo  # optimisers import it at their first step: once here is faster than in each child
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
folder = sys.argv[2]

def in_child(function):
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for name in cases.RESUMES:
    assert in_child(lambda: cases.run_and_save(name, f"{folder}/{name}.whole", None)) == 0
    for kill in cases.KILLS:
        path = f"{folder}/{name}.{kill}.run"
        code = in_child(lambda: cases.run_killed(name, path, kill))
        assert code == -signal.SIGKILL, (name, kill, code)
        assert in_child(lambda: cases.run_and_save(name, f"{folder}/{name}.{kill}", path)) == 0, (name, kill)
"""


def test_killed_and_resumed_is_the_uninterrupted_run_to_the_bit(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _KILLS, fit_cases.__file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in fit_cases.RESUMES:
        values, histories, calls = torch.load(tmp_path / f"{name}.whole")
        for kill in fit_cases.KILLS:
            resumed, theirs, remaining = torch.load(tmp_path / f"{name}.{kill}")
            assert same(values, resumed), (name, kill)
            assert histories[4] == theirs[4], (name, kill)
            assert all(torch.equal(a, b) for a, b in zip(histories[:4], theirs[:4], strict=True)), (name, kill)
            # a run that started afresh would give the same bits; past the first save it must not have
            assert remaining < calls - 8 or kill in (2, 18), (name, kill)


@pytest.fixture
def halfway(tmp_path):
    """A checkpoint with a previous one, of a run that stopped in the middle."""
    objective = Interrupting(50)
    x, y = regression(dtype=torch.float32)
    keywords = dict(num_steps=60, batch_size=7, checkpoint=tmp_path / "run", checkpoint_every=10, **QUIET)
    assert fit(objective, (x, y), **keywords).interrupted
    return (x, y), keywords


def test_a_truncated_checkpoint_gives_way_to_the_previous_one(halfway):
    data, keywords = halfway
    path = keywords["checkpoint"]
    os.truncate(path, os.path.getsize(path) // 2)
    objective, reference = Interrupting(-1), Noisy()
    with pytest.warns(SamplerWarning, match="damaged"):
        resumed = fit(objective, data, **keywords)
    whole = fit(reference, data, **{**keywords, "checkpoint": None})
    assert torch.equal(resumed.losses, whole.losses) and same(state(objective), state(reference))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "settings"),
        ({"num_steps": 61}, "settings"),
        ({"batch_size": 8}, "settings"),
        ({"clip_norm": 1.0}, "settings"),
        ({"lr": 0.5}, "optimizer"),
        ({"optimizer": torch.optim.SGD}, "optimizer"),
        ({"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3)}, "scheduler"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_a_checkpoint_of_another_run_is_refused(halfway, change, named):
    data, keywords = halfway
    before = Path(keywords["checkpoint"]).read_bytes()
    objective = Interrupting(-1)
    start = state(objective)
    with pytest.raises(CheckpointError, match=rf"another run \(different: .*{named}"):
        fit(objective, data, **{**keywords, **change})
    assert same(state(objective), start) and Path(keywords["checkpoint"]).read_bytes() == before


def test_other_data_or_another_objective_is_another_run(halfway):
    (x, y), keywords = halfway
    with pytest.raises(CheckpointError, match=r"different: data\)"):
        fit(Interrupting(-1), (x, y + 1e-6), **keywords)
    with pytest.raises(CheckpointError, match=r"different: objective\)"):
        fit(Noisy(), (x, y), **keywords)


def test_a_finished_run_is_not_run_again(tmp_path):
    objective = Overshoot()
    first = overshoot(objective, patience=3, checkpoint=tmp_path / "run")
    again = Overshoot()
    second = overshoot(again, patience=3, checkpoint=tmp_path / "run")
    assert same(state(objective), state(again)) and torch.equal(first.losses, second.losses)
    assert (second.stopped_early, second.num_steps, second.best_step) == (True, 25, 10)


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    """The run stops with advice, and what the last good file holds resumes to the same bits."""
    x, y = regression(dtype=torch.float32)
    keywords = dict(num_steps=60, batch_size=7, checkpoint=tmp_path / "run", checkpoint_every=10, **QUIET)
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="free some space"):
        fit(Noisy(), (x, y), **keywords)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["run", "run.previous"]
    objective, reference = Noisy(), Noisy()
    resumed = fit(objective, (x, y), **keywords)
    whole = fit(reference, (x, y), **{**keywords, "checkpoint": None})
    assert torch.equal(resumed.losses, whole.losses) and same(state(objective), state(reference))


def test_a_checkpoint_that_cannot_be_written_is_known_before_the_first_step(tmp_path):
    objective = LeastSquares()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        fit(objective, regression(), num_steps=3, checkpoint=tmp_path / "file" / "run", **QUIET)
    assert (objective.weight == 0).all()
