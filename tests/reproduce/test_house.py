"""Long checks of the library as a whole: fifty kills, memory of a streamed run, calibration, tutorials in full."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks.calibration import MODELS, coverage

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

_RUN = """
import sys, torch
import pyro, pyro.distributions as dist
from inference import MCMC, HMC, fit
torch.set_num_threads(1)
kind, folder = sys.argv[1:]
quiet = {"checkpoint": folder + "/run", "progress": False}
g = torch.Generator().manual_seed(0)
x = torch.randn(200, 4, generator=g)
y = x.sum(1) + 0.1 * torch.randn(200, generator=g)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers = torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1)
            self.net = torch.nn.Sequential(*layers)
    def forward(self, x, y):
        return (self.net(x)[:, 0] - y).square().mean()
def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
open(folder + "/began", "w").close()
if kind == "fit":
    net = Net()
    result = fit(net, (x, y), num_steps=60000, batch_size=32, checkpoint_every=50, **quiet)
    torch.save([*net.state_dict().values(), result.losses], folder + "/answer.pt")
else:
    mcmc = MCMC(HMC(model, num_steps=3), 36000, 500, num_chains=4, checkpoint_every=0.0, compile=False, **quiet)
    mcmc.run(x, y)
    samples = mcmc.get_samples(group_by_chain=True)
    torch.save([*samples.values(), *mcmc.sample_stats.values()], folder + "/answer.pt")
"""


@pytest.mark.parametrize("kind", ["fit", "mcmc"])
def test_twenty_five_kills_at_random_times(kind: str, tmp_path: Path) -> None:
    """SIGKILL after random waits, again and again; the run that ends at last has the bits of an undisturbed one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_RUN), kind]

    def begun(folder: Path) -> subprocess.Popen[bytes]:
        (folder / "began").unlink(missing_ok=True)
        process = subprocess.Popen([*command, str(folder)], env=environment)
        while not (folder / "began").exists() and process.poll() is None:
            time.sleep(0.01)
        return process

    process, start = begun(whole), time.perf_counter()
    assert process.wait() == 0
    length = time.perf_counter() - start
    one = torch.load(whole / "answer.pt")
    dice, kills, ended = random.Random(0), 0, -1
    while ended < 25:  # kills before the last answer; a run that ends before all are done is followed by another
        process = begun(cut)
        try:
            process.wait(timeout=dice.uniform(0.0, 2 * length / 25) if kills < 25 else None)
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        if (cut / "answer.pt").exists():
            two = torch.load(cut / "answer.pt")
            assert len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
            shutil.rmtree(cut)
            cut.mkdir()
            ended = kills
    print(f"{kind}: {kills} kills of runs of {length:.0f} s")


def test_memory_of_a_streamed_run_is_flat(tmp_path: Path) -> None:
    """10,000 draws of 64 chains, streamed into statistics: the peak is that of a run of a tenth of the draws.

    The draws are 64 x 10,000 x 8 numbers, 20 MB in single precision; none may be held.
    """
    script = """
import resource, sys, torch
import pyro, pyro.distributions as dist
from inference import MCMC, SGLD, StreamingMCMC
torch.set_num_threads(1)
def model():
    pyro.sample("w", dist.Normal(torch.zeros(8), 1.0).to_event(1))
StreamingMCMC(SGLD(model, step_size=0.1), int(sys.argv[1]), 10, num_chains=64, progress=False, compile=False).run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    peaks = []
    for draws in (1000, 10000):
        command = [sys.executable, "-W", "ignore", "-c", script, str(draws)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        peaks.append(float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout))
    print(f"peak memory in MiB: {peaks[0]:.0f} for 1,000 draws, {peaks[1]:.0f} for 10,000")
    assert peaks[1] < peaks[0] + 15  # ten times the draws; kept in memory they would take 20 MB more


@pytest.mark.filterwarnings("ignore:. of .* transitions diverged")  # under ten of the many, of 500 posteriors
@pytest.mark.parametrize("name", MODELS)
def test_models_are_calibrated(name: str) -> None:
    """500 data sets from the prior, one chain each: ranks are uniform and intervals cover what they say."""
    found = MODELS[name]()
    assert found.p_value() > 0.01, found.chi_square()
    for level in (0.5, 0.8, 0.9):
        for quantity, share in coverage(found, level).items():
            error = (level * (1 - level) / 500) ** 0.5  # of one scalar; the mean over several has no more
            assert abs(share - level) < 4 * error, f"{quantity}: {share:.3f} of {level:.0%} intervals"


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "tutorials").glob("*.py"))])
def test_a_tutorial_in_full(name: str, tmp_path: Path) -> None:
    """Its figures and the bounds that it ends in, of which the shortened run of each test leaves out most."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PPL_MODELS_OUT": str(tmp_path)}
    environment.pop("PPL_MODELS_SMOKE", None)
    command = [sys.executable, "-W", "ignore", str(ROOT / "tutorials" / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "tutorial").glob("*.png"))
