"""Makes metrics.npz: what the evaluator of guided-diffusion (ADM) and the authors of density and coverage compute.

    PYTHONPATH=.:tests python tests/golden/make_metrics.py GUIDED_DIFFUSION PRDC

The arguments are checkouts of github.com/openai/guided-diffusion and github.com/clovaai/generative-evaluation-prdc.
What they get is made up (tests/support/metric_cases.py). TensorFlow is not needed: the evaluator's distances run with
numpy's functions in place of TensorFlow's, in float64 where it takes float16, and no network runs.
"""

import contextlib
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import scipy.linalg
from support.metric_cases import features, few_features, logits, moments

HERE = Path(__file__).parent


def main() -> None:
    evaluator = load_evaluator(sys.argv[1])
    sys.path.insert(0, sys.argv[2])
    prdc = importlib.import_module("prdc.prdc")
    real, fake = features()
    golden: dict[str, object] = {}
    for name, (first, second) in {"many": (real, fake), "few": few_features()}.items():
        pair = [evaluator.FIDStatistics(*moments(vectors)) for vectors in (first, second)]
        golden[f"frechet/{name}"] = pair[0].frechet_distance(pair[1])
    real, fake = real.double().numpy(), fake.double().numpy()
    for k in (1, 3):
        estimator = evaluator.ManifoldEstimator(None, row_batch_size=100, col_batch_size=70, nhood_sizes=(k,))
        estimator.distance_block = Distances(evaluator)
        radii = [estimator.manifold_radii(vectors).astype(np.float64) for vectors in (real, fake)]
        golden[f"precision_recall/{k}"] = np.ravel(estimator.evaluate_pr(real, radii[0], fake, radii[1]))
    for k in (1, 5):
        found = prdc.compute_prdc(real, fake, nearest_k=k)
        golden[f"density_coverage/{k}"] = [found["density"], found["coverage"]]
    for size in (64, 5000):
        golden[f"inception_score/{size}"] = inception_score(evaluator, size)
    print(golden)
    np.savez(HERE / "metrics.npz", **golden)


def load_evaluator(checkout: str) -> ModuleType:
    """Their module, with numpy's functions under TensorFlow's names."""
    names = {"reduce_sum": np.sum, "square": np.square, "reshape": np.reshape, "maximum": np.maximum}
    tensorflow = SimpleNamespace(
        matmul=lambda a, b, _, transposed: a @ (b.T if transposed else b),
        variable_scope=lambda _: contextlib.nullcontext(),
        **names,
    )
    compat = SimpleNamespace(v1=tensorflow)
    modules = {"tensorflow": SimpleNamespace(compat=compat), "tensorflow.compat": compat, "requests": SimpleNamespace()}
    sys.modules.update({**modules, "tensorflow.compat.v1": tensorflow})
    sys.path.insert(0, f"{checkout}/evaluations")
    module = importlib.import_module("evaluator")
    module.DistanceBlock = lambda _: None
    # scipy 1.18 has no `disp`, with which it returned a pair.
    module.linalg = SimpleNamespace(sqrtm=lambda a, disp: (scipy.linalg.sqrtm(a), 0))
    return module


class Distances:
    """Their DistanceBlock without a session."""

    def __init__(self, module: ModuleType) -> None:
        self.pairwise_distances = module._batch_pairwise_distances

    def less_thans(self, first, first_radii, second, second_radii):
        distances = self.pairwise_distances(first, second)[..., None]
        return np.any(distances <= second_radii, axis=1), np.any(distances <= first_radii[:, None], axis=0)


def inception_score(module: ModuleType, split_size: int) -> float:
    """Theirs of the logits, which its session turns into shares."""

    def softmax(_: object, feed_dict: dict) -> np.ndarray:
        (values,) = feed_dict.values()
        shares = np.exp(values - values.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    session = SimpleNamespace(run=softmax)
    stand_in = SimpleNamespace(sess=session, softmax=None, softmax_input="x", softmax_batch_size=100)
    return module.Evaluator.compute_inception_score(stand_in, logits().double().numpy(), split_size)


if __name__ == "__main__":
    main()
