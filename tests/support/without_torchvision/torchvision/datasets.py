"""What torch-fidelity derives classes from: see the package."""


class CIFAR10:
    """Nothing."""


class CIFAR100:
    """Nothing."""


class STL10:
    """Nothing."""
