"""Which papers to cite for what ran: each algorithm names its own, beside its code.

A class of an algorithm derives from ``Citable`` and sets ``papers``; what it ran it names in ``_used``; a function is
marked by ``from_papers``.  There is no list of all papers to keep in step.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

__all__ = ["Citable", "Paper", "cite", "from_papers"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Paper(str):
    """A BibTeX entry, which is a string.

    Args:
        kind: the entry's type, such as ``"article"``.
        key: its key.
        **fields: author, title, year and such, as BibTeX has them.
    """

    key: str

    def __new__(cls, kind: str, key: str, **fields: object) -> "Paper":
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        entry = super().__new__(cls, f"@{kind}{{{key},\n{lines}\n}}")
        entry.key = key
        return entry


PYRO = Paper(
    "article",
    "bingham2019pyro",
    author="Bingham, Eli and Chen, Jonathan P. and Jankowiak, Martin and Obermeyer, Fritz and Pradhan, Neeraj and "
    "Karaletsos, Theofanis and Singh, Rohit and Szerlip, Paul and Horsfall, Paul and Goodman, Noah D.",
    title="Pyro: Deep Universal Probabilistic Programming",
    journal="Journal of Machine Learning Research",
    volume=20,
    number=28,
    pages="1--6",
    year=2019,
)


class Citable:
    """What has papers.

    Attributes:
        papers: the papers of the class itself; those of its bases are added.
    """

    papers: ClassVar[tuple[Paper, ...]] = ()

    def _used(self) -> Iterable[object]:
        """What else ran here, a kernel say: its papers are cited too."""
        return ()

    def cite(self) -> str:
        """Print and return the BibTeX entries of the papers behind this, Pyro's among them."""
        return cite(self)


def from_papers(*papers: Paper) -> Callable[[_Function], _Function]:
    """Mark a function with its papers, as ``papers`` marks a class."""

    def mark(function: _Function) -> _Function:
        vars(function)["papers"] = papers
        return function

    return mark


def cite(*things: object) -> str:
    """Print and return the BibTeX entries of the papers behind algorithms, models or results, Pyro's among them.

    Args:
        *things: classes, functions or objects of this library; a result or a fitted model stands for all that ran.

    Raises:
        TypeError: a thing has no papers to cite.

    Example:
        >>> from inference import SGLD
        >>> "Welling" in cite(SGLD)  # doctest: +ELLIPSIS
        @inproceedings{welling2011bayesian,
        ...
        True
    """
    found = {paper.key: paper for thing in things for paper in _papers(thing, set())}
    text = "\n\n".join({**found, PYRO.key: PYRO}.values())
    print(text)
    return text


def _papers(thing: Any, seen: set[int]) -> Iterator[Paper]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if not hasattr(thing, "papers"):
        raise TypeError(f"cite takes models, engines and results of this library, got {thing!r}")
    kind = thing if isinstance(thing, type) else type(thing)
    yield from thing.papers if not issubclass(kind, Citable) else ()
    for base in kind.__mro__:
        yield from vars(base).get("papers", ())
    if isinstance(thing, Citable):
        for other in thing._used():
            yield from _papers(other, seen)
