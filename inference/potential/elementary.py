"""Elementary functions in forms that are quick in compiled code on processors.

* tanh in single precision: the compiler's own takes more time than all else in a small network.  ``tanh(x) / x`` is a
  ratio of polynomials of degree 4 in x^2, the best in relative error on [-9, 9] (2e-8; found by reweighted least
  squares), beyond which tanh is 1 to the last digit.  In single precision it is right to 4e-7, relative.
* Log-likelihoods of logits: torch writes ``log(1 + exp(-x))`` as ``m + log(exp(-m) + exp(-x - m))`` with
  ``m = max(-x, 0)`` and takes a third exponential for the slope.  The logarithm is ``log(1 + exp(-|x|))``, and the
  sigmoid follows from the same exponential.
"""

from typing import Any

import torch
from torch import fx

__all__ = ["quick_logits", "quick_tanh"]

_aten = torch.ops.aten
_NUMERATOR = (
    0.9999999794745913,
    0.13381028427667097,
    0.0034955913631902536,
    2.0609132435304638e-05,
    1.335472490995e-08,
)
_DENOMINATOR = (1.0, 0.46714344025216215, 0.025876994705756128, 0.0003285639976425052, 7.776585538397924e-07)
_REACH = 9.0


def quick_tanh(graph: fx.Graph) -> None:
    """Replace each tanh whose node says in ``meta`` that it gives float32 on the CPU."""
    for node in list(graph.nodes):
        if node.target is not _aten.tanh.default or not node.meta.get("cpu") or node.meta["dtype"] != torch.float32:
            continue
        with graph.inserting_before(node):
            x = graph.call_function(_aten.clamp.default, (node.args[0], -_REACH, _REACH))
            square = graph.call_function(_aten.mul.Tensor, (x, x))
            above = graph.call_function(_aten.mul.Tensor, (x, _polynomial(graph, square, _NUMERATOR)))
            ratio = graph.call_function(_aten.div.Tensor, (above, _polynomial(graph, square, _DENOMINATOR)))
            result = graph.call_function(_aten.clamp.default, (ratio, -1.0, 1.0))
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _polynomial(graph: fx.Graph, x: fx.Node, coefficients: tuple[float, ...]) -> fx.Node:
    """Horner's rule, the constant first."""
    *lower, highest = coefficients
    value = graph.call_function(_aten.mul.Tensor, (x, highest))
    for coefficient in lower[:0:-1]:
        value = graph.call_function(_aten.mul.Tensor, (graph.call_function(_aten.add.Tensor, (value, coefficient)), x))
    return graph.call_function(_aten.add.Tensor, (value, lower[0]))


def quick_logits(graph: fx.Graph) -> None:
    """Replace such logarithms on the CPU, and the sigmoids of the same logits; what they came from is left unused."""
    small: dict[Any, fx.Node] = {}  # logits -> exp(-|x|)
    for node in list(graph.nodes):
        x = _logits(node)
        if x is not None and node.meta.get("cpu"):
            with graph.inserting_before(node):
                size = graph.call_function(_aten.abs.default, (x,))
                small[x] = graph.call_function(_aten.exp.default, (graph.call_function(_aten.neg.default, (size,)),))
                result = graph.call_function(_aten.log.default, (_one_and(graph, small[x]),))
        elif node.target is _aten.sigmoid.default and node.args[0] in small:
            e = small[node.args[0]]
            with graph.inserting_before(node):
                positive = graph.call_function(_aten.ge.Scalar, (node.args[0], 0.0))
                one = graph.call_function(_aten.full_like.default, (e, 1.0))
                above = graph.call_function(_aten.where.self, (positive, one, e))
                result = graph.call_function(_aten.div.Tensor, (above, _one_and(graph, e)))
        else:
            continue
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _one_and(graph: fx.Graph, e: fx.Node) -> fx.Node:
    return graph.call_function(_aten.add.Tensor, (e, 1.0))


def _logits(node: Any) -> Any:
    """x where the node is ``log(exp(-m) + exp(-x - m))`` with ``m = max(-x, 0)``, else None."""
    first, second = _arguments(_arguments(node, _aten.log.default)[0], _aten.add.Tensor)
    largest = _arguments(_arguments(first, _aten.exp.default)[0], _aten.neg.default)[0]
    shifted = _arguments(_arguments(second, _aten.exp.default)[0], _aten.sub.Tensor)
    negative, floor = _arguments(largest, _aten.clamp_min.default)
    if negative is None or floor != 0 or shifted != (negative, largest):
        return None
    return _arguments(negative, _aten.neg.default)[0]


def _arguments(node: Any, target: Any) -> tuple[Any, Any]:
    """The first two arguments of a node of this operation; None for what there is not."""
    if not isinstance(node, fx.Node) or node.target is not target:
        return None, None
    return (*node.args, None)[:2]  # type: ignore[return-value]
