"""Papers stand beside the algorithms; what ran is what is cited."""

import re

import pyro.distributions as dist
import pytest
import torch

import inference
from inference import MCMC, NUTS, SGLD, Laplace, cite, kernels
from tests.inference import zoo

KERNELS = [
    value
    for name in kernels.__all__
    if isinstance(value := getattr(kernels, name), type)
    and issubclass(value, kernels.Kernel)
    and value is not kernels.Kernel
]
ENTRY = re.compile(r"@\w+\{\w+,\n(  \w+ = \{.+\},?\n)+\}")


@pytest.mark.parametrize("thing", [*KERNELS, inference.SMC, Laplace, inference.ELBO, inference.ais])
def test_every_algorithm_has_papers_in_bibtex(thing: object) -> None:
    text = cite(thing)
    entries = text.split("\n\n")
    assert len(entries) >= 2 and all(ENTRY.fullmatch(entry) for entry in entries)
    assert all(entry.count("{") == entry.count("}") for entry in entries)
    assert all(f"  {field} = " in entry for entry in entries for field in ("author", "title", "year"))


def test_what_ran_is_cited_once(capsys: pytest.CaptureFixture[str]) -> None:
    mcmc = MCMC(SGLD(zoo.logistic, step_size=0.01), 2, 2, progress=False)
    text = mcmc.cite()
    assert "welling2011" in text and "hoffman2014" not in text
    assert capsys.readouterr().out == text + "\n"
    both = cite(mcmc, NUTS, SGLD)
    assert both.count("welling2011") == 1 and both.count("bingham2019pyro") == 1 and "hoffman2014" in both
    result = Laplace(zoo.logistic).run(zoo.X, zoo.BINARY)
    assert result.cite() == cite(Laplace)


def test_what_has_no_papers_is_refused() -> None:
    for other in (dist.Normal, torch.zeros(2), None):
        with pytest.raises(TypeError, match="cite takes"):
            cite(other)
