"""Objectives for densities known up to a constant: compositional maximum likelihood and its peers, one interface."""

from inference.objectives.unnormalised.compositional import CompositionalLikelihood
from inference.objectives.unnormalised.conditional import ConditionalCompositionalLikelihood
from inference.objectives.unnormalised.contrastive import (
    ExponentialNoiseContrastive,
    NoiseContrastive,
    NormalisedSGD,
    SelfNormalisedLikelihood,
)
from inference.objectives.unnormalised.divergence import ContrastiveDivergence
from inference.objectives.unnormalised.schedules import Cosine, InverseTime, Proximal, TargetVariance
from inference.objectives.unnormalised.score import DenoisingScoreMatching, SlicedScoreMatching

__all__ = [
    "CompositionalLikelihood",
    "ConditionalCompositionalLikelihood",
    "ContrastiveDivergence",
    "Cosine",
    "DenoisingScoreMatching",
    "ExponentialNoiseContrastive",
    "InverseTime",
    "NoiseContrastive",
    "NormalisedSGD",
    "Proximal",
    "SelfNormalisedLikelihood",
    "SlicedScoreMatching",
    "TargetVariance",
]
