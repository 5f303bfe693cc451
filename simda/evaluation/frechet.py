"""How far two sets of feature vectors are apart, as distributions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def frechet_distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Squared Frechet distance between the normal distributions that fit two sets of vectors, [n, d] and [m, d].

    |mu_1 - mu_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), zero for equal means and covariances.

    Raises:
        ValueError: the vectors differ in length, or a set has fewer than two.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
    arXiv 1706.08500, eq. 6, there on the features of a classifier of images.
    """
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ValueError(f"vectors are {one.shape} and {other.shape}: give [n, d] and [m, d], n and m at least 2")
    c_one, c_other = (np.atleast_2d(np.cov(vectors, rowvar=False)) for vectors in (one, other))
    # The product of two covariances has real eigenvalues that are not negative, but for rounding.
    roots = np.sqrt(np.clip(np.linalg.eigvals(c_one @ c_other).real, 0, None))
    between = np.square(one.mean(axis=0) - other.mean(axis=0)).sum()
    return max(0.0, float(between + np.trace(c_one) + np.trace(c_other) - 2 * roots.sum()))
