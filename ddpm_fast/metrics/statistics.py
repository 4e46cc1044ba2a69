"""The number, mean and covariance of features, added up in float64 in any number of parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.metrics.inputs import Array, as_tensor

LARGEST = 1 << 14  # numbers of a vector: their covariance takes 2 GiB
_PIECE = 1 << 23  # numbers that are brought to float64 at once: 64 MiB


class Statistics:
    """The number, mean and covariance of vectors that come in parts.

    Each part is centred before its products are summed, and parts are joined by the update of Chan et al. 1979, so that
    nothing cancels where the mean is large.

    Attributes:
        n: How many vectors there are. 0 together with a covariance means that the number is not known, as of another
            code's file.
        mean: float64 [d].
    """

    def __init__(self, dimensions: int):
        """Start without vectors."""
        d = check_integer("the length of a feature", dimensions, 1, LARGEST)
        self.n = 0
        self.mean = torch.zeros(d, dtype=torch.float64)
        self._products = torch.zeros(d, d, dtype=torch.float64)  # of deviations from the mean, summed
        self._covariance: Tensor | None = None  # only where n is not known

    @classmethod
    def of(cls, features: Array) -> Statistics:
        """Those of vectors [n, d]."""
        vectors = as_tensor("features", features, "[n, d]", 2)
        made = cls(vectors.shape[1])
        made.add(vectors)
        return made

    @classmethod
    def from_moments(cls, n: int, mean: Array, covariance: Array) -> Statistics:
        """Those of vectors that others have counted.

        Args:
            n: How many vectors, at least 2; 0 if that is not known, and then nothing can be added.
            mean: Their mean, [d].
            covariance: Their covariance, [d, d], divided by n - 1.

        Raises:
            InputError: If the shapes do not fit, or numbers are not finite.
        """
        number = check_integer("n", n, 0, 2**53)
        first = as_tensor("mean", mean, "[d]", 1).to("cpu", torch.float64)
        second = as_tensor("covariance", covariance, "[d, d]", 2).to("cpu", torch.float64)
        if second.shape != (len(first), len(first)):
            raise InputError(
                f"the mean has shape {list(first.shape)} and the covariance {list(second.shape)}; expected [d] and "
                "[d, d]"
            )
        if number == 1:
            raise InputError("n is 1, and one vector has no covariance; expected at least 2, or 0 for not known")
        made = cls(len(first))
        made.n, made.mean = number, first.clone()
        if number:
            made._products = second * (number - 1)
            if not bool(made._products.isfinite().all()):
                raise InputError(f"the covariance times n - 1 = {number - 1} is too large for float64")
        else:
            made._covariance = second.clone()
        return made

    @classmethod
    def joined(cls, packed: Iterable[Tensor]) -> Statistics:
        """Those of all vectors that several processes have counted.

        Args:
            packed: What `packed` of each gave, in an order that is the same everywhere; at least one.

        Raises:
            InputError: If a tensor is none of these, or they are of different dimensions.
        """
        made: Statistics | None = None
        for given in packed:
            part = as_tensor("packed statistics", given, "[1 + d + d^2]", 1)
            d = round(((4 * max(1, part.numel()) - 3) ** 0.5 - 1) / 2)
            if part.dtype != torch.float64 or d < 1 or part.numel() != 1 + d + d * d:
                raise InputError(f"got {part.dtype} {list(part.shape)}; expected what Statistics.packed gives")
            made = cls(d) if made is None else made
            numbers = part.cpu()
            made._check_length(d)
            made._join(int(numbers[0]), numbers[1 : 1 + d], numbers[1 + d :].reshape(d, d))
        if made is None:
            raise InputError("got no parts; expected what Statistics.packed of each process gives")
        return made

    @property
    def packed(self) -> Tensor:
        """All of it as one float64 tensor of 1 + d + d^2 numbers, for other processes; see `joined`."""
        self._check_counted()
        head = torch.tensor([self.n], dtype=torch.float64)
        return torch.cat([head, self.mean, self._products.flatten()])

    @property
    def covariance(self) -> Tensor:
        """float64 [d, d], divided by n - 1.

        Raises:
            InputError: If there are fewer than two vectors.
        """
        if self._covariance is not None:
            return self._covariance
        if self.n < 2:
            raise InputError(f"a covariance needs at least two images, and there are {self.n}")
        return self._products / (self.n - 1)

    def add(self, features: Array) -> None:
        """Add vectors [n, d] of any dtype; n may be 0.

        Raises:
            InputError: If their shape does not fit, or numbers are not finite.
        """
        vectors = as_tensor("features", features, "[n, d]", 2)
        self._check_length(vectors.shape[1])
        self._check_counted()
        for piece in vectors.split(max(1, _PIECE // vectors.shape[1])):
            part = piece.to("cpu", torch.float64)
            mean = part.mean(0)
            centred = part - mean
            self._join(len(part), mean, centred.T @ centred)

    def merge(self, other: Statistics) -> None:
        """Add the vectors that another has counted.

        Raises:
            InputError: If their length is another one, or one of the two does not know how many it has.
        """
        self._check_length(len(other.mean))
        self._check_counted()
        other._check_counted()
        self._join(other.n, other.mean, other._products)

    def _join(self, n: int, mean: Tensor, products: Tensor) -> None:
        if not n:
            return
        both = self.n + n
        apart = mean - self.mean
        self._products += products + torch.outer(apart, apart) * (self.n * n / both)
        self.mean += apart * (n / both)
        self.n = both

    def _check_length(self, length: int) -> None:
        if length != len(self.mean):
            raise InputError(f"vectors of {length} numbers do not join those of {len(self.mean)}")

    def _check_counted(self) -> None:
        if self._covariance is not None:
            raise InputError("nothing joins statistics whose number of images is not known")
