"""Chains split over two processes are the chains of one: draws, files, ends."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from inference import Stop
from inference._errors import CheckpointError
from tests.inference import rank_chains
from tests.inference.ranks import ROOT, torchrun


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """The folder, what the cases left on the two ranks, and what was printed."""
    folder = tmp_path_factory.mktemp("chains")
    finished, found = torchrun(rank_chains.__name__, "chains", folder)
    assert finished.returncode == 0, finished.stderr
    return folder, found, finished.stdout


@pytest.fixture(scope="module")
def ranks(job) -> list[dict[str, Any]]:
    return job[1]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], own: slice) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Sums over chains differ in their order alone. Noise that two ranks share, or adaptation that is not pooled,
        # differs in the first digit.
        torch.testing.assert_close(found[name], value[own], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", rank_chains.KERNELS)
def test_two_ranks_of_two_chains_are_one_of_four(job, name):
    folder, (first, second), _ = job
    alone = rank_chains.chains(name)
    expected = rank_chains.draws(alone)
    assert (first[name]["chains"], second[name]["chains"]) == ([0, 1, 2, 3], [2, 3])
    assert_close(first[name]["draws"], expected, slice(0, 4))
    assert_close(second[name]["draws"], expected, slice(2, 4))
    assert first[name]["gradients"] == second[name]["gradients"] == alone.num_gradients
    assert all(len((value[0] != value[3]).nonzero()) for value in list(expected.values())[:1])  # chains differ
    shards = [sorted(path.name for path in (folder / name / f"rank_{r}_of_2").glob("*")) for r in range(2)]
    assert shards[0] == shards[1] and {"draws_000.npy", "state.safetensors"} <= set(shards[0])


def test_uneven_shards(ranks):
    expected = rank_chains.draws(rank_chains.uneven())
    assert_close(ranks[0]["uneven"], expected, slice(0, 5))
    assert_close(ranks[1]["uneven"], expected, slice(3, 5))


def test_rank_0_sees_all_chains_and_alone_prints(job):
    _, (first, second), printed = job
    assert first["diagnostics"]["acceptance rate"] == [f"chain {c}" for c in range(5)]
    assert second["diagnostics"]["acceptance rate"] == second["diagnostics"]["divergences"] == ["chain 3", "chain 4"]
    assert (first["arviz"]["chain"], second["arviz"]["chain"]) == (5, 2)
    assert printed.count("5 chains of 15 draws") == 1 and "2 chains of" not in printed
    assert first["reports"] and not second["reports"]


def test_an_interrupt_of_one_rank_ends_both(ranks):
    """By a signal, and by a hook that raises; both hold as many draws, and rank 0 says so."""
    first, second = (rank["interrupts"] for rank in ranks)
    assert first == second
    assert all(interrupted and 0 < drawn < 300 for interrupted, drawn in first)
    assert len(ranks[0]["warnings"]) == 2 and not ranks[1]["warnings"]


def test_a_criterion_ends_both_by_the_draws_of_all(ranks):
    alone = rank_chains.chains("sghmc", num_samples=600, stop=Stop(ess=1, least=20))
    draws = alone.get_samples(group_by_chain=True)["w"].shape[1]
    assert draws < 600
    for rank, own in zip(ranks, (4, 2), strict=True):
        reason, shape = rank["stopped"]
        assert reason == alone.stopped and tuple(shape[:2]) == (own, draws)


def test_errors_are_the_same_on_all_ranks(ranks):
    for rank in ranks:
        errors = rank["errors"]
        assert errors["chains"].startswith("ValueError: 1 chains cannot be split over 2 ranks")
        assert errors["data"].startswith("ValueError: the ranks were given different things (data)")
        assert errors["streaming"].startswith("ValueError: StreamingMCMC does not merge statistics over 2 ranks")
        assert errors["lost"].startswith("NonFiniteError: every chain had become non-finite")


def test_another_number_of_ranks_is_refused(job):
    with pytest.raises(CheckpointError, match=r"holds a run of 2 process\(es\) and this job has 1: start as many"):
        rank_chains.chains("hmc", checkpoint=job[0] / "hmc")


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    finished = subprocess.run(
        [sys.executable, "-m", rank_chains.__name__, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr
    for name, (_, killed) in rank_chains.KILLS.items():
        assert (tmp_path / f"{name}.error").read_text().startswith(f"rank {killed} of 2 gone")
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}.rank{rank}.pt")
            assert found["draws"].keys() == found["whole"].keys()
            assert all(torch.equal(found["draws"][n], value) for n, value in found["whole"].items()), (name, rank)
            assert 0 < found["steps"] < 40 + rank_chains.DRAWS[name]  # it did not start afresh
