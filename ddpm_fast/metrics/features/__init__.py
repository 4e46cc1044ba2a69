"""Feature extractors: networks that turn images into the vectors that metrics compare.

`load_extractor` gives one, `extract` has it look at images, and `read_features` reads what was computed elsewhere.
"""

from ddpm_fast.metrics.features.extract import extract
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.file import read_features, write_features
from ddpm_fast.metrics.features.load import load_extractor

__all__ = ["Extractor", "extract", "load_extractor", "read_features", "write_features"]
