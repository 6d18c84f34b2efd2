"""What a model says of itself once, to inherit every test in this folder.

A model's file in ``cases/`` holds ``CASES``, a list of these; it is found by being there.
"""

import copy
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_models.base import Model
from tests.contract import cases

Data = dict[str, Any]
Query = Callable[[Model], Tensor]


class Call(NamedTuple):
    """A call that is good as it stands.

    Attributes:
        name: what is called.
        function: its keyword arguments are to be spoiled one at a time.
        arguments: good ones.
        free: arguments that may be anything, such as a model whose kind only shows when it runs.
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    free: frozenset[str] = frozenset()


def _read_only(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.numpy().copy()
        value.flags.writeable = False
    return value


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


def _read_only(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.numpy().copy()
        value.flags.writeable = False
    return value


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
        call: arguments of the Pyro model itself, from a fitted model and its data. Its log-joint at latent values drawn
            from a fixed seed is compared between dtypes, with differences, and run on a pretended accelerator.
        pyro_model: the module that those are arguments of and that holds the parameters; the model itself.
        simulated: latent sites whose density does not depend on the parameters because their value does: they are drawn
            again, from a fixed seed, where the slope is checked.
        in_law: ends of the names of parameters whose gradient is right in expectation and not path by path (a factor of
            a covariance is turned freely); they are left out where the slope is checked.
        bad: calls to refuse, besides those that every model gets.
        calls: good calls of functions beside the model, to be spoiled an argument at a time.
        not_finite: data arguments in which a NaN must be refused.
        tolerance: of ``rowwise`` and between dtypes, relative.
        resumes: whether ``fit`` takes a ``checkpoint``.
        accelerator: whether the log-joint runs on fake tensors.
        groups: groups that the ArviZ export must have.
    """

    name: str
    build: Callable[[], Model]
    data: Callable[[torch.dtype], Data]
    fit: Mapping[str, Any]
    queries: Mapping[str, Query]
    call: Callable[[Model, Data], tuple[Any, ...]]
    rowwise: Mapping[str, Callable[[Model, Tensor], Tensor]] = field(default_factory=dict)
    rows: Callable[[torch.dtype], Tensor] | None = None
    pyro_model: Callable[[Model], nn.Module] = lambda model: model
    simulated: Sequence[str] = ()
    in_law: tuple[str, ...] = ()
    bad: Sequence[Bad] = ()
    calls: Sequence[Call] = ()
    not_finite: Sequence[str] = ()
    tolerance: float = 1e-4
    resumes: bool = True
    accelerator: bool = True
    groups: frozenset[str] = frozenset()

    def fitted(self, *, dtype: torch.dtype = torch.float32, arrays: bool = False, **options: Any) -> tuple[Model, Any]:
        """A fitted model and what its ``fit`` returned; ``arrays`` gives it NumPy's, which must not be written to."""
        model = self.build()
        settings: dict[str, Any] = {"seed": 0, "progress": False, **self.fit, **options}
        data: dict[str, Any] = dict(self.data(dtype))
        if arrays:
            data = {name: _read_only(value) for name, value in data.items()}
        result = model.fit(**data, **settings)  # type: ignore[operator]
        return model, result

    def latents(self, model: Model) -> dict[str, Tensor]:
        """Values of the Pyro model's latent sites, in double precision, always the same."""
        with torch.random.fork_rng(), pyro.get_param_store().scope():
            torch.manual_seed(7)
            double = copy.deepcopy(model).double()
            arguments = self.call(double, self.data(torch.float64))
            trace = poutine.trace(self.pyro_model(double)).get_trace(*arguments)
        return {n: trace.nodes[n]["value"].detach() for n in trace.stochastic_nodes}

    def loss(self, model: nn.Module, arguments: tuple[Any, ...], latents: dict[str, Tensor]) -> Tensor:
        """Minus the log-joint that the Pyro model scores."""
        with torch.random.fork_rng(), pyro.get_param_store().scope():
            torch.manual_seed(8)
            trace = poutine.trace(poutine.condition(model, data=latents)).get_trace(*arguments)
            return -trace.log_prob_sum()

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
