"""Image-based treatment effects: which kinds of image go with large or small effects of an intervention.

Jerzak, Johansson and Daoud, Image-based Treatment Effect Heterogeneity, CLeaR 2023, PMLR 213:531-552, arXiv 2206.06417.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from inference.citation import Paper
from inference.runtime.checkpoint import flatten_state, unflatten_state
from ppl_models.base import Model, check_count, to_tensor
from ppl_models.image_cate import salience as saliences
from ppl_models.image_cate.backbones import AGGREGATIONS
from ppl_models.image_cate.covariates import check_covariates
from ppl_models.image_cate.data import MISSING, Trial, Units, check_images, make_trial
from ppl_models.image_cate.estimation import cross_fit_effects, estimate_trial, held_out_probs, type_effects
from ppl_models.image_cate.evaluation import Evaluation, evaluate, gate
from ppl_models.image_cate.files import pack, unpack
from ppl_models.image_cate.fitted import AtImages, Fitted
from ppl_models.image_cate.likelihoods import OUTCOMES, make_likelihood
from ppl_models.image_cate.mixture import OBJECTIVES
from ppl_models.image_cate.posterior import POSTERIORS
from ppl_models.image_cate.propensity import clustered_mean
from ppl_models.image_cate.rate import ranks_in_folds
from ppl_models.image_cate.refute import METHODS, Refutation, Study, refute, regions_of
from ppl_models.image_cate.refute import Fitted as Refitted
from ppl_models.image_cate.results import ClusterEffects, ImageCATEResult, result_of
from ppl_models.image_cate.training import Settings
from ppl_models.image_cate.transport import Transported, transport

__all__ = ["ImageCATE"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "objective": OBJECTIVES,
    "outcome": OUTCOMES,
    "effects": ("cluster", "network"),
    "baseline": ("crossfit", "joint"),
    "posterior": POSTERIORS,
    "aggregation": AGGREGATIONS,
    "missing": MISSING,
}
_COUNTS = ("num_clusters", "width", "depth", "num_steps", "batch_size", "num_samples", "num_restarts")


class ImageCATE(Model):
    """Treatment effects by image: K image types, their effects, and every image's membership.

    Jerzak, Johansson and Daoud, CLeaR 2023, arXiv 2206.06417.

    A gate gives each image its probabilities of the types, each type has an effect, and a baseline takes up what images
    say about the outcome itself:

        Y = f0(M) + T mu_Z + noise,   Z | M ~ Categorical(pi(M)),   effect at an image tau(M) = sum_k pi_k(M) mu_k.

    After ``fit``, calling the object with standardised images and ``Units`` runs its Pyro model.  For each fold of the
    images, ``fit`` makes a gate from the others: rules on fixed features in closed form, and a network trained by the
    exact ELBO (types summed out).  Effects, noise scales and the weights of these rules get their joint posterior from
    what each gate says of the images that it did not see: a network counts for as much as it foretells, and types that
    had to be searched for are not favoured.  At other images the gates' probabilities are averaged.  Estimates follow
    scikit-learn's conventions (``get_params``, ``set_params``, ``sklearn.base.clone``).

    What data cannot tell: the spread of effects inside a type from noise of the treated arm; and, where memberships are
    neither 0 nor 1, more extreme effects with softer memberships from milder ones with harder, beyond what the shape of
    the outcome's distribution says.  Types are by effect, ascending, everywhere.

    Args:
        num_clusters: types K; 1 is a constant effect. ``choose_num_clusters`` compares several.
        objective: ``"gated"``, image types (the paper's: a hard partition of images where it can); ``"marginal"``,
            types of units whose shares depend on the image; ``"relaxed"``, the paper's sampled relaxation, to
            reproduce it.
        outcome: law of the outcome: normal, student_t, lognormal, bernoulli, hurdle, poisson or negative_binomial.
        backbone: of the trained gate: ``"cnn"``, ``"vit"``, ``"embedding"`` (images are given as features ``(N, F)``),
            or a ``torch.nn.Module`` from ``(N, C, H, W)`` to ``(N, F)``, which is copied; ``"fixed"``: none is trained,
            fixed features alone, in a second.
        fixed_features: beside the trained gate, rules on statistics of texture and on random convolutions (or on the
            embeddings as they are), and baselines and propensities by penalised regression on them; without, all is
            left to the backbone.
        effects: ``"cluster"``, one effect a type; ``"network"``, each type's effect is a network of the image.
        baseline: ``"crossfit"``: fitted on other folds beforehand, with a centred treatment, so that its mistakes do
            not move effects; ``"joint"``: trained with the rest, as in the paper.
        posterior: of effects and weights: ``"laplace"``, ``"svi"`` (multivariate normal guide), ``"nuts"`` or
            ``"sghmc"``.
        num_samples: posterior draws.
        num_folds: folds, by group, of all cross-fitting: as many gates.
        num_restarts: starts of each network, of which the best by held-out loss is kept.
        num_steps: updates of each network.
        batch_size: units in an update, on average; whole images are drawn.
        lr, weight_decay: of AdamW, with one rise and fall of the rate.
        width, depth: of the backbone.
        scales: sides of central crops that are looked at beside each other; None for the image as it is.
        aggregation: of image sequences: transformer, concatenate, difference or variance.
        augment: mirror training images at random.
        site_effect: random effect of each group in the baseline.
        bayesian_layers: posterior of the gate's kernels as well, by staged empirical Bayes; twice the time.
        calibrate: shift effects so that their mean over the sample is the doubly robust average effect.
        missing: ``"raise"`` on NaN, or ``"drop"`` the rows and report them.

    Raises:
        TypeError, ValueError: an argument that is unknown or out of range (checked by ``fit``, as in scikit-learn).

    Example:
        >>> import warnings
        >>> from ppl_models.image_cate.simulation import stripes
        >>> trial = stripes(200, noise=0.5, seed=0)
        >>> cate = ImageCATE(num_steps=60, num_folds=2)
        >>> result = cate.fit(trial.outcome, trial.treatment, trial.images, progress=False)
        >>> cate.effect(trial.images).shape, cate.cluster_probs(trial.images).shape
        (torch.Size([200]), torch.Size([200, 2]))
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "jerzak2023image",
            author="Jerzak, Connor T. and Johansson, Fredrik and Daoud, Adel",
            title="Image-Based Treatment Effect Heterogeneity",
            booktitle="Conference on Causal Learning and Reasoning",
            series="Proceedings of Machine Learning Research",
            volume=213,
            pages="531--552",
            year=2023,
        ),
    )

    kind: ClassVar[str] = "ImageCATE"

    def __init__(
        self,
        num_clusters: int = 2,
        objective: str = "gated",
        outcome: str = "normal",
        backbone: Any = "cnn",
        *,
        fixed_features: bool = True,
        effects: str = "cluster",
        baseline: str = "crossfit",
        posterior: str = "laplace",
        num_samples: int = 500,
        num_folds: int = 5,
        num_restarts: int = 1,
        num_steps: int = 200,
        batch_size: int = 100,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
        width: int = 16,
        depth: int = 2,
        scales: Sequence[int] | None = None,
        aggregation: str = "transformer",
        augment: bool = True,
        site_effect: bool = False,
        bayesian_layers: bool = False,
        calibrate: bool = True,
        missing: str = "raise",
    ) -> None:
        super().__init__()
        given = locals()
        # A user's module is a setting, not a part: it is copied when networks are built.
        object.__setattr__(self, "_params", {name: given[name] for name in _parameter_names()})
        object.__setattr__(self, "_state", None)
        object.__setattr__(self, "_places", None)

    # ------------------------------------------------------------------ scikit-learn's conventions
    def __getattr__(self, name: str) -> Any:
        params = self.__dict__.get("_params", {})
        return params[name] if name in params else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_params", {}):
            self._params[name] = value
        else:
            super().__setattr__(name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._params)

    def set_params(self, **params: Any) -> Self:
        """Change arguments of the constructor; takes effect at the next ``fit``.

        Raises:
            ValueError: an unknown name.
        """
        unknown = sorted(set(params) - set(self._params))
        if unknown:
            raise ValueError(f"ImageCATE has no parameter {', '.join(unknown)}; it has {', '.join(self._params)}")
        self._params.update(params)
        return self

    def __repr__(self) -> str:
        shown = [f"{n}={v!r}" for n, v in self._params.items() if n in ("num_clusters", "objective", "outcome")]
        return f"ImageCATE({', '.join(shown)}, fitted={self._state is not None})"

    def settings(self) -> Settings:
        """The arguments, checked.

        Raises:
            TypeError, ValueError: one is unknown or out of range.
        """
        p = self._params
        for name, choices in _CHOICES.items():
            if p[name] not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {p[name]!r}")
        for name in _COUNTS:
            check_count(name, p[name])
        check_count("num_folds", p["num_folds"], 2)
        if isinstance(p["backbone"], str) and p["backbone"] == "fixed":
            asked = [n for n, v in (("effects", "network"), ("baseline", "joint")) if p[n] == v]
            asked += ["bayesian_layers"] if p["bayesian_layers"] else []
            asked += [] if p["fixed_features"] else ["fixed_features"]
            if asked:
                raise ValueError(f"backbone='fixed' trains no network, so {asked[0]}={p[asked[0]]!r} needs another one")
        for name in ("lr", "weight_decay"):
            if isinstance(p[name], bool) or not isinstance(p[name], int | float):
                raise TypeError(f"{name} must be a number, got {p[name]!r}")
            if not (p[name] > 0 or (name == "weight_decay" and p[name] == 0)):
                raise ValueError(f"{name} must be positive, got {p[name]}")
        several = p["num_clusters"] > 2
        return Settings(
            **{n: p[n] for n in (*_CHOICES, *_COUNTS) if n in Settings.__dataclass_fields__},
            backbone=p["backbone"],
            scales=None if p["scales"] is None else tuple(p["scales"]),
            augment=bool(p["augment"]),
            site_effect=bool(p["site_effect"]),
            bayesian_layers=bool(p["bayesian_layers"]),
            lr=p["lr"],
            weight_decay=p["weight_decay"],
            baseline_steps=p["num_steps"],
            fixed_features=bool(p["fixed_features"]),
            warm_start=several,
            noise_pooling=0.1 if p["objective"] == "marginal" else 0.3,
        )

    # ------------------------------------------------------------------ the fit
    def fit(
        self,
        outcome: Any,
        treatment: Any,
        images: Any,
        image_index: Any = None,
        covariates: Any = None,
        controls: Any = None,
        propensity: Any = None,
        groups: Any = None,
        seed: int = 0,
        *,
        sample_weight: Any = None,
        lon_lat: Any = None,
        progress: bool | Callable[[dict[str, Any]], None] = True,
        checkpoint: str | Path | None = None,
    ) -> ImageCATEResult:
        """Fit a trial, or an observational study with a propensity.

        Images must be from before the treatment.  Equal images are one image; each is looked at once, however many
        units share it.  Folds and standard errors go by ``groups``, and by image without them.

        Args:
            outcome: ``(N,)``.
            treatment: zeros and ones ``(N,)``.
            images: ``(S, C, H, W)``; sequences ``(S, T, C, H, W)``; embeddings ``(S, F)``.
            image_index: row of ``images`` of each unit, ``(N,)``; None if the units are the rows.
            covariates: columns that effects and outcomes may depend on, ``(N, M)``.
            controls: columns that outcomes alone may depend on, ``(N, Q)``.
            propensity: None for a constant one; a number or ``(N,)``; ``"logistic"`` on the columns; ``"image"``, on
                images and columns, by penalised regression on fixed features (by a network without these).
            groups: site of each unit, numbers or strings, ``(N,)``.
            seed: same seed, same machine, same result to the bit.
            sample_weight: ``(N,)``.
            lon_lat: place of each row of ``images`` in degrees, ``(S, 2)``, for exemplars and the report's map.
            progress: progress bar, or a function that receives its fields.
            checkpoint: path to resume the networks' training from; each fold's has its number behind it.

        Raises:
            TypeError, ValueError: data that do not fit together, one arm only, a covariate that is the treatment.
        """
        settings = self.settings()
        trial = make_trial(
            outcome,
            treatment,
            images,
            image_index,
            covariates,
            controls,
            groups,
            sample_weight,
            self._params["missing"],
        )
        make_likelihood(settings.outcome).check(trial.outcome)
        if self._params["num_clusters"] > trial.num_images:
            raise ValueError(
                f"num_clusters = {self._params['num_clusters']} types need as many distinct images; there are "
                f"{trial.num_images}"
            )
        for name, given, columns in (
            ("covariates", covariates, trial.modifiers),
            ("controls", controls, trial.controls),
        ):
            if columns.shape[1]:
                names = [str(c) for c in getattr(given, "columns", ())] or None
                keep, messages = check_covariates(columns, trial.treatment, names)
                if not bool(torch.as_tensor(keep).all()):
                    raise ValueError(f"{name} cannot be used as they are: {'; '.join(messages)}. Leave them out")
        places = None if lon_lat is None else _places_of(lon_lat, trial)
        state = estimate_trial(
            trial,
            settings,
            propensity,
            posterior=self._params["posterior"],
            num_samples=self._params["num_samples"],
            num_folds=self._params["num_folds"],
            calibrate=bool(self._params["calibrate"]),
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
        )
        for message in state.messages[len(trial.messages) :]:
            warnings.warn(message, UserWarning, stacklevel=3)
        object.__setattr__(self, "_state", state)
        object.__setattr__(self, "_places", places)
        return self.result

    @property
    def result(self) -> ImageCATEResult:
        """What the last fit found."""
        state = self._fitted("result")
        return result_of(state, self._type_effects(state))

    def forward(self, images: Tensor, units: Units) -> None:
        """Run the Pyro model on standardised images ``(B, ...)`` and their units."""
        self._fitted("the Pyro model").network(images, units)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._state is not None:
            self._state.apply(fn)
        return self

    def _fitted(self, query: str) -> Fitted:
        state: Fitted | None = self._state
        if state is None:
            raise RuntimeError(f"{query} needs a fit: call fit(outcome, treatment, images) first")
        return state

    def _type_effects(self, state: Fitted) -> Tensor:
        return type_effects(state.on_units(), state.trial.sample_weight)[:, state.order]

    # ------------------------------------------------------------------ queries
    def _at(self, query: str, images: Any, covariates: Any) -> tuple[Fitted, AtImages]:
        state = self._fitted(query)
        pixels = self._like_training(state, images)
        modifiers, controls = state.average_columns(len(pixels))
        if covariates is not None:
            modifiers = to_tensor("covariates", covariates).to(pixels)
            modifiers = modifiers.unsqueeze(1) if modifiers.ndim == 1 else modifiers
            width = state.trial.modifiers.shape[1]
            if modifiers.shape != (len(pixels), width):
                raise ValueError(f"covariates must be ({len(pixels)}, {width}), got shape {tuple(modifiers.shape)}")
        found = state.at(pixels, modifiers, controls)  # draws are in double precision, answers in that of the data
        return state, AtImages(*(x.to(pixels) for x in found))

    def _like_training(self, state: Fitted, images: Any) -> Tensor:
        pixels = check_images(images).to(state.trial.images)
        if pixels.shape[1:] != state.trial.images.shape[1:]:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, state.trial.images.shape[1:]))}) as in the fit, got "
                f"{tuple(pixels.shape)}"
            )
        bad = ~torch.isfinite(pixels.flatten(1)).all(1)
        if bool(bad.any()):
            raise ValueError(
                f"images hold NaN or infinite pixels in {int(bad.sum())} rows, the first {int(bad.nonzero()[0])}"
            )
        return pixels

    def effect(self, images: Any, covariates: Any = None) -> Tensor:
        """Mean effect at each image in outcome units, ``(N,)``; covariates ``(N, M)`` at their training means if
        None."""
        return self._at("effect", images, covariates)[1].effect.mean(0)

    def effect_interval(self, images: Any, alpha: float = 0.1, covariates: Any = None) -> Tensor:
        """Equal-tailed posterior interval of coverage ``1 - alpha`` of the effect at each image, ``(N, 2)``."""
        draws = self._at("effect_interval", images, covariates)[1].effect
        return _ends(draws, alpha)

    def cluster_probs(self, images: Any, covariates: Any = None) -> Tensor:
        """Probabilities of the types, by effect ascending, ``(N, K)``."""
        state, found = self._at("cluster_probs", images, covariates)
        return found.probs.mean(0)[:, state.order]

    def cluster_effects(self, alpha: float = 0.1) -> ClusterEffects:
        """Effect of each type: posterior, and by doubly robust scores with an error that is robust to clusters.

        Both rest on memberships by gates that did not see the unit.
        """
        state = self._fitted("cluster_effects")
        found = state.on_units()
        draws = type_effects(found, state.trial.sample_weight)[:, state.order]
        probs = held_out_probs(state)
        groups = gate(state.scores, probs, state.trial.groups, state.trial.sample_weight)
        return ClusterEffects(
            effect=draws.mean(0),
            sd=draws.std(0),
            interval=_ends(draws, alpha),
            share=(state.trial.sample_weight.to(probs).unsqueeze(1) * probs).mean(0),
            gate=groups.estimates,
            gate_standard_error=groups.standard_errors,
        )

    def ate(self) -> float:
        """Average effect in the sample, outcome units: the mean of the cross-fitted doubly robust scores."""
        state = self._fitted("ate")
        return float(clustered_mean(state.scores, state.trial.groups, state.trial.sample_weight).estimate)

    def ate_interval(self, alpha: float = 0.1, population: str = "sample", images: Any = None) -> tuple[float, float]:
        """Interval of the average effect.

        Args:
            alpha: one minus the coverage.
            population: ``"sample"``, the units of the study; ``"super"``, the population that its sites were drawn
                from; ``"target"``, the places of ``images``, by transport.
            images: of the target.

        Raises:
            ValueError: another population, or a target without images.
        """
        state = self._fitted("ate_interval")
        if population == "target":
            if images is None:
                raise ValueError("population='target' needs the images of the target")
            area = self.transport(images, alpha=alpha).area(inside_only=False)
            return area["lower"], area["upper"]
        if population not in ("sample", "super"):
            raise ValueError(f"population must be 'sample', 'super' or 'target', got {population!r}")
        _check_alpha(alpha)
        trial, spread = state.trial, state.scores
        if population == "sample":  # what varies over units without chance is no error of the sample's average
            tau = state.on_units().effect.mean(0).to(spread)
            spread = spread - tau + tau.mean()
        error = clustered_mean(spread, trial.groups, trial.sample_weight).standard_error
        half = float(torch.special.ndtri(torch.tensor(1 - alpha / 2, dtype=torch.float64))) * float(error)
        return self.ate() - half, self.ate() + half

    def salience(self, images: Any, kind: str = "effect", cluster: int = -1) -> Tensor:
        """Derivative of the mean effect (``kind="effect"``) or of the log odds of type ``cluster`` (``"type"``) by each
        pixel, in the images' own units, shaped as the images.
        """
        state = self._fitted("salience")
        return saliences.salience(state, self._like_training(state, images), kind, cluster)

    def exemplars(self, count: int = 4, least_km: float = 1.0) -> saliences.Exemplars:
        """Rows of the given ``images`` that show each type best; with ``lon_lat`` at least ``least_km`` apart."""
        state = self._fitted("exemplars")
        found = saliences.exemplars(state, check_count("count", count), self._places, least_km)
        rows = torch.where(found.rows >= 0, state.trial.image_rows[found.rows.clamp(min=0)], found.rows)
        return saliences.Exemplars(rows, found.lower_bounds)

    def transport(self, images: Any, lon_lat: Any = None, alpha: float = 0.1) -> Transported:
        """Effects at places without a trial, from their images ``(N, ...)``; columns are at their training means."""
        state = self._fitted("transport")
        _check_alpha(alpha)
        pixels = self._like_training(state, images)
        places = None if lon_lat is None else to_tensor("lon_lat", lon_lat)
        if places is not None and places.shape != (len(pixels), 2):
            raise ValueError(f"lon_lat must be ({len(pixels)}, 2), got {tuple(places.shape)}")
        return transport(state, pixels, places, alpha)

    # ------------------------------------------------------------------ checks
    def cross_fitted(self) -> tuple[Tensor, Tensor]:
        """Effect ``(N,)`` and type probabilities ``(N, K)`` of the trial's units, from gates that did not see their
        fold and effects estimated without it.

        Where the other folds tell of no difference (a regression on fixed features foretells the effects of images
        held out from them no better than one effect for all does), a fold's units have one effect, and ``evaluate``
        ranks none before another.
        """
        state = self._fitted("cross_fitted")
        if state.cross_fitted is None:
            state.cross_fitted = cross_fit_effects(state)
        return state.cross_fitted

    def evaluate(self, seed: int = 0) -> Evaluation:
        """Whether the effects are there: RATE, calibration, effects by type, policy value, of cross-fitted effects."""
        state = self._fitted("evaluate")
        options: dict[str, Any] = {"folds": state.folds[state.trial.image_index], "weights": state.trial.sample_weight}
        return evaluate(state.scores, *self.cross_fitted(), state.trial.groups, seed, **options)

    def refute(self, methods: Sequence[str] = METHODS, num_repeats: int = 1, seed: int = 0) -> tuple[Refutation, ...]:
        """Refit with data in which nothing may be found, or little may change; see ``refute.refute``."""
        state = self._fitted("refute")
        trial, places = state.trial, self._places
        study = Study(
            *(trial.outcome, trial.treatment, trial.images, trial.image_index),
            covariates=trial.modifiers if trial.modifiers.shape[1] else None,
            controls=trial.controls if trial.controls.shape[1] else None,
            sample_weight=trial.sample_weight,
            groups=trial.groups,
            propensity=None if bool((state.propensity == state.propensity[0]).all()) else state.propensity,
            regions=None if places is None else regions_of(places[trial.image_index]),
        )
        return refute(study, self._refit, methods, num_repeats, reference=self._ranked(), seed=seed)

    def _ranked(self) -> Refitted:
        state = self._fitted("refute")
        return Refitted(state.scores, ranks_in_folds(self.cross_fitted()[0], state.folds[state.trial.image_index]))

    def _refit(self, study: Study, seed: int) -> Refitted:
        other = ImageCATE(**{**self._params, "num_samples": 50})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            held = {name: value for name, value in vars(study).items() if name != "regions"}
            other.fit(**held, seed=seed, progress=False)
        return other._ranked()

    # ------------------------------------------------------------------ hand over
    def to_dataframe(self) -> Any:
        """One row a unit: row in the data, image, outcome, treatment, propensity, score, effect with 90% interval, most
        probable type and probabilities; cross-fitted effects if there are any. Needs pandas."""
        import pandas

        state = self._fitted("to_dataframe")
        trial, found = state.trial, state.on_units()
        draws, probs = found.effect, found.probs.mean(0)[:, state.order]
        ends = _ends(draws, 0.1)
        columns = {
            "row": trial.rows,
            "image": trial.image_rows[trial.image_index],
            "group": trial.groups,
            "outcome": trial.outcome,
            "treatment": trial.treatment.long(),
            "propensity": state.propensity,
            "score": state.scores,
            "effect": draws.mean(0),
            "lower": ends[:, 0],
            "upper": ends[:, 1],
            "type": probs.argmax(1),
            **{f"probability_{k}": probs[:, k] for k in range(probs.shape[1])},
        }
        if state.cross_fitted is not None:
            columns["cross_fitted_effect"] = state.cross_fitted[0]
        return pandas.DataFrame({n: v.cpu().numpy() for n, v in columns.items()})

    def report(self, path: str | Path) -> None:
        """Write one self-contained HTML page: findings, warnings, tables, maps, salience, diagnostics, settings."""
        from ppl_models.image_cate.study_report import write_study

        write_study(self, self._fitted("report"), self._places, path)

    # ------------------------------------------------------------------ files
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain data."""
        plain = dict(self._params)
        if isinstance(plain["backbone"], nn.Module):
            raise ValueError(
                "a model with a backbone of your own cannot be saved: its class is code; save embeddings instead"
            )
        plain["scales"] = None if plain["scales"] is None else [int(s) for s in plain["scales"]]
        return plain

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state: Fitted | None = self._state
        if state is None:
            return {}, {}
        tensors, packed = flatten_state({**pack(state), "places": self._places})
        return tensors, {"fitted": packed}

    def _restore_extra(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if "fitted" not in meta:
            return
        held = unflatten_state(dict(tensors), meta["fitted"])
        object.__setattr__(self, "_state", unpack(held, self.settings()))
        object.__setattr__(self, "_places", held["places"])


def _parameter_names() -> list[str]:
    return [name for name in inspect.signature(ImageCATE.__init__).parameters if name != "self"]


def _places_of(lon_lat: Any, trial: Trial) -> Tensor:
    """Places of the distinct images, ``(S, 2)``."""
    places = to_tensor("lon_lat", lon_lat).to(trial.outcome)
    if places.ndim != 2 or places.shape[1] != 2 or len(places) <= int(trial.image_rows.max()):
        raise ValueError(f"lon_lat must be (S, 2), a place for each row of images, got {tuple(places.shape)}")
    return places[trial.image_rows]


def _ends(draws: Tensor, alpha: float) -> Tensor:
    _check_alpha(alpha)
    return torch.quantile(draws, draws.new_tensor([alpha / 2, 1 - alpha / 2]), 0).mT


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha must be a number, got {alpha!r}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
