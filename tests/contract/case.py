"""What a model says of itself once, to inherit every test in this folder.

A model's file in ``cases/`` holds ``CASES``, a list of these; it is found by being there.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppl_models.base import Model
from tests.contract import cases

Data = dict[str, Any]
Query = Callable[[Model], Tensor]


@dataclass(frozen=True)
class Bad:
    """A call that must be refused at the door.

    Attributes:
        label: what is wrong.
        call: the call, on a model that has not been fitted.
        message: a pattern of the error's text: the argument's name, what was given or is needed.
    """

    label: str
    call: Callable[[Model], object]
    message: str
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError)


@dataclass(frozen=True)
class ModelCase:
    """One model, small.

    Attributes:
        name: of the case.
        build: makes the model, not fitted.
        data: float dtype to the data arguments of ``fit``, by name, tensors that a NaN or another length can spoil.
        fit: further arguments of ``fit``, for a run of a second; no seed, progress or checkpoint.
        queries: seeded queries of a fitted model that must give the same bits after ``save`` and ``load``.
        rowwise: queries of rows, whose answer to many is the answers to each; the rows are ``rows``.
        rows: float dtype to the rows.
        loss: a scalar of model and data, differentiable in the parameters, that neither checks nor draws (or draws from
            a fixed seed): compared between dtypes, with differences, and run on a pretended accelerator.  None if the
            model has no such form.
        call: arguments of the Pyro model itself, from a fitted model and its data; None if it needs none.
        bad: calls to refuse, besides those that every model gets.
        not_finite: data arguments in which a NaN must be refused.
        tolerance: of ``rowwise`` and between dtypes, relative.
        resumes: whether ``fit`` takes a ``checkpoint``.
        accelerator: whether ``loss`` runs on fake tensors.
        groups: groups that the ArviZ export must have.
    """

    name: str
    build: Callable[[], Model]
    data: Callable[[torch.dtype], Data]
    fit: Mapping[str, Any]
    queries: Mapping[str, Query]
    rowwise: Mapping[str, Callable[[Model, Tensor], Tensor]] = field(default_factory=dict)
    rows: Callable[[torch.dtype], Tensor] | None = None
    loss: Callable[..., Tensor] | None = None
    call: Callable[[Model, Data], tuple[Any, ...]] | None = None
    bad: Sequence[Bad] = ()
    not_finite: Sequence[str] = ()
    tolerance: float = 1e-4
    resumes: bool = True
    accelerator: bool = True
    groups: frozenset[str] = frozenset()

    def fitted(self, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Model, Any]:
        """A fitted model and what its ``fit`` returned."""
        model = self.build()
        settings: dict[str, Any] = {"seed": 0, "progress": False, **self.fit, **options}
        result = model.fit(**self.data(dtype), **settings)  # type: ignore[operator]
        return model, result

    def answers(self, model: Model) -> dict[str, Tensor]:
        """The answers to all queries."""
        return {name: query(model) for name, query in self.queries.items()}


def model_cases() -> list[ModelCase]:
    """All that the files in ``cases/`` hold."""
    found: list[ModelCase] = []
    for module in pkgutil.iter_modules(cases.__path__):
        found += importlib.import_module(f"{cases.__name__}.{module.name}").CASES
    return found


def model_case(name: str) -> ModelCase:
    """The case of that name."""
    return next(case for case in model_cases() if case.name == name)
