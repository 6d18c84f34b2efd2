"""Bayesian neural networks with functional priors.

Tran, Rossi, Milios and Filippone, All you need is a good functional prior for Bayesian deep learning, JMLR 23(74),
2022, arXiv 2011.12829: say as a Gaussian process what functions are expected, tune the hyperparameters of the weights'
prior until the network's functions look like that process's, and sample the posterior.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from inference._errors import SamplerWarning
from inference.fit import FitResult, fit
from inference.kernels import Kernel
from inference.mcmc import MCMC
from inference.runtime.generators import scoped_seed
from ppl_models.base import check_batch_size, check_count, unchanged_on_error
from ppl_models.functional_prior_bnn.matching import prior_objective
from ppl_models.functional_prior_bnn.networks import evaluate
from ppl_models.functional_prior_bnn.point_estimate import NegativeLogPosterior
from ppl_models.functional_prior_bnn.posterior import Posterior
from ppl_models.functional_prior_bnn.predictions import Prediction
from ppl_models.functional_prior_bnn.pyro_model import BayesianNetwork
from ppl_models.functional_prior_bnn.sampling import build_kernel, starting_points

__all__ = ["FunctionalPriorBNN"]

_DEFAULT_BATCH = 32
# Values of the widest layer up to which a step takes all rows, and rows up to which it does in any case.  At 4,000 rows
# and a width of 100 such a step costs seven of 32 rows, whose noise makes the posterior about twice too wide where a
# tenth of the targets' variance is noise: with steps small enough for it, as many would be needed.
_FEW_VALUES, _FEW_ROWS = 400_000, 256
_DRAWS_AT_ONCE = 1 << 25  # hidden values held at once while functions are drawn


class FunctionalPriorBNN(BayesianNetwork):
    """A Bayesian neural network whose prior can be matched to a process over functions.

    Tran, Rossi, Milios and Filippone, JMLR 23(74), 2022, arXiv 2011.12829.

    The object is a Pyro model.  ``bnn(x, y)``, with **standardised** ``x`` ``(N, D)`` and ``y`` (see ``standardise``),
    has the sites ``W{l}``, ``b{l}`` (where non-centred ``eps_W{l}``, ``eps_b{l}`` and deterministic ``W{l}``,
    ``b{l}``), ``var_W{l}``, ``var_b{l}`` with a hierarchical prior, ``noise_variance`` if learned, and ``obs`` inside
    the plate ``data``, which ``batch_size`` subsamples.  Any engine for Pyro models takes it.  ``fit`` and the queries
    take and give the user's units.

    Args:
        in_features: columns D of x.  Image networks know it from ``image_shape``.
        out_features: outputs K; of a categorical likelihood the number of classes.
        hidden: widths of an MLP's hidden layers; ``()`` is Bayesian linear (or logistic) regression.
        activation: tanh, relu, leaky_relu, softplus, swish, sin, cos, rbf or linear; by default tanh for an MLP and
            relu for image networks.
        prior: ``"gaussian"``, ``"hierarchical"`` or ``"flow"`` (see ``priors``); fixed at its standard values until
            ``match_prior``.
        likelihood: ``"gaussian"``, ``"laplace"``, ``"bernoulli"`` or ``"categorical"``.
        noise_variance: variance of the observations on the **standardised** scale (0.1 says that a tenth of the
            targets' variance is noise), or ``"learned"``, which gives it a LogNormal(log 0.1, 1) prior.  0.1 by
            default; regression only.
        prior_scope: ``"layer"`` has one hyperparameter for the weights and one for the biases of a layer,
            ``"parameter"`` one for every weight.
        parametrisation: ``"noncentred"`` samples standard normals and scales them by the prior, ``"centred"`` the
            weights themselves; by default noncentred, and centred with a hierarchical prior, whose variances are then
            drawn from their exact conditional.
        relevance: of an MLP: each column of x is multiplied by a relevance of its own, which is learned with the
            weights, ``log relevance ~ N(0, relevance^2)`` (0.5 says within a factor of e either way).  None: one for
            all.  Gives the sites ``eps_relevance`` and ``relevance``.  ``match_prior(discrepancy="covariance")``
            matches the law at relevances of one, their median.
        network: ``"mlp"``, ``"lenet5"``, ``"vgg16"`` or ``"preresnet20"``.
        image_shape: ``(C, H, W)`` of an image network's inputs.
        standardise: whether to centre and scale x (columns; image channels) and the targets of regression by their
            training mean and standard deviation.  If not, the user's units are the model's.
        seed: of the flow prior's initial parameters.

    Attributes:
        network: the network as a function of its weights.
        prior: the weight prior, which holds the tuned hyperparameters.
        input_units, target_units: the standardisation.
        result: what the last fit returned, None before.

    Raises:
        TypeError, ValueError: an argument that is unknown, out of range, or at odds with another.

    Example:
        >>> x = torch.linspace(-3, 3, 50)[:, None]
        >>> bnn = FunctionalPriorBNN(in_features=1, hidden=(10,))
        >>> options = {"num_chains": 2, "warmup_steps": 200, "num_samples": 5, "thin": 5, "batch_size": 10}
        >>> result = bnn.fit(x, torch.sin(x), **options, progress=False)
        >>> bnn.predict(x).samples.shape
        torch.Size([2, 5, 50, 1])
    """

    kind: ClassVar[str] = "FunctionalPriorBNN"

    # ------------------------------------------------------------------ the prior
    def sample_prior(self, x: Any, num_samples: int = 500, seed: int = 0) -> Tensor:
        """Independent functions of the prior at ``x`` ``(N, D)``: ``(num_samples, N, K)``.

        In the user's units as far as they are known: x is standardised once ``match_prior`` or ``fit`` has seen
        training inputs, and functions of a regression are in standardised units until ``fit`` has seen targets.  Of a
        classifier they are logits.

        Raises:
            TypeError, ValueError: bad x or count.
        """
        check_count("num_samples", num_samples)
        x = self.input_units(self._check_x("x", x))
        chunk = max(1, _DRAWS_AT_ONCE // (len(x) * self.network.widest))
        with torch.no_grad(), scoped_seed(seed, x.device):
            f = [
                evaluate(self.network, self.prior.draw(min(chunk, num_samples - i)), x)
                for i in range(0, num_samples, chunk)
            ]
        return self.target_units.inverse(torch.cat(f))

    def match_prior(
        self,
        kernel: Any,
        x_train: Any,
        num_steps: int = 200,
        discrepancy: str | Callable[[Tensor, Tensor], Tensor] = "energy",
        seed: int = 0,
        *,
        num_functions: int = 128,
        num_points: int = 100,
        measurement: Any = None,
        lr: float = 0.05,
        average_last: float = 0.5,
        checkpoint: str | Path | None = None,
        progress: bool | Callable[[dict[str, Any]], None] = True,
    ) -> FitResult:
        """Tune the prior's hyperparameters until the network's functions look like those of a target process.

        No target is used, so it may be done before the data are labelled.  A former ``fit`` no longer belongs to the
        new prior and is dropped from the model.

        Args:
            kernel: the target: a gpytorch kernel (priors on its hyperparameters make the process hierarchical), or a
                callable ``(x, n) -> (n, M, K)`` that draws n functions at x.  It lives on **standardised** inputs and
                targets: a length scale of 1 is one standard deviation of a column of ``x_train``, a variance of 1 is
                that of the targets.  With ``standardise=False`` these are the user's units.
            x_train: training inputs ``(N, D)``, in the user's units.
            num_steps: optimisation steps.
            discrepancy: ``"energy"``, ``"wasserstein"`` (the paper's dual), ``"sliced"``, ``"gaussian"``
                (2-Wasserstein of the moments), ``"covariance"`` (the exact covariance of one hidden layer, without
                sampling), or a callable of two bags of functions.
            seed: same seed, same result to the bit.
            num_functions: functions of each process compared in a step.
            num_points: points M at which they are compared.
            measurement: where: a tensor of points or a callable ``num_points -> points``, in the user's units.  By
                default, fresh at every step, 70% training inputs and 30% uniform in their box, or minibatches of
                training inputs for images and classification.
            lr: Adam's learning rate.
            average_last: share of the steps, from the end, over which the hyperparameters are averaged.
            checkpoint: file to resume from.
            progress: progress bar, or a function that receives its fields.

        Returns:
            The history: ``losses`` and such.

        Raises:
            TypeError, ValueError: bad data, an unknown discrepancy, or a target whose draws are not finite or of
                another shape.
            NonFiniteError: the loss became non-finite; the prior is left as it was.
        """
        check_count("num_steps", num_steps)
        self._follow(x_train)
        x = self._check_x("x_train", x_train)
        with unchanged_on_error(self):
            if self.standardised:
                self.input_units.learn(x)
            self.prior.start_tuning()
            with self.prior.tuning():
                objective = prior_objective(
                    self,
                    kernel,
                    self.input_units(x),
                    discrepancy,
                    num_functions=num_functions,
                    num_points=num_points,
                    measurement=measurement,
                )
                history = fit(
                    objective,
                    num_steps=num_steps,
                    lr=lr,
                    average_last=average_last,
                    seed=seed,
                    checkpoint=checkpoint,
                    progress=progress,
                )
        self.result = None
        return history

    # ------------------------------------------------------------------ the posterior
    def fit(
        self,
        x_train: Any,
        y_train: Any,
        num_chains: int = 4,
        warmup_steps: int = 2000,
        num_samples: int = 30,
        thin: int = 100,
        batch_size: int | str | None = "auto",
        step_size: float = 0.01,
        friction: float = 0.01,
        seed: int = 0,
        *,
        sampler: str | Callable[["FunctionalPriorBNN"], Kernel] = "adaptive_sghmc",
        temperature: float = 1.0,
        max_grad_norm: float | None = 100.0,
        gibbs_every: int = 20,
        start_from: Posterior | None = None,
        checkpoint: str | Path | None = None,
        progress: bool | Callable[[dict[str, Any]], None] = True,
        compile: bool | str = "auto",
    ) -> Posterior:
        """Sample the posterior; all chains run in one program, started from independent draws of the prior.

        Args:
            x_train: inputs ``(N, D)`` or images ``(N, C, H, W)``, in the user's units.
            y_train: targets ``(N, K)`` or, with one output, ``(N,)``; zeros and ones for Bernoulli; integer labels
                ``(N,)`` for categorical.
            num_chains: chains.
            warmup_steps: steps before the first draw is kept.
            num_samples: draws kept of each chain.
            thin: steps from one kept draw to the next.
            batch_size: rows of a minibatch; None for all.  By default all with ``"hmc"``, of up to 256 rows, and of up
                to 400,000 over the width of the widest layer (4,000 of a width of 100); 32 of more rows.  The noise of
                minibatches widens a posterior, the more the more rows there are and the smaller their noise is.
            step_size: of the sampler, in its own units (adaptive SGHMC: near 0.01 whatever the model).
            friction: share of the momentum lost in a step (SGHMC).
            seed: same seed, same machine, same draws to the bit.
            sampler: ``"adaptive_sghmc"`` (the paper's), ``"sghmc"``, ``"sgld"``, ``"hmc"``, or a function of the model
                that builds a kernel of ``inference``.
            temperature: T of the tempered posterior ``p(w | D)^(1/T)``; below 1 "cold".
            max_grad_norm: in the warm-up, the gradient of the potential divided by N is clipped to this norm.
            gibbs_every: steps between exact draws of the variances of a centred hierarchical prior.
            start_from: start the chains at the last draws of this posterior, such as one of fewer data, instead of at
                draws of the prior.
            checkpoint: folder to resume from.
            progress: progress bar, or a function that receives its fields.
            compile: ``"auto"``, True or False: whether to compile the sampler's step.

        Returns:
            The posterior, which is also kept as ``result`` for ``predict``.

        Raises:
            TypeError, ValueError: bad data or settings, before any work is done.
            NonFiniteError: every chain became non-finite.
        """
        self._follow(x_train)
        raw_x = self._check_x("x_train", x_train)
        raw_y = self.likelihood.check(y_train, len(raw_x), self.network.out_features, raw_x)
        if batch_size == "auto":
            few = len(raw_x) <= max(_FEW_ROWS, _FEW_VALUES // self.network.widest)
            batch_size = None if sampler == "hmc" or few else _DEFAULT_BATCH
        elif isinstance(batch_size, str):
            raise ValueError(f"batch_size must be an integer, None or 'auto', got {batch_size!r}")
        size = check_batch_size(batch_size, len(raw_x))
        clip = None if max_grad_norm is None else max_grad_norm * len(raw_x)
        kernel = build_kernel(
            self,
            sampler,
            step_size=step_size,
            friction=friction,
            temperature=temperature,
            max_grad_norm=clip,
            gibbs_every=gibbs_every,
            full_batch=size is None,
        )
        check_count("num_chains", num_chains)
        with unchanged_on_error(self):
            x, y = self._learn_units(raw_x, raw_y)
            mcmc = MCMC(
                kernel,
                num_samples,
                warmup_steps,
                initial_params=starting_points(self, x[:1], num_chains, seed, start_from),
                num_chains=num_chains,
                thin=thin,
                seed=seed,
                checkpoint=checkpoint,
                progress=progress,
                compile=compile,
            )
            with warnings.catch_warnings():  # weights have symmetries: the posterior's R-hat is that of the function
                warnings.filterwarnings("ignore", "the chains have not mixed", SamplerWarning)
                mcmc.run(x, y, batch_size=size)
        info = {
            "method": sampler if isinstance(sampler, str) else type(kernel).__name__,
            "temperature": float(temperature),
            "seconds": mcmc.seconds,
            "num_gradients": mcmc.num_gradients,
        }
        return self._keep(mcmc.get_samples(group_by_chain=True), mcmc.sample_stats, raw_x, raw_y, info)

    def fit_map(
        self,
        x_train: Any,
        y_train: Any,
        num_steps: int = 2000,
        batch_size: int | None = None,
        lr: float = 0.01,
        seed: int = 0,
        *,
        num_members: int = 1,
        progress: bool | Callable[[dict[str, Any]], None] = True,
    ) -> Posterior:
        """Maximise the posterior density, with the prior (tuned or not) as the regulariser.

        Args:
            x_train, y_train: as in ``fit``.
            num_steps: steps of Adam.
            batch_size: rows of a minibatch; None for all.
            lr: learning rate.
            seed: same seed, same result to the bit.
            num_members: estimates from independent starts, trained at once; more than one is an ensemble.
            progress: progress bar, or a function that receives its fields.

        Returns:
            A posterior of one draw a member, which is also kept as ``result`` for ``predict``.

        Raises:
            TypeError, ValueError: bad data or settings.
            NonFiniteError: the loss became non-finite.
        """
        self._follow(x_train)
        raw_x = self._check_x("x_train", x_train)
        raw_y = self.likelihood.check(y_train, len(raw_x), self.network.out_features, raw_x)
        size = check_batch_size(batch_size, len(raw_x))
        check_count("num_members", num_members)
        with unchanged_on_error(self):
            x, y = self._learn_units(raw_x, raw_y)
            objective = NegativeLogPosterior(self, x, y, num_members, size, seed)
            history = fit(objective, num_steps=num_steps, lr=lr, seed=seed, progress=progress)
        info = {"method": "map", "seconds": history.seconds, "num_gradients": history.num_steps * num_members}
        return self._keep(objective.samples(), {}, raw_x, raw_y, info)

    def _keep(
        self, samples: Mapping[str, Tensor], stats: Mapping[str, Tensor], x: Tensor, y: Tensor, info: Mapping[str, Any]
    ) -> Posterior:
        """The posterior with a copy of the model as it is now."""
        self.result = None
        model = copy.deepcopy(self)
        self.result = model.result = Posterior(model, samples, stats, x, y, info)
        return self.result

    # ------------------------------------------------------------------ queries
    def predict(self, x: Any) -> Prediction:
        """Posterior predictive law at ``x``, in the user's units; see ``Prediction``.

        Raises:
            RuntimeError: the model has not been fitted, or its prior was tuned since.
            TypeError, ValueError: x is not numeric, not finite, or has another number of columns than the training
                inputs.
        """
        return self._fitted("predict").predict(x)

    def _fitted(self, query: str) -> Posterior:
        if self.result is None:
            raise RuntimeError(
                f"{query} needs a posterior: call fit(x_train, y_train) first (match_prior drops an earlier fit)"
            )
        return self.result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.result is not None and self.result.model is self:
            self.result.move(fn)
        elif self.result is not None:
            self.result.model._apply(fn)
        return self

    # ------------------------------------------------------------------ files
    def save(self, path: str | Path) -> None:
        """Write the model to one file, with the posterior and its training data if it is fitted.

        Raises:
            CheckpointError: the file cannot be written. What stood there before is untouched.
        """
        if self.result is None or self.result.model is self:
            super().save(path)
        else:  # the model that the draws belong to
            self.result.model.save(path)

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.result is None:
            return {}, {}
        r = self.result
        tensors = {f"samples/{n}": v for n, v in r.samples.items()} | {
            f"stats/{n}": v for n, v in r.sample_stats.items()
        }
        return {**tensors, "x_train": r.x_train, "y_train": r.y_train}, {"info": r.info}

    def _restore_extra(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if "info" not in meta:
            return
        groups = {
            g: {n.removeprefix(g): v for n, v in tensors.items() if n.startswith(g)} for g in ("samples/", "stats/")
        }
        self._keep(groups["samples/"], groups["stats/"], tensors["x_train"], tensors["y_train"], meta["info"])
