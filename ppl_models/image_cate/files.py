"""The file form of what a fit leaves behind: tensors and plain data, from which its networks are built anew."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ppl_models.image_cate.data import Trial
from ppl_models.image_cate.fitted import Fitted
from ppl_models.image_cate.nuisance import Baseline
from ppl_models.image_cate.training import Columns, Settings, build_networks, prepare

__all__ = ["pack", "unpack"]

_TENSORS = (
    "images", "outcome", "treatment", "image_index", "groups", "modifiers", "controls", "sample_weight", "rows",
    "image_rows",
)  # fmt: skip
_AS_THEY_ARE = (
    "samples", "sample_stats", "order", "propensity", "weight", "offset", "scores", "mean_outcome", "folds",
    "feature_scale",
)  # fmt: skip


def pack(state: Fitted) -> dict[str, Any]:
    """What a file holds of a fit."""
    return {name: getattr(state, name) for name in _AS_THEY_ARE} | {
        "network": dict(state.network.state_dict()),
        "baselines": dict(state.baselines.state_dict()),
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
    count = len({name.split(".")[0] for name in held["baselines"]})
    network, baselines, columns = _networks(trial, settings, held["weight"], count)
    network.load_state_dict(held["network"])
    baselines.load_state_dict(held["baselines"])
    for i, module in enumerate(columns):
        module.load_state_dict(held["columns"][f"{i}"])
    crossed = held["cross_fitted"]
    return Fitted(
        network=network.requires_grad_(False),
        baselines=baselines.requires_grad_(False),
        columns=columns,
        shift=held["shift"],
        trial=trial,
        settings=settings,
        seed=held["seed"],
        messages=tuple(held["messages"]),
        cross_fitted=None if crossed is None else (crossed[0], crossed[1]),
        **{name: held[name] for name in _AS_THEY_ARE},
    )


def _networks(
    trial: Trial, settings: Settings, weight: Tensor, num_baselines: int
) -> tuple[Any, nn.ModuleList, Columns]:
    """Networks of the shapes of a fit, to load parameters into."""
    prepared = prepare(trial, settings, weight)
    network = build_networks(prepared, settings, 0)
    baselines = nn.ModuleList([Baseline(prepared, settings, 0) for _ in range(num_baselines)])
    for model in baselines:
        model._data = ()  # type: ignore[assignment]
    return network.eval(), baselines.eval(), prepared.columns
