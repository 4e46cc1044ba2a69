"""Makes edm2.npz with the code of EDM2.

    PYTHONPATH=. python tests/golden/make_edm2.py EDM2

The argument is a checkout of github.com/NVlabs/edm2, whose training/phema.py is asked for exponents, decays and the
coefficients of reconstructions.
"""

import importlib
import sys
from pathlib import Path

import numpy as np

from tests.nn.test_reconstruction import CASES, STEPS, WIDTHS


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    phema = importlib.import_module("training.phema")
    widths = np.array(WIDTHS)
    golden = {
        "exponents": phema.std_to_exp(widths),
        "decays": np.array([phema.power_function_beta(widths, step, 1) for step in STEPS]),
    }
    for name, (given, wanted) in CASES.items():
        columns = [np.array(column, np.float64) for pairs in (given, wanted) for column in zip(*pairs, strict=True)]
        golden[name] = phema.solve_posthoc_coefficients(*columns)
    np.savez_compressed(Path(__file__).parent / "edm2.npz", **golden)


if __name__ == "__main__":
    main()
