"""FID, KID and the Inception Score: closed forms, a plain reference, torchmetrics, and sums in any grouping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from data_pipeline.errors import DataError
from data_pipeline.rng import permutation
from rddm_dist.evaluation.distribution import (
    Moments,
    fid,
    inception_score,
    inception_splits,
    kid,
    kid_subset_size,
)


def features(count: int, dim: int = 8, *, seed: int = 0, offset: float = 0.0, scale: float = 1.0) -> Tensor:
    """Correlated features of (count, dim) float32."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, dim)) @ np.random.default_rng(100 + seed).normal(size=(dim, dim))
    return torch.from_numpy(mixed * scale + offset).float()


def numpy_fid(x: Tensor, y: Tensor) -> float:
    """Straight from the formula: the trace of the root of a product is the sum of the roots of its eigenvalues."""
    a, b = x.double().numpy(), y.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


class Passing(nn.Module):
    """A feature network for torchmetrics that takes features for images."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(("count", "dim", "offset"), [(50, 8, 0.0), (300, 20, 1.0), (200, 8, 100.0)])
def test_fid_is_that_of_a_plain_reference(count: int, dim: int, offset: float) -> None:
    x = features(count, dim, seed=1, offset=offset)
    y = features(count + 7, dim, seed=2, offset=offset, scale=1.3)
    expected = numpy_fid(x, y)
    assert expected > 1
    assert fid(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-6)


def test_fid_is_that_of_torchmetrics() -> None:
    x, y = features(60, seed=1), features(80, seed=2)
    metric = FrechetInceptionDistance(feature=Passing(8), normalize=True)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert fid(Moments.of(x), Moments.of(y)) == pytest.approx(float(metric.compute()), rel=1e-5)


@pytest.mark.parametrize(("count", "other", "dim"), [(2, 2, 16), (5, 9, 64), (10, 200, 64)])
def test_fid_holds_for_fewer_images_than_features(count: int, other: int, dim: int) -> None:
    x, y = features(count, dim, seed=1), features(other, dim, seed=2)
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x.double(), y.double()))
    # tr (A B)^(1/2) is the sum of singular values of a b^T, from the features themselves.
    expected = (x.double().mean(0) - y.double().mean(0)).square().sum() + a.square().sum() + b.square().sum()
    expected = expected - 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert fid(Moments.of(x), Moments.of(y)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("count", [3, 40])
def test_fid_of_a_set_with_itself_is_zero(count: int) -> None:
    x = Moments.of(features(count, 16))
    assert fid(x, x) == pytest.approx(0.0, abs=1e-9)


def test_fid_of_equal_images_is_the_distance_of_their_features() -> None:
    x, y = torch.zeros(3, 4), torch.tensor([[1.0, 2.0, 2.0, 0.0]]).repeat(5, 1)
    assert fid(Moments.of(x), Moments.of(y)) == pytest.approx(9.0)


def test_fid_of_a_shift_and_a_scale_has_a_closed_form() -> None:
    x = features(100).double()
    shift = torch.arange(8.0, dtype=torch.float64)
    spread = float(x.T.cov().trace())
    assert fid(Moments.of(x), Moments.of(x + shift)) == pytest.approx(float(shift.square().sum()), rel=1e-9)
    # sqrt(A * 9 A) = 3 A, so that tr(A + 9 A - 6 A) is left.
    centred = x - x.mean(0)
    assert fid(Moments.of(centred), Moments.of(3 * centred)) == pytest.approx(4 * spread, rel=1e-9)


def test_fid_is_symmetric() -> None:
    x, y = Moments.of(features(30, seed=1)), Moments.of(features(40, seed=2))
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-10)


@pytest.mark.parametrize("parts", [(100,), (1,) * 100, (50, 50), (99, 1), (3, 0, 90, 7)])
def test_moments_merge_in_any_grouping(parts: tuple[int, ...]) -> None:
    x, y = features(100, 16, seed=1), Moments.of(features(70, 16, seed=2))
    pieces = [Moments.of(piece) for piece in x.split(parts)]
    left = pieces[0]
    for piece in pieces[1:]:
        left = left.merge(piece)
    right = pieces[-1]
    for piece in pieces[-2::-1]:
        right = piece.merge(right)
    whole = Moments.of(x)
    for merged in (left, right):
        assert merged.count == 100
        assert torch.allclose(merged.mean, x.double().mean(0), rtol=1e-9, atol=0)
        assert torch.allclose(merged.covariance, x.double().T.cov(), rtol=1e-9, atol=1e-9)
        assert fid(merged, y) == pytest.approx(fid(whole, y), rel=1e-9)


@pytest.mark.filterwarnings("error::UserWarning")
def test_moments_of_arrays_and_tensors_are_the_same_float64() -> None:
    x = features(9)
    array = x.numpy().copy()
    array.flags.writeable = False  # as those that are read from files
    from_array, from_tensor = Moments.of(array), Moments.of(x)
    assert from_tensor.total.dtype == from_tensor.outer.dtype == torch.float64
    assert torch.equal(from_array.outer, from_tensor.outer) and torch.equal(from_array.total, from_tensor.total)


def mmd_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate, one pair after the other."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    m = len(x)
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(m) for j in range(m) if i != j)
    return within / (m * (m - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / m**2


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_kid_of_whole_sets_is_the_unbiased_estimate_and_that_of_torchmetrics() -> None:
    x, y = features(12, 4, seed=1).double(), features(12, 4, seed=2).double()
    value, deviation = kid(x, y)
    assert deviation == 0
    assert value == pytest.approx(mmd_by_loops(x.numpy(), y.numpy()), rel=1e-10)
    metric = KernelInceptionDistance(feature=Passing(4), subsets=1, subset_size=12, normalize=True)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert value == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_kid_over_subsets_is_mean_and_deviation_of_drawn_ones() -> None:
    x, y = features(20, 4, seed=1), features(11, 4, seed=2)
    drawn = []
    for i in range(5):
        one, other = permutation(3, 20, "kid real", i)[:6], permutation(3, 11, "kid fake", i)[:6]
        drawn.append(mmd_by_loops(x.double().numpy()[one], y.double().numpy()[other]))
    value, deviation = kid(x, y, subsets=5, subset_size=6, seed=3)
    assert value == pytest.approx(np.mean(drawn), rel=1e-9)
    assert deviation == pytest.approx(np.std(drawn), rel=1e-9) and deviation > 0


def test_kid_is_the_same_every_time_and_another_for_another_seed() -> None:
    x, y = features(30, seed=1), features(30, seed=2)
    first = kid(x, y, subsets=3, subset_size=10, seed=1)
    assert kid(x, y, subsets=3, subset_size=10, seed=1) == first
    assert kid(x, y, subsets=3, subset_size=10, seed=2) != first


@pytest.mark.parametrize(("real", "fake", "expected"), [(5000, 2000, 1000), (1000, 300, 300), (2, 9, 2)])
def test_kid_subsets_hold_no_more_than_the_smaller_set(real: int, fake: int, expected: int) -> None:
    assert kid_subset_size(real, fake) == expected


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save:UserWarning")
def test_inception_score_of_one_part_is_that_of_torchmetrics() -> None:
    logits = features(50, 10, seed=4)
    metric = InceptionScore(feature=Passing(10), splits=1)
    metric.update(logits)
    value, deviation = inception_score(logits, splits=1)
    assert value == pytest.approx(float(metric.compute()[0]), rel=1e-5) and value > 1
    assert deviation == 0


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_inception_score_is_the_number_of_classes_for_sure_guesses_of_each(classes: int) -> None:
    logits = 1000 * torch.eye(classes).repeat(4, 1)
    assert inception_score(logits, splits=2) == pytest.approx((classes, 0.0))


def test_inception_score_is_one_when_all_images_look_alike() -> None:
    assert inception_score(features(1, 7).repeat(20, 1)) == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize(("count", "splits", "parts"), [(50, 10, 10), (7, 10, 3), (23, 4, 4), (2, 10, 1), (3, 10, 1)])
def test_inception_score_is_mean_and_deviation_of_parts_in_order(count: int, splits: int, parts: int) -> None:
    logits = features(count, 6, seed=5)
    assert inception_splits(count, splits) == parts
    cuts = [count * part // parts for part in range(parts + 1)]
    scores = [inception_score(logits[low:high], splits=1)[0] for low, high in zip(cuts, cuts[1:], strict=False)]
    assert inception_score(logits, splits=splits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def all_digits(x: Tensor, y: Tensor) -> list[Any]:
    a, b = Moments.of(x), Moments.of(y)
    return [a.total.tolist(), a.outer.tolist(), fid(a, b), kid(x, y, subsets=2, subset_size=250), inception_score(x)]


@pytest.mark.usefixtures("threads")
def test_digits_do_not_depend_on_the_number_of_threads_and_it_is_restored() -> None:
    x, y = features(300, 256, seed=1), features(300, 256, seed=2)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(all_digits(x, y))
        assert torch.get_num_threads() == count
    assert found[0] == found[1] == found[2]
    torch.set_num_threads(2)
    with pytest.raises(DataError, match="not finite"):
        Moments.of(x / 0)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("form", [torch.from_numpy, np.asarray])
def test_features_at_any_address_give_the_same_digits(form: Callable[[np.ndarray], Tensor | np.ndarray]) -> None:
    torch.set_num_threads(1)
    x, y = features(100, 65, seed=1).double().numpy(), features(100, 65, seed=2)
    found = set()
    for offset in range(8):
        shifted = np.empty(x.size + offset)[offset:].reshape(x.shape)
        shifted[:] = x
        found.add(kid(form(shifted), y))
    assert len(found) == 1


def test_fewer_than_two_images_are_refused() -> None:
    one, many = features(1), features(5)
    with pytest.raises(DataError, match="FID needs at least 2 images on each side, got 1"):
        fid(Moments.of(one), Moments.of(many))
    with pytest.raises(DataError, match="FID needs at least 2 images on each side, got 0"):
        fid(Moments.of(many), Moments.of(features(0)))
    with pytest.raises(DataError, match="KID needs at least 2"):
        kid(many, one)
    with pytest.raises(DataError, match="the Inception Score needs at least 2"):
        inception_score(one)


def test_features_that_are_not_finite_are_refused() -> None:
    x = features(4)
    x[2, 3] = float("nan")
    with pytest.raises(DataError, match="features of image 2 of 4 are not finite"):
        Moments.of(x)
    with pytest.raises(DataError, match="not finite"):
        kid(features(4), x)


def test_features_of_different_networks_are_not_compared() -> None:
    with pytest.raises(ValueError, match="features of 8 and of 4 numbers"):
        fid(Moments.of(features(5, 8)), Moments.of(features(5, 4)))
    with pytest.raises(ValueError, match="different networks"):
        Moments.of(features(5, 8)).merge(Moments.of(features(5, 4)))
