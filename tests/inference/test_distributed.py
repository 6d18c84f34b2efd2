"""Two processes under ``torchrun`` do what one does: the optimisation loop, its helpers, sweeps."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from inference._errors import CheckpointError
from inference.runtime import distributed
from inference.sweep import sweep
from tests.inference import rank_cases
from tests.inference.fit_cases import same
from tests.inference.ranks import torchrun

MODULE = rank_cases.__name__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What the cases left on the two ranks."""
    finished, found = torchrun(MODULE, "fit", folder)
    assert finished.returncode == 0, finished.stderr
    return found


# ---------------------------------------------------------------------- fit
@pytest.mark.parametrize("name", rank_cases.FITS)
def test_a_fit_on_two_ranks_is_that_of_one(ranks, name):
    """The sums of gradients differ in their order alone; wrong weights of unequal shards in the third digit."""
    alone = rank_cases.least_squares(name)
    first, second = (found[name] for found in ranks)
    assert same(first["state"], second["state"])
    for key in ("losses", "validation"):
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], alone[key], rtol=1e-9, atol=1e-12)
    assert (first["steps"], first["best"]) == (second["steps"], second["best"]) == (alone["steps"], alone["best"])
    torch.testing.assert_close(first["state"]["weight"], alone["state"]["weight"], rtol=1e-9, atol=1e-12)
    if name == "early stopping":
        assert first["steps"] < 400


def no_thread_outlives(folder):
    """One that still lets go of a tensor when the interpreter ends aborts the process: once in some fifteen jobs."""
    for rank in range(2):
        names = (folder / "threads" / str(rank)).read_text().split()
        assert names or not Path("/proc/self/task").exists()
        assert not any("gloo" in name for name in names)


def test_no_thread_of_the_group_outlives_the_interpreter(ranks, folder):
    no_thread_outlives(folder)


def test_all_ranks_start_from_rank_0(ranks):
    for found in ranks:
        assert same(found["different starts"], ranks[0]["minibatches"]["state"])


def test_objectives_draw_other_numbers_on_each_rank(ranks):
    assert not (ranks[0]["streams"] == ranks[1]["streams"]).any()
    assert torch.equal(ranks[0]["streams"], rank_cases.streams())  # rank 0 draws what one process does


def test_parameters_without_a_gradient(ranks):
    """An unused parameter stays as it is, weight decay or not; one that a single rank uses is learned on both."""
    values = ranks[0]["unused"]
    assert same(values, ranks[1]["unused"])
    # rows 1, decay 0.1: the gradient of ``all`` is 1, of ``one`` 1/2, as half the rows saw it
    after = {"all": 1.0, "one": 1.0}
    for _ in range(3):
        after = {"all": after["all"] * 0.99 - 0.1, "one": after["one"] * 0.99 - 0.05}
    assert values["none"] == 1.0
    assert {name: values[name].item() for name in after} == pytest.approx(after, rel=1e-12)


def test_an_interrupt_of_one_rank_ends_both_and_resumes_to_the_bit(ranks):
    first, second = (found["interrupt"] for found in ranks)
    assert first["stopped"]["interrupted"] and second["stopped"]["interrupted"]
    assert first["stopped"]["steps"] == second["stopped"]["steps"] < 40
    for found in (first, second):
        assert not found["resumed"]["interrupted"] and found["resumed"]["steps"] == 40
        assert same(found["resumed"]["state"], first["whole"]["state"])  # buffers included
        assert torch.equal(found["resumed"]["losses"], found["whole"]["losses"])
    assert all(found["after"] for found in ranks)  # the signals' handlers are as they were


def test_a_checkpoint_of_two_ranks_is_refused_by_one(ranks, folder):
    with pytest.raises(CheckpointError, match=r"different: ranks\)"):
        rank_cases.noisy(folder / "interrupt", rank_cases.never())


def test_errors_are_the_same_on_all_ranks(ranks):
    first, second = (found["errors"] for found in ranks)
    for name, pattern in {
        "nan": "NonFiniteError: the loss is nan and the gradient of parameter 'weight' is NaN or infinite in step 5",
        "data": "ValueError: the ranks were given different things (data)",
        "rows": "ValueError: 1 rows of a batch cannot be split over 2 ranks",
    }.items():
        assert first[name].startswith(pattern) and first[name] == second[name]
    assert first["barrier"].startswith("RankError: rank 1 did not come to the barrier within 0.05 s")


def test_a_loss_that_is_no_mean_is_pointed_out(ranks):
    (message,) = ranks[0]["warnings of sum"]
    assert "not a mean over rows" in message
    assert not ranks[1]["warnings of sum"]
    assert not any(found[f"warnings of {name}"] for found in ranks for name in ("mean", "per row"))


def test_rank_0_alone_reports(ranks):
    assert ranks[0]["reports"] and not ranks[1]["reports"]


def test_a_killed_rank_ends_the_job_and_the_next_attempt_resumes(tmp_path):
    """SIGKILL in an update; the rank that is left says who is gone, and torchrun's second attempt ends with the bits
    of an undisturbed run.
    """
    finished, found = torchrun(MODULE, "killed_fit", tmp_path, "--max-restarts=1")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "error").read_text().startswith("rank 1 of 2 gone")
    assert "RankError: rank 1 of 2 gone" in finished.stderr and "Run the same command again" in finished.stderr
    for rank in found:
        assert same(rank["resumed"]["state"], rank["whole"]["state"])
        assert torch.equal(rank["resumed"]["losses"], rank["whole"]["losses"])
        assert rank["calls"][0] <= rank["calls"][1] - 7  # it did not start afresh
    no_thread_outlives(tmp_path)  # here torch._dynamo was first imported when the group was there


# ---------------------------------------------------------------------- helpers
def test_helpers(ranks):
    first, second = (found["helpers"] for found in ranks)
    assert (first["shard"], second["shard"]) == ([0, 1, 2], [3, 4])
    assert first["sum"].tolist() == second["sum"].tolist() == [2.0, 11.0]
    assert first["rows"].tolist() == second["rows"].tolist() == [[False] * 2] * 2 + [[True] * 2] * 3
    assert first["main"].tolist() == [0, 1, 2, 1, 2, 3] and second["main"] is None
    assert first["plain"] == second["plain"] == {"a": [0, None, 0.1]}
    assert first["error"].startswith("ValueError: 1 chains cannot be split over 2 ranks")


def test_one_process_needs_no_group(monkeypatch):
    value = torch.ones(3)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.sum_over_ranks(value) is value and distributed.gather_rows(value) is value
    assert distributed.shard(3) == range(3) and distributed.broadcast_plain((1, 2)) == (1, 2)
    distributed.barrier(0.0)
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "1")  # one variable is no launcher
    assert distributed.rank() == 0


# ---------------------------------------------------------------------- sweeps
def run(scale: float, seed: int) -> tuple[float, int]:
    if scale == 0:
        raise ValueError("scale is zero")
    return 2 * scale, seed


CONFIGURATIONS = [{"scale": float(s)} for s in range(1, 5)]


def test_sweeps_through_any_map():
    joblib = pytest.importorskip("joblib")
    plain = sweep(run, CONFIGURATIONS, seed=3)
    assert [result for result, _ in plain] == [2.0, 4.0, 6.0, 8.0]
    assert len({seed for _, seed in plain}) == 4
    assert sweep(run, CONFIGURATIONS, seed=3, map=map) == plain
    parallel = joblib.Parallel(n_jobs=2, backend="threading")
    assert sweep(run, CONFIGURATIONS, seed=3, map=parallel) == plain
    wrapped = sweep(run, CONFIGURATIONS, seed=3, map=lambda f, jobs: parallel(joblib.delayed(f)(job) for job in jobs))
    assert wrapped == plain
    assert sweep(run, [{"scale": 1.0, "seed": 7}]) == [(2.0, 7)] and sweep(run, []) == []


def test_runs_of_a_sweep_and_their_errors_travel_between_processes():
    def send(value):
        return pickle.loads(pickle.dumps(value))

    def there_and_back(function, jobs):
        for job in jobs:
            try:
                yield send(send(function)(send(job)))
            except RuntimeError as error:
                raise send(error) from None

    assert sweep(run, CONFIGURATIONS[:2], map=there_and_back) == sweep(run, CONFIGURATIONS[:2])
    with pytest.raises(RuntimeError, match=r"configuration 1 of the sweep \(.*scale=0.0.*scale is zero"):
        sweep(run, [{"scale": 1.0}, {"scale": 0.0}], map=there_and_back)


def test_what_a_sweep_refuses(monkeypatch):
    with pytest.raises(RuntimeError, match=r"configuration 0 of the sweep \(seed=\d+, scale=0.0\) failed: ValueError"):
        sweep(run, [{"scale": 0.0}])
    with pytest.raises(TypeError, match="mappings of keyword arguments, got 3 at index 0"):
        sweep(run, [3])
    with pytest.raises(TypeError, match="function must be callable"):
        sweep(1, [])
    with pytest.raises(TypeError, match="map must be callable"):
        sweep(run, [], map=2)
    with pytest.raises(ValueError, match="0 results for 1 configurations"):
        sweep(run, CONFIGURATIONS[:1], map=lambda f, jobs: [])
    monkeypatch.setattr(
        os, "environ", {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": ""}
    )
    with pytest.raises(ValueError, match="map cannot be used under torchrun"):
        sweep(run, CONFIGURATIONS, map=map)
