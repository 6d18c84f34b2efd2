"""Gibbs sampling of discrete variables: each in turn from its conditional, all chains in one program.

    x_j ~ p(x_j | all others),   j = 1, ..., dim

(Geman and Geman, "Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images", 1984.)
Variables that do not depend on each other given the rest, such as a layer without inner connections or one colour of a
lattice, are drawn at once: the energy's ``blocks``.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from inference.citation import Paper
from inference.kernels.base import Info, Kernel, Noise, StepInputs
from inference.potential import InDims, Potential
from inference.potential.discrete import DiscreteEnergy, DiscretePotential, EnergyPotential, gibbs_sweep

__all__ = ["DiscreteGibbs", "DiscreteGibbsState"]


class DiscreteGibbsState(NamedTuple):
    """Attributes:
    position: state numbers, ``(chain, dim)``.
    """

    position: Tensor


class DiscreteGibbs(Kernel):
    """A systematic scan over the discrete sites of a Pyro model, or over a law that knows its local energies.

    Run it by ``MCMC`` like any other kernel; ``initial_params`` are then state numbers.  The record holds by draw
    ``move_rate``, the share of variables that changed.

    Args:
        model: a Pyro model all of whose latent sites are discrete with a finite support (Categorical,
            OneHotCategorical, Bernoulli, Binomial, ...).  Each conditional evaluates its joint in every state.
        energy: in its place, a ``DiscreteEnergy``, whose conditionals cost what they cost; its site is ``states``.

    Raises:
        TypeError, ValueError: both or neither, or something else.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> from inference import MCMC
        >>> mcmc = MCMC(DiscreteGibbs(model), 50, 10, num_chains=100, progress=False).run()
        >>> bool(abs(mcmc.get_samples()["z"].mean() - 0.414) < 0.02)
        True
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "article",
            "geman1984stochastic",
            author="Geman, Stuart and Geman, Donald",
            title="Stochastic Relaxation, {G}ibbs Distributions, and the {B}ayesian Restoration of Images",
            journal="IEEE Transactions on Pattern Analysis and Machine Intelligence",
            volume=6,
            number=6,
            pages="721--741",
            year=1984,
        ),
    )

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        energy: DiscreteEnergy | None = None,
    ) -> None:
        if (model is None) == (energy is None):
            raise ValueError("give exactly one of model and energy")
        if energy is not None and not isinstance(energy, DiscreteEnergy):
            raise TypeError(f"energy must be a DiscreteEnergy, got {type(energy).__name__}")
        if model is not None and not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        self.model, self.energy = model, energy

    def own_potential(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], in_dims: InDims) -> Potential:
        """Over state numbers."""
        if in_dims is not None:
            raise ValueError("in_dims is for kernels in unconstrained space, and this one moves over states")
        if self.energy is not None:
            if args or kwargs:
                raise ValueError("a kernel built on an energy takes no model arguments in run(...)")
            return EnergyPotential(self.energy)
        assert self.model is not None
        return DiscretePotential(self.model, args, kwargs)

    def noise(self, potential: Potential) -> Noise:
        """One uniform a variable."""
        return Noise(uniform=potential.dim)

    def init(self, position: Tensor, potential: Potential) -> DiscreteGibbsState:
        """States as they are given."""
        return DiscreteGibbsState(position)

    def step(
        self, state: DiscreteGibbsState, inputs: StepInputs, potential: Potential
    ) -> tuple[DiscreteGibbsState, Info]:
        """One sweep of all chains."""
        before = state.position.long()
        after = gibbs_sweep(self._law(potential), before, inputs.noise["uniform"])
        moved = (after != before).to(state.position.dtype).mean(1)
        return DiscreteGibbsState(after.to(state.position.dtype)), {"move_rate": moved}

    def plan(self, state: DiscreteGibbsState) -> int:
        """No gradients."""
        return 0

    @staticmethod
    def _law(potential: Potential) -> DiscreteEnergy:
        assert isinstance(potential, DiscretePotential | EnergyPotential)
        return potential.energy
