"""Metrics of whole sets of images, from their features in float64: FID, KID and the Inception Score.

All of them are computed by one thread, since several add in an order of their own: the digits are the same whatever the
process does with its cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.rng import permutation

LEAST = 2  # images: fewer have no covariance
KID_DEGREE, KID_OFFSET = 3, 1.0

Matrix = Tensor | np.ndarray


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread of PyTorch and its linear algebra; also a decorator. Restores the number there was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over feature vectors; sets are joined by adding them.

    count: vectors; total: (D,) float64, their sum; outer: (D, D) float64, the sum of x x^T.
    """

    count: int
    total: Tensor
    outer: Tensor

    @staticmethod
    @one_thread()
    def of(features: Matrix) -> Moments:
        """features: (N, D) of any float type, N may be 0. DataError where they are not finite."""
        x = _matrix(features, what="features")
        return Moments(len(x), x.sum(dim=0), x.T @ x)

    def merge(self, other: Moments) -> Moments:
        """Of both sets together. ValueError for features of another length."""
        _check_length(len(self.total), len(other.total))
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """(D,) float64. DataError for no images."""
        _check_count(self.count, least=1, what="the mean of features")
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased: divided by count - 1. DataError for fewer than 2 images."""
        _check_count(self.count, least=LEAST, what="the covariance of features")
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


@one_thread()
def fid(a: Moments, b: Moments) -> float:
    """Frechet distance of two Gaussians with these moments; 0 for equal sets.

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2))   (Dowson and Landau 1982; Heusel et al. 2017, equation 6)

    With A = F F^T and B = G G^T from symmetric eigendecompositions, the eigenvalues of A B are the squares of the
    singular values of F^T G, so that the last trace is their sum: real numbers throughout, and covariances may be
    singular, as they are for fewer images than features. Eigenvalues below rounding, and negative ones, count as 0.
    Raises DataError for fewer than 2 images on a side, ValueError for features of different lengths.
    """
    for side in (a, b):
        _check_count(side.count, least=LEAST, what="FID")
    _check_length(len(a.total), len(b.total))
    first, second = a.covariance, b.covariance
    product = _factor(first).T @ _factor(second)
    root_trace = torch.linalg.svdvals(product).sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * root_trace
    return max(float(distance), 0.0)


def kid_subset_size(num_real: int, num_fake: int, subset_size: int = 1000) -> int:
    """How many images of each set a subset of KID holds: subset_size, or as many as the smaller set has."""
    return min(subset_size, num_real, num_fake)


@one_thread()
def kid(
    real: Matrix, fake: Matrix, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel Inception Distance: mean and standard deviation over subsets of an unbiased squared MMD.

    real, fake: (N, D), (M, D) float, in an order that everybody keeps (that of the keys). The kernel is
    (x . y / D + 1)^3 (Binkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs, ICLR 2018). Subsets hold
    `kid_subset_size` images and are drawn by counted random numbers, so that the same features give the same value
    anywhere; where both sets have just that many there is one subset, and the deviation is 0. Values may be negative.
    Raises DataError for fewer than 2 images on a side or in a subset, ValueError for features of different lengths.
    """
    x, y = _matrix(real, what="features"), _matrix(fake, what="features")
    size = kid_subset_size(len(x), len(y), subset_size)
    _check_count(size, least=LEAST, what="KID")
    _check_length(x.shape[1], y.shape[1])
    if size == len(x) == len(y):
        return _squared_mmd(x, y), 0.0
    values = [
        _squared_mmd(_drawn(x, size, seed, "kid real", subset), _drawn(y, size, seed, "kid fake", subset))
        for subset in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def inception_splits(num_images: int, splits: int = 10) -> int:
    """In how many parts the Inception Score is taken: splits, or fewer so that each has 2 images."""
    return max(1, min(splits, num_images // LEAST))


@one_thread()
def inception_score(logits: Matrix, *, splits: int = 10) -> tuple[float, float]:
    """Inception Score: mean and standard deviation over parts of exp(mean KL(p(class | image) || p(class))).

    logits: (N, K) float; they are cut into `inception_splits` parts of neighbours in the order given (Salimans et al.:
    Improved techniques for training GANs, NeurIPS 2016; the deviation is that of the parts, divided by their number).
    From 1 (all images alike, or every guess the same) to K. Raises DataError for fewer than 2 images.
    """
    values = _matrix(logits, what="logits")
    count = len(values)
    _check_count(count, least=LEAST, what="the Inception Score")
    parts = inception_splits(count, splits)
    scores = []
    for part in range(parts):
        log_p = values[part * count // parts : (part + 1) * count // parts].log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - np.log(len(log_p))
        divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=1).mean()
        scores.append(float(divergence.exp()))
    return float(np.mean(scores)), float(np.std(scores))


def _factor(covariance: Tensor) -> Tensor:
    """F with F F^T = covariance, one column for each eigenvalue above rounding.   (D, D)  ->  (D, rank)"""
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding leaves about this much of eigenvalues that are 0; their roots would add up.
    threshold = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    is_positive = values > threshold
    return vectors[:, is_positive] * values[is_positive].sqrt()


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy.   x, y: (m, D) float64, m at least 2"""
    m = len(x)
    within = _kernel(x, x).fill_diagonal_(0.0).sum() + _kernel(y, y).fill_diagonal_(0.0).sum()
    return float(within / (m * (m - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + KID_OFFSET) ** KID_DEGREE


def _drawn(x: Tensor, size: int, seed: int, purpose: str, subset: int) -> Tensor:
    """A subset of rows, without replacement.   (N, D)  ->  (size, D)"""
    return x[torch.from_numpy(permutation(seed, len(x), purpose, subset)[:size])]


def _matrix(values: Matrix, *, what: str) -> Tensor:
    """(N, D) float64 on the CPU. ValueError for another shape, DataError for numbers that are not finite."""
    # A copy, which PyTorch aligns: products of the same numbers at another address may differ in the last digit.
    if isinstance(values, np.ndarray):
        matrix = torch.tensor(values, dtype=torch.float64)
    else:
        matrix = values.detach().to("cpu", torch.float64, copy=True)
    if matrix.ndim != 2:
        raise ValueError(f"{what} must be (N, D); got {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        row = int((~matrix.isfinite()).any(dim=1).nonzero()[0])
        raise DataError(f"{what} of image {row} of {len(matrix)} are not finite; leave out images that are not")
    return matrix


def _check_count(count: int, *, least: int, what: str) -> None:
    if count < least:
        raise DataError(f"{what} needs at least {least} images on each side, got {count}; give more images")


def _check_length(one: int, other: int) -> None:
    if one != other:
        raise ValueError(f"features of {one} and of {other} numbers come from different networks")
