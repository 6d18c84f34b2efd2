"""Where a run stands: one line on the terminal, or calls to a function of the user's."""

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from inference._errors import SamplerWarning

__all__ = ["Progress"]


class Progress:
    """Shows how far a run is. It never stops the run: what goes wrong in here is reported once as a warning.

    Args:
        total: the number of steps of the whole run.
        description: what is running.
        enabled: True for one line on standard error, False for nothing, or a function that is called with a dictionary
            of ``description``, ``step``, ``total`` and the fields of :meth:`update`. Of what it raises, only what is no
            ``Exception`` (``KeyboardInterrupt``) passes through.
    """

    def __init__(self, total: int, description: str, enabled: bool | Callable[[dict[str, Any]], None] = True) -> None:
        if not isinstance(enabled, bool) and not callable(enabled):
            raise TypeError(f"progress must be True, False or a function of one dictionary, got {enabled!r}")
        self.total = total
        self.description = description
        self._call = None if isinstance(enabled, bool) else enabled
        self._bar = tqdm(total=total, desc=description, leave=True, dynamic_ncols=True) if enabled is True else None
        self._warned = False

    def update(self, step: int, **fields: Any) -> None:
        """Report that ``step`` steps are done, with what is worth showing (plain numbers and strings)."""
        try:
            if self._call is not None:
                self._call({"description": self.description, "step": step, "total": self.total, **fields})
            if self._bar is not None:
                self._bar.set_postfix(fields, refresh=False)
                self._bar.update(step - self._bar.n)
        except Exception as error:
            self._warn(error)

    def close(self) -> None:
        """Finish the line. May be called more than once."""
        try:
            if self._bar is not None:
                self._bar.close()
        except Exception as error:
            self._warn(error)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the progress report of {self.description!r} failed, the run goes on: {error!r}",
                SamplerWarning,
                stacklevel=3,
            )
