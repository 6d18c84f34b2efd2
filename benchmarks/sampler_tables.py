"""The samplers' tables: effective draws a second, and each of our samplers beside the peers' of its name."""

from collections.abc import Mapping, Sequence
from math import exp, log
from statistics import mean, median
from typing import Any

from benchmarks.record import markdown_table, spread

__all__ = ["beside_peers", "table"]

_OURS, _PEERS = "inference", ("Pyro", "numpyro", "blackjax", "nutpie")
_VECTORISED = "numpyro NUTS, vectorised"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a model, number of chains and sampler."""
    return markdown_table(
        [
            {
                "model": row["model"],
                "chains": f"{row['chains']:,}",
                "sampler": row["sampler"],
                "draws": row.get("draws", ""),
                "effective draws a second, warm": spread(row["warm"]) if "warm" in row else row["failed"][:40],
                "cold": f"{row['cold']:,.3g}" if "cold" in row else "",
            }
            for row in rows
        ]
    )


def beside_peers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Ratios of effective draws a second, medians of warm runs of as many draws: each of our samplers over each peer's
    of the same name, then our best of 64 chains over numpyro's vectorised NUTS and over one chain of Pyro's NUTS.
    Ratios below one are bold.
    """
    found = {(row["model"], row["chains"], row["sampler"]): row for row in rows if "warm" in row}
    models = list(dict.fromkeys(row["model"] for row in rows))

    def speed(model: str, chains: int, sampler: str) -> float | None:
        row = found.get((model, chains, sampler))
        return median(row["warm"]) if row else None

    def best(model: str) -> float | None:
        speeds = [speed(*key) for key in found if key[:2] == (model, 64) and key[2].startswith(_OURS)]
        return max((value for value in speeds if value is not None), default=None)

    lines: list[dict[str, str]] = []

    def line(ours: str, over: str, ratios: Sequence[float | None]) -> None:
        if any(ratios):
            lines.append({"ours": ours, "over": over, **dict(zip(models, map(_text, ratios), strict=True))})

    for chains, sampler in sorted({(c, s) for _, c, s in found if s.startswith(_OURS)}):
        kernel = sampler.removeprefix(_OURS).strip()
        for peer in dict.fromkeys(s for _, _, s in found if s.startswith(_PEERS) and kernel in s):
            alike = [_draws(found, m, chains, sampler) == _draws(found, m, chains, peer) for m in models]
            ratios = [_ratio(speed(m, chains, sampler), speed(m, chains, peer)) for m in models]
            line(f"{sampler}, {chains:,}", peer, [r if same else None for r, same in zip(ratios, alike, strict=True)])
    shared = [_ratio(best(m), speed(m, 64, _VECTORISED)) for m in models]
    line("best of 64 chains", f"{_VECTORISED}, 64", shared)
    line("best of 64 chains", "Pyro NUTS, 1", [_ratio(best(m), speed(m, 1, "Pyro NUTS")) for m in models])
    logs = [log(ratio) for ratio in shared if ratio]
    text = markdown_table(lines) if lines else ""
    return text + (f"\n\nGeometric mean of the best over {_VECTORISED}: {exp(mean(logs)):.2g}." if logs else "")


def _draws(found: Mapping[tuple[str, int, str], Mapping[str, Any]], *key: Any) -> Any:
    return found[key].get("draws") if key in found else None


def _ratio(ours: float | None, other: float | None) -> float | None:
    return ours / other if ours and other else None


def _text(ratio: float | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:,.0f}"
    return f"**{text}**" if ratio < 1 else text
