"""The driver: Pyro's interface, seeds, resume to the bit, faults, calibration."""

import math
import multiprocessing
import time
from types import SimpleNamespace

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from inference import HMC, MCMC, NUTS, SGHMC, SGLD, AdaptiveSGHMC, CheckpointError, NonFiniteError, SamplerWarning
from inference.kernels.base import Noise
from inference.runtime.generators import ChainGenerators
from inference.runtime.streams import Streams
from tests.arviz_versions import elpd
from tests.inference import zoo

# Runs this short of a funnel-like posterior diverge now and then, and the driver says so; the tests of that warning
# ask for it by name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*transitions diverged:inference.SamplerWarning", "ignore:Encountered .inf:UserWarning"
)

F64 = torch.float64
SCHOOLS = zoo.CONTINUOUS["eight_schools"]


def minibatch_model(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("n", len(x), subsample_size=10) as i:
        pyro.sample("y", dist.Normal(x[i] @ w, 1.0), obs=y[i])


def run(kernel, *args, **options):
    settings = {"num_samples": 20, "warmup_steps": 20, "num_chains": 3, "progress": False, **options}
    return MCMC(kernel, **settings).run(*args)


def assert_same(a: MCMC, b: MCMC) -> None:
    left, right = a.get_samples(group_by_chain=True), b.get_samples(group_by_chain=True)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    for name in a.sample_stats:
        assert torch.equal(a.sample_stats[name], b.sample_stats[name]), name


# ---------------------------------------------------------------------- Pyro's interface
@pytest.mark.changes_globals("rng")  # by arviz.from_pyro, which runs the model
def test_a_program_written_for_pyro():
    """Positional arguments, names and shapes of pyro.infer.MCMC; arviz.from_pyro takes the object."""
    kernel = HMC(
        SCHOOLS[0], step_size=0.3, num_steps=5, adapt_step_size=True, jit_compile=True, ignore_jit_warnings=True
    )
    mcmc = MCMC(kernel, 30, 40, None, 2, disable_progbar=True)
    mcmc.run(*SCHOOLS[1])
    assert mcmc.get_samples()["eta"].shape == (60, 8) and mcmc.get_samples(group_by_chain=True)["mu"].shape == (2, 30)
    assert mcmc.get_samples(7)["tau"].shape == (7,) and bool((mcmc.get_samples()["tau"] > 0).all())
    diagnostics = mcmc.diagnostics()
    assert set(diagnostics["eta"]) == {"n_eff", "r_hat"} and set(diagnostics["divergences"]) == {"chain 0", "chain 1"}
    assert 0 < diagnostics["acceptance rate"]["chain 0"] <= 1
    if hasattr(arviz, "from_pyro"):
        data = arviz.from_pyro(mcmc, log_likelihood=False)
        assert data.posterior["eta"].shape == (2, 30, 8) and data.sample_stats["diverging"].shape == (2, 30)


def test_summary_prints_a_table(capsys):
    table = run(HMC(SCHOOLS[0], num_steps=4), *SCHOOLS[1]).summary()
    assert "eta[7]" in capsys.readouterr().out and table["mu"]["r_hat"].shape == ()


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")  # one school's is near the limit of 0.7
def test_to_arviz_holds_what_loo_needs():
    mcmc = run(HMC(SCHOOLS[0], num_steps=8), *SCHOOLS[1], num_samples=100, warmup_steps=100, num_chains=16)
    data = mcmc.to_arviz(dims={"eta": ["school"]}, coords={"school": list("ABCDEFGH")})
    assert data["posterior"]["eta"].dims == ("chain", "draw", "school")
    assert data["log_likelihood"]["y"].shape[:2] == (16, 100)
    assert -33 < elpd(arviz.loo(data)) < -28  # the data's published value is near -30.7
    assert {"lp", "diverging", "acceptance_rate"} <= set(data["sample_stats"].data_vars)


def test_hook_sees_every_step():
    seen = []
    run(
        HMC(SCHOOLS[0], num_steps=2),
        *SCHOOLS[1],
        num_samples=3,
        warmup_steps=2,
        hook_fn=lambda kernel, values, stage, i: seen.append((stage, i, values["eta"].shape)),
    )
    assert [s[:2] for s in seen] == [("Warmup", 0), ("Warmup", 1), ("Sample", 0), ("Sample", 1), ("Sample", 2)]
    assert seen[0][2] == (3, 8)


@pytest.mark.filterwarnings("ignore:the chains have not mixed:inference.SamplerWarning")
def test_save_params_and_thinning():
    mcmc = run(HMC(SCHOOLS[0], num_steps=3), *SCHOOLS[1], save_params=["mu"], thin=4)
    assert set(mcmc.get_samples()) == {"mu"}
    every = run(HMC(SCHOOLS[0], num_steps=3), *SCHOOLS[1], num_samples=80)
    assert torch.equal(
        mcmc.get_samples(group_by_chain=True)["mu"], every.get_samples(group_by_chain=True)["mu"][:, 3::4]
    )
    with pytest.raises(ValueError, match="save_params names sites"):
        run(HMC(SCHOOLS[0]), *SCHOOLS[1], save_params=["nu"])


def test_potential_fn_with_initial_params():
    kernel = HMC(potential_fn=lambda z: 0.5 * ((z["a"] - 3) ** 2).sum() / 4, num_steps=6)
    mcmc = run(
        kernel, num_samples=500, warmup_steps=200, num_chains=8, initial_params={"a": torch.zeros(8, 2, dtype=F64)}
    )
    draws = mcmc.get_samples()["a"]
    # 4,000 draws of N(3, 4), nearly independent: standard errors 0.03 and 0.02
    assert draws.mean(0).sub(3).abs().max() < 0.15 and draws.std(0).sub(2).abs().max() < 0.1


@pytest.mark.parametrize(("given", "drawn"), [((3,), (3,)), ((1, 3), (3,)), ((1, 1, 3), (1, 3)), ((), ())])
def test_one_chain_of_a_potential_fn_may_leave_out_the_dimension_of_chains(given, drawn):
    start = {"a": torch.zeros(given, dtype=F64)}
    kernel = HMC(potential_fn=lambda z: 0.5 * z["a"].square().sum(), num_steps=3)
    draws = MCMC(kernel, 5, 5, initial_params=start, progress=False).run().get_samples()["a"]
    assert draws.shape == (5, *drawn)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_potential_that_pyro_made_is_recorded(jit_compile: bool) -> None:
    """The pattern of Pyro's baseball example: Beta and Uniform read values back where validation is on."""

    def model(at_bats, hits):
        share = pyro.sample("share", dist.Uniform(0.0, 1.0))
        with pyro.plate("player", len(hits)):
            chance = pyro.sample("chance", dist.Beta(10 * share, 10 * (1 - share)))
            pyro.sample("hits", dist.Binomial(at_bats, chance), obs=hits)

    data = torch.tensor([20.0, 20.0]), torch.tensor([5.0, 15.0])
    with torch.random.fork_rng(devices=[]):
        start, potential_fn, transforms, _ = pyro.infer.mcmc.util.initialize_model(
            model, data, num_chains=2, jit_compile=jit_compile, skip_jit_warnings=True
        )
    kernel = NUTS(potential_fn=potential_fn)
    mcmc = run(kernel, num_samples=5, warmup_steps=5, num_chains=2, initial_params=start, transforms=transforms)
    assert mcmc.potential.captured
    assert ((mcmc.get_samples()["chance"] > 0) & (mcmc.get_samples()["chance"] < 1)).all()


# ---------------------------------------------------------------------- randomness
def test_a_chains_noise_does_not_depend_on_its_company():
    alone = ChainGenerators(5, [3]).normal(7, 11, F64)
    together = ChainGenerators(5, range(64)).normal(7, 11, F64)
    assert torch.equal(alone[:, 0], together[:, 3])
    sixteen = run(SGLD(zoo.logistic, step_size=0.01), zoo.X, zoo.BINARY, num_chains=16).get_samples(
        group_by_chain=True
    )["w"]
    four = run(SGLD(zoo.logistic, step_size=0.01), zoo.X, zoo.BINARY, num_chains=4, chunk_size=3).get_samples(
        group_by_chain=True
    )["w"]
    torch.testing.assert_close(four, sixteen[:4], rtol=1e-9, atol=1e-9)


def test_noise_does_not_depend_on_how_steps_are_grouped():
    """Windows of any length get the rows that one block would; so do those after a checkpoint in the middle."""
    spec = Noise(normal=3, uniform=1, gamma=torch.tensor([0.5, 2.0], dtype=F64))
    potential = SimpleNamespace(dtype=F64, device=torch.device("cpu"), plates={})
    streams = [Streams(1, range(4), spec, potential, "shared") for _ in range(3)]
    first, second = streams[0].noise(128), streams[0].noise(128)
    whole = {n: torch.cat([first[n], second[n]]) for n in first}
    memory = {"normal": torch.zeros(128, 4, 3, dtype=F64)}
    parts = [streams[1].noise(n, memory) for n in (8, 40, 5, 100)]
    streams[2].load_state_dict(streams[1].state_dict())
    parts.append(streams[2].noise(103))
    for name, rows in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), rows)
    assert not memory["normal"].any()  # used by whole blocks alone
    assert streams[2].noise(128, memory)["normal"].data_ptr() == memory["normal"].data_ptr()
    assert torch.equal(memory["normal"], streams[0].noise(128)["normal"])


@pytest.mark.parametrize(("size", "batch"), [(6, 3), (6, 6), (70, 35), (1, 1)])
def test_minibatches_are_uniform_subsets(size, batch):
    """Each as often as any other: the one subset, all twenty of three of six, or the pairs of larger ones."""
    drawn = ChainGenerators(2, range(2)).indices(4000, size, batch)
    assert drawn.shape == (4000, 2, batch)
    members = torch.zeros(8000, size).scatter_(1, drawn.flatten(0, 1), 1.0)
    assert (members.sum(1) == batch).all()
    if batch < size <= 6:
        counts = torch.unique(members, dim=0, return_counts=True)[1]
        assert len(counts) == math.comb(size, batch)
        assert stats.chisquare(counts.numpy()).pvalue > 0.01
    pairs = members.T @ members / 8000
    expected = torch.full_like(pairs, batch * (batch - 1) / max(1, size * (size - 1))).fill_diagonal_(batch / size)
    assert ((pairs - expected).abs() <= 5 * (expected * (1 - expected) / 8000).sqrt() + 1e-6).all()
    alone = ChainGenerators(2, [1]).indices(4000, size, batch)
    assert torch.equal(alone[:, 0], drawn[:, 1])


def test_same_seed_same_bits_other_seed_other_draws():
    kernel = AdaptiveSGHMC(minibatch_model)
    a, b = run(kernel, zoo.X, zoo.Y, seed=4), run(kernel, zoo.X, zoo.Y, seed=4)
    assert_same(a, b)
    assert not torch.equal(a.get_samples()["w"], run(kernel, zoo.X, zoo.Y, seed=5).get_samples()["w"])


def test_capture_changes_no_draw():
    """The captured graph and the model itself, chain by chain, make the same chain to rounding."""
    captured = run(HMC(SCHOOLS[0], num_steps=3), *SCHOOLS[1])
    loop = run(HMC(SCHOOLS[0], num_steps=3), *SCHOOLS[1], capture=False)
    for name, value in captured.get_samples().items():
        torch.testing.assert_close(value, loop.get_samples()[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("minibatch", ["shared", "per_chain"])
def test_minibatches_are_shared_or_not(minibatch):
    """Chains that start together and draw no noise stay together only if they see the same minibatches."""
    from inference import CyclicalSchedule

    silent = SGHMC(minibatch_model, step_size=CyclicalSchedule(0.05, 1, exploration=0.99), friction=0.5)
    start = {"w": torch.zeros(3, 3, dtype=F64)}
    mcmc = (
        run(
            silent,
            zoo.X,
            zoo.Y,
            num_samples=1,
            warmup_steps=0,
            minibatch=minibatch,
            initial_params=start,
            hook_fn=lambda k, v, s, i: values.append(v["w"].clone()),
        )
        if (values := []) is not None
        else None
    )
    assert mcmc is not None
    # To rounding: a batched product may round its chains differently.
    same = torch.allclose(values[50], values[50][0], rtol=0.0, atol=1e-9)
    assert same == (minibatch == "shared")


# ---------------------------------------------------------------------- faults
def _resumable(kind, folder, reports):
    """What a process runs; it tells ``reports`` each step, if there is one, and waits for leave to go on."""
    torch.set_num_threads(1)
    if kind == "hmc":
        kernel, args = HMC(zoo.eight_schools, num_steps=4), zoo.CONTINUOUS["eight_schools"][1]
    else:
        kernel, args = AdaptiveSGHMC(minibatch_model), (zoo.X, zoo.Y)

    def progress(event):
        if reports is not None:
            reports.send(event["step"])
            reports.recv()

    # Three blocks of 128 steps after the warm-up's windows.
    options = {"num_chains": 3, "thin": 2, "checkpoint": folder, "checkpoint_every": 0.0, "progress": progress}
    mcmc = MCMC(kernel, 150, 100, **options).run(*args)
    torch.save({**mcmc.get_samples(group_by_chain=True), **mcmc.sample_stats}, folder / "result.pt")


@pytest.mark.parametrize("kind", ["hmc", "sghmc"])
def test_killed_and_resumed_equals_uninterrupted(kind, tmp_path):
    """SIGKILL in the warm-up and again among the draws; the third process finishes with the bits of an undisturbed
    run.
    """
    context = multiprocessing.get_context("forkserver")  # which imports once for all
    context.set_forkserver_preload(["tests.inference.test_mcmc"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def finish(folder):
        process = context.Process(target=_resumable, args=(kind, folder, None))
        process.start()
        process.join(300)
        assert process.exitcode == 0

    finish(whole)
    last = 0
    for threshold in (50, 250):
        here, there = context.Pipe()
        process = context.Process(target=_resumable, args=(kind, cut, there))
        process.start()
        there.close()
        while (step := here.recv()) < threshold:
            assert step >= last  # it goes on, and does not start afresh
            here.send(True)
        here.send(True)  # it may be in its next block, or writing, when it dies
        time.sleep(0.02)
        process.kill()
        process.join()
        last = step
    assert step < 400
    finish(cut)
    whole, resumed = torch.load(whole / "result.pt"), torch.load(cut / "result.pt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_checkpoint_of_another_run_is_refused_and_a_finished_one_is_read(tmp_path):
    options = {"checkpoint": tmp_path, "checkpoint_every": 0.0}
    first = run(SGLD(minibatch_model, step_size=0.01), zoo.X, zoo.Y, **options)
    again = run(SGLD(minibatch_model, step_size=0.01), zoo.X, zoo.Y, **options)
    assert_same(first, again)

    def tighter(x, y):
        with pyro.poutine.scale(scale=2.0):
            minibatch_model(x, y)

    tighter.__qualname__ = minibatch_model.__qualname__
    for kernel, args, other in (
        (SGLD(tighter, step_size=0.01), (zoo.X, zoo.Y), {}),
        (SGLD(minibatch_model, step_size=0.02), (zoo.X, zoo.Y), {}),
        (SGLD(minibatch_model, step_size=0.01), (zoo.X, zoo.Y + 1), {}),
        (SGLD(minibatch_model, step_size=0.01), (zoo.X, zoo.Y), {"seed": 9}),
    ):
        with pytest.raises(CheckpointError, match="other settings, data or model"):
            run(kernel, *args, **options, **other)


def test_a_run_that_kept_other_sites_is_not_gone_on_with(tmp_path):
    """Columns are found by their place: a would have been taken for b."""

    def two():
        pyro.sample("a", dist.Normal(torch.tensor(10.0, dtype=F64), 1.0))
        pyro.sample("b", dist.Normal(torch.tensor(-10.0, dtype=F64), 1.0))

    for kept in (["a"], ["a", "b"]):
        folder = tmp_path / "".join(kept)
        run(HMC(two, num_steps=3), save_params=kept, checkpoint=folder)
        for other in (kept[::-1], ["b"], None):
            if other != kept and not (other is None and kept == ["a", "b"]):
                with pytest.raises(CheckpointError, match="keeps the sites"):
                    run(HMC(two, num_steps=3), save_params=other, checkpoint=folder)


def test_a_truncated_checkpoint_falls_back_and_a_hostile_one_is_refused(tmp_path):
    options = {"checkpoint": tmp_path, "checkpoint_every": 0.0}
    kernel = AdaptiveSGHMC(minibatch_model)
    first = run(kernel, zoo.X, zoo.Y, **options)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(match="previous"):
        assert_same(first, run(kernel, zoo.X, zoo.Y, **options))
    for file in tmp_path.glob("state*"):
        file.write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(CheckpointError):
        run(kernel, zoo.X, zoo.Y, **options)


def test_interrupt_keeps_what_there_is():
    def stop(event):
        if event["step"] >= 200:
            raise KeyboardInterrupt

    with pytest.warns(SamplerWarning, match="interrupted"):
        mcmc = run(SGLD(minibatch_model, step_size=0.01), zoo.X, zoo.Y, num_samples=1000, progress=stop)
    assert mcmc.interrupted and 100 < mcmc.get_samples(group_by_chain=True)["w"].shape[1] < 1000


def test_lost_chains_are_named_and_losing_all_raises():
    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        pyro.factor("cliff", torch.where(z > 50, torch.nan, -0.1) * z**4)

    start = {"z": torch.tensor([0.0, 30.0], dtype=F64)}
    with pytest.warns(SamplerWarning, match=r"chains \[1\] became non-finite"):
        run(SGLD(model, step_size=0.05), num_chains=2, initial_params=start)
    with pytest.raises(NonFiniteError, match="every chain"):
        run(SGLD(model, step_size=0.05), num_chains=2, initial_params={"z": start["z"] + 30 * (1 - start["z"] / 30)})


def test_metropolis_refuses_minibatches():
    with pytest.raises(ValueError, match="plate 'n' is subsampled"):
        run(HMC(minibatch_model), zoo.X, zoo.Y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be an integer"),
        ({"num_chains": True}, TypeError, "num_chains must be an integer"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps"),
        ({"thin": 0}, ValueError, "thin"),
        ({"minibatch": "some"}, ValueError, "minibatch"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"compile": "maybe"}, ValueError, "compile"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"initial_params": {"mu": torch.zeros(3)}}, ValueError, "missing"),
        (
            {"initial_params": {"mu": torch.zeros(2), "tau": torch.zeros(2), "eta": torch.zeros(2, 8)}},
            ValueError,
            "hold 2 chains",
        ),
        (
            {"initial_params": {"mu": torch.full((3,), torch.nan), "tau": torch.zeros(3), "eta": torch.zeros(3, 8)}},
            ValueError,
            "not finite",
        ),
    ],
)
def test_bad_settings_are_named(options, error, message):
    with pytest.raises(error, match=message):
        run(HMC(SCHOOLS[0]), *SCHOOLS[1], **options)


def test_kernels_of_pyro_and_early_questions_get_an_answer():
    with pytest.raises(TypeError, match="kernel of this library"):
        MCMC(pyro.infer.NUTS(SCHOOLS[0]), 10)
    with pytest.raises(RuntimeError, match=r"call run\(...\) first"):
        MCMC(HMC(SCHOOLS[0]), 10).get_samples()


def test_no_start_is_found_for_an_impossible_model():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("never", a * -torch.inf)

    with pytest.raises(ValueError, match="no starting point"):
        run(HMC(model, num_steps=2))


# ---------------------------------------------------------------------- calibration
@pytest.mark.parametrize("kind", ["hmc", "sghmc"])
def test_simulation_based_calibration(kind):
    """Talts et al. 2018: ranks of the truth among posterior draws are uniform. 256 replications in one run: a chain
    each, with its own data.

    The model of a replication is a row of a batch, so the run is one potential over independent conjugate
    regressions.  A posterior 20% too narrow gives a
    chi-square p-value below 1e-3 here.
    """
    replications, draws = 256, 63
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(replications, 30, generator=noise, dtype=F64)
    truth = torch.randn(replications, generator=noise, dtype=F64)
    y = truth[:, None] * x + torch.randn(replications, 30, generator=noise, dtype=F64)

    def model(x, y):
        with pyro.plate("replication", replications):
            w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(w[:, None] * x, 1.0).to_event(1), obs=y)

    if kind == "hmc":
        kernel, thin = HMC(model, num_steps=8), 3
    else:
        kernel, thin = SGHMC(model, step_size=0.05, friction=0.1), 40
    mcmc = run(kernel, x, y, num_chains=1, num_samples=draws, warmup_steps=400, thin=thin)
    ranks = (mcmc.get_samples()["w"] < truth).sum(0)
    counts = torch.bincount(ranks * 8 // (draws + 1), minlength=8)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    exact_sd = (1 + x.square().sum(1)).rsqrt()
    assert (mcmc.get_samples()["w"].std(0) / exact_sd).mean().item() == pytest.approx(1.0, abs=0.04)
