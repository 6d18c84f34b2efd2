"""The library's own warnings and errors, so that users can filter or catch them by name."""

__all__ = [
    "CaptureWarning",
    "CheckpointError",
    "CollapseError",
    "CurvatureError",
    "DependentDataError",
    "NonFiniteError",
    "RankError",
    "SamplerWarning",
]


class CaptureWarning(UserWarning):
    """A model could not be captured as a graph; it runs one chain at a time, slower but correct."""


class SamplerWarning(UserWarning):
    """A sampler ran, but its draws need a second look (divergences, clamped noise, chains lost)."""


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or every chain became NaN or infinite; the message names the step and the parameter."""


class CurvatureError(ArithmeticError):
    """A density has no Gaussian approximation at a point: it is flat or a saddle there; the message names the sites."""


class DependentDataError(ValueError):
    """Data points depend on each other given the continuous latents, so that they have no likelihoods of their own."""


class CollapseError(ArithmeticError):
    """The importance weights behind an estimate of log Z collapsed to a few draws, so that it means nothing."""


class CheckpointError(RuntimeError):
    """A checkpoint or saved file is truncated, foreign, of another run, or of an unknown version.

    Nothing in it was executed.
    """


class RankError(RuntimeError):
    """A process of a job with several (``torchrun``) is gone or did not answer; the message says which rank."""
