"""Makes features.npz: what torch-fidelity's Inception network gives for made-up weights and images.

    PYTHONPATH=.:tests python tests/golden/make_features.py

Needs torch-fidelity 0.4.0 and torchvision, which it imports. Every eighth feature and logit is kept.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from support.feature_networks import INCEPTION_IMAGES, inception_state, made_images
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x


def main() -> None:
    state = inception_state()
    # What their file has as well, and no formula uses.
    counts = {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in state if "_var" in name}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(state | counts, path)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
    images = made_images(INCEPTION_IMAGES)
    with torch.no_grad():
        features, logits = network(images)
    resized = interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299), align_corners=False)
    np.savez_compressed(
        Path(__file__).with_name("features.npz"),
        features=features[:, ::8].numpy(),
        logits=logits[:, ::8].numpy(),
        resized=resized[:, :, ::13, ::17].numpy(),
    )


if __name__ == "__main__":
    main()
