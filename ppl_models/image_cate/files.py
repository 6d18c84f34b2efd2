"""The file form of what a fit leaves behind: tensors and plain data, from which its networks are built anew."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ppl_models.image_cate.data import Trial
from ppl_models.image_cate.ensemble import GateEnsemble, MeanTower
from ppl_models.image_cate.estimation import share_design
from ppl_models.image_cate.fitted import Fitted
from ppl_models.image_cate.fixed_features import StandardisedFeatures
from ppl_models.image_cate.members import HeldOut, make_fixed
from ppl_models.image_cate.nuisance import Baseline, what_baselines_see
from ppl_models.image_cate.towers import ImageEffectModel
from ppl_models.image_cate.training import Prepared, Settings, build_mixture, build_networks, prepare

__all__ = ["pack", "unpack"]

_TENSORS = (
    "images", "outcome", "treatment", "image_index", "groups", "modifiers", "controls", "sample_weight", "rows",
    "image_rows",
)  # fmt: skip
_TOWERS = ("gate", "baseline", "effects")
_AS_THEY_ARE = (
    "samples", "sample_stats", "order", "propensity", "weight", "offset", "scores", "mean_outcome", "folds",
)  # fmt: skip


def pack(state: Fitted) -> dict[str, Any]:
    """What a file holds of a fit."""
    return {name: getattr(state, name) for name in _AS_THEY_ARE} | {
        "network": dict(state.network.state_dict()),
        "fixed": None if state.fixed is None else dict(state.fixed.state_dict()),
        "held_out": list(state.held_out),
        "baselines": dict(state.baselines.state_dict()),
        "share": None if state.share is None else dict(state.share.state_dict()),
        "columns": {f"{i}": dict(m.state_dict()) for i, m in enumerate(state.columns)},
        "trial": {n: getattr(state.trial, n) for n in _TENSORS},
        "cross_fitted": None if state.cross_fitted is None else list(state.cross_fitted),
        "shift": float(state.shift),
        "seed": int(state.seed),
        "messages": list(state.messages),
        "dropped": list(state.trial.dropped),
    }


def unpack(held: Mapping[str, Any], settings: Settings) -> Fitted:
    """The fit that was packed."""
    trial = Trial(**held["trial"], dropped=tuple(held["dropped"]), messages=())
    prepared = prepare(trial, settings, held["weight"])
    fixed = make_fixed(prepared, settings, 0)
    if fixed is not None:
        fixed.load_state_dict(held["fixed"])
    network = _network(prepared, settings, fixed, held["network"]).requires_grad_(False).eval()
    network.load_state_dict(held["network"])
    count = len({name.split(".")[0] for name in held["baselines"]})
    seen = what_baselines_see(prepared, fixed)
    baselines = nn.ModuleList([_baseline(seen, settings) for _ in range(count)])
    baselines.load_state_dict(held["baselines"])
    shown = None if held.get("share") is None else share_design(trial, settings, held["propensity"], fixed)
    share = None if shown is None else _baseline(shown, settings)
    if share is not None:
        share.load_state_dict(held["share"])
    for i, module in enumerate(prepared.columns):
        module.load_state_dict(held["columns"][f"{i}"])
    crossed = held["cross_fitted"]
    return Fitted(
        network=network,
        fixed=fixed,
        baselines=baselines,
        share=share,
        columns=prepared.columns,
        held_out=HeldOut(*held["held_out"]),
        shift=held["shift"],
        trial=trial,
        settings=settings,
        seed=held["seed"],
        messages=tuple(held["messages"]),
        cross_fitted=None if crossed is None else (crossed[0], crossed[1]),
        **{name: held[name] for name in _AS_THEY_ARE},
    )


def _baseline(seen: Prepared, settings: Settings) -> Baseline:
    model = Baseline(seen, settings, 0).requires_grad_(False).eval()
    model._data = ()  # type: ignore[assignment]
    return model


def _network(
    prepared: Prepared, settings: Settings, fixed: StandardisedFeatures | None, state: Mapping[str, Tensor]
) -> ImageEffectModel:
    """A network of the shapes of a file's, to load parameters into."""
    heads = state.get("gate.heads")
    gate: GateEnsemble | None = None
    folds = [len({n.split(".")[2] for n in state if n.startswith(f"{part}.towers.")}) for part in _TOWERS]
    towers = [[build_networks(prepared, settings, 0) for _ in range(count)] for count in folds]
    if heads is not None:
        own = [model.gate for model in towers[0]]
        gate = GateEnsemble(fixed if heads.shape[1] else None, heads, own, state.get("gate.kernel_scale"))
    baseline, effects = (
        MeanTower([getattr(model, part) for model in models]) if models else None
        for part, models in zip(_TOWERS[1:], towers[1:], strict=True)
    )
    return ImageEffectModel(gate, baseline, effects, build_mixture(prepared, settings, calibrated=True))
