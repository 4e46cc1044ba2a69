"""What samples are worth: how a set of images compares with another."""

from ddpm_fast.metrics.frechet import FrechetEstimate, estimate_frechet, frechet_distance
from ddpm_fast.metrics.inception import InceptionScore, inception_score
from ddpm_fast.metrics.kernel import KernelDistance, kernel_distance
from ddpm_fast.metrics.manifold import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    precision_recall,
    sample_densities,
)
from ddpm_fast.metrics.memorisation import Memorisation, Nearest, memorisation, nearest
from ddpm_fast.metrics.statistics import Statistics

__all__ = [
    "DensityCoverage",
    "FrechetEstimate",
    "InceptionScore",
    "KernelDistance",
    "Memorisation",
    "Nearest",
    "PrecisionRecall",
    "Statistics",
    "density_coverage",
    "estimate_frechet",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "memorisation",
    "nearest",
    "precision_recall",
    "sample_densities",
]
