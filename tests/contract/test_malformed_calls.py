"""Malformed calls across the public API, over a thousand: each ends in an error that we raise, or in a finite answer.

One argument of a good call is replaced by something else.  Accepted is a ``ValueError`` or ``TypeError`` (or an error
class of the library) raised by a line of ours, with a message; an assertion, an error from the depths of torch, or NaN
as an answer is a fault of the library.
"""

import math
import random
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference import CheckpointError, CurvatureError, NonFiniteError
from sde import PathError
from tests.contract.calls import Call, all_calls

ROOT = Path(__file__).resolve().parents[2]
ROOMS = tuple(str(ROOT / room) for room in ("inference", "ppl_models", "sde"))
CALLS = all_calls()
EXAMPLES = max(12, math.ceil(1000 / len(CALLS)))
OURS = (ValueError, TypeError, CheckpointError, CurvatureError, NonFiniteError, PathError)

JUNK = st.one_of(
    st.sampled_from([-1, 0, -7, 2.5, -0.5, 1e300, math.nan, math.inf, -math.inf, "", "abc", b"x", 1j]),
    st.sampled_from([[], {}, [None], ["a"], {"a": 1}, object, object()]),
    st.builds(torch.empty, st.sampled_from([(0,), (0, 3), (2, 0)])),
    st.builds(
        lambda shape, value, dtype: torch.full(shape, value).to(dtype),
        st.sampled_from([(), (1,), (4,), (2, 3, 4, 5)]),
        st.sampled_from([math.nan, math.inf, -1.0]),
        st.sampled_from([torch.float32, torch.float64]),
    ),
    st.builds(lambda n: np.array(["a"] * n), st.integers(1, 3)),
    st.just(torch.ones(3, dtype=torch.complex64)),
)


def finite(answer: Any) -> bool:
    """Whether no tensor that is held in the answer has a NaN."""
    if isinstance(answer, torch.Tensor):
        return not answer.is_floating_point() or not bool(answer.isnan().any())
    if isinstance(answer, float):
        return not math.isnan(answer)
    if isinstance(answer, dict):
        return all(finite(v) for v in answer.values())
    if isinstance(answer, list | tuple):
        return all(finite(v) for v in answer)
    return True


def judge(call: Call, argument: str, value: Any) -> str | None:
    """What is wrong with the outcome; None if nothing is."""
    what = f"{call.name}({argument}={value!r})"
    try:
        answer = call.function(**{**call.arguments, argument: value})
    except OURS as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if not last.startswith(ROOMS):
            return f"{what}: {type(error).__name__} from {last}: {error}"
        return None if str(error).strip() else f"{what}: an error without a message"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {error}"
    return None if finite(answer) else f"{what}: NaN as an answer"


def test_the_calls_are_good_as_they_stand() -> None:
    for call in CALLS:
        if not call.name.endswith(".fit"):  # the fits run in the contract of the models
            assert finite(call.function(**call.arguments)), call.name


@pytest.mark.filterwarnings(
    "ignore::inference.SamplerWarning", "ignore::inference.CaptureWarning", "ignore::sde.NoiseWarning"
)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_malformed_call_ends_in_a_clear_error(call: Call) -> None:
    seen: set[str] = set()

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(sorted(set(call.arguments) - call.free)), JUNK)
    def spoil(argument: str, value: Any) -> None:
        found = judge(call, argument, value)
        if found:
            seen.add(found)

    state = random.getstate()
    spoil()
    random.setstate(state)
    assert not seen, "\n".join(sorted(seen))


def test_there_are_a_thousand() -> None:
    assert EXAMPLES * len(CALLS) >= 1000
