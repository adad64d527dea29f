"""How near made images are to real ones, by features of a model: distributions and neighbors.

All in float64, on the host: rounding in a covariance is a difference between distributions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CHUNK = 1024  # rows of distances at once
MOST = 2**24  # distances at once, 128 MB
NEIGHBORS = 3  # within whose distance a set's neighborhoods reach
COPY = 0.5  # of what held-out images are usually away from training images: nearer is a copy


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features that were seen so far, batch by batch.

    Attributes:
      count: N.
      mean: f64[D].
      scatter: f64[D, D], the sum of the products of what rows are away from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """f64[D, D], unbiased.

        Raises:
          ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError("a covariance needs two images or more")
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray, before: Moments | None = None) -> Moments:
    """Of features f[N, D], and of those that were seen before (Chan et al. 1979).

    Examples:
      >>> first = moments(np.array([[0.0], [2.0]]))
      >>> both = moments(np.array([[4.0]]), first)
      >>> both.mean.tolist(), both.covariance.tolist()
      ([2.0], [[4.0]])
    """
    rows = np.asarray(features, np.float64)
    mean = rows.mean(0)
    away = rows - mean
    found = Moments(len(rows), mean, away.T @ away)
    if before is None:
        return found
    count, apart = before.count + len(rows), mean - before.mean
    between = np.outer(apart, apart) * (before.count * len(rows) / count)
    return Moments(
        count,
        before.mean + apart * (len(rows) / count),
        before.scatter + found.scatter + between,
    )


def frechet_distance(made: np.ndarray, real: np.ndarray) -> float:
    """`frechet_between` the moments of features f[N, D] and f[M, D].

    Raises:
      ValueError: fewer than two rows.
    """
    return frechet_between(*(_all_moments(features) for features in (made, real)))


def _all_moments(features: np.ndarray) -> Moments:
    """In chunks: a copy of all features in float64 is not made."""
    found = None
    for start in range(0, len(features), CHUNK):
        found = moments(features[start : start + CHUNK], found)
    if found is None:
        raise ValueError("a covariance needs two images or more")
    return found


def frechet_between(made: Moments, real: Moments) -> float:
    """Between the normal distributions with these means and covariances.

    |m1 - m2|² + tr(C1 + C2 - 2·(C1·C2)^½) (Heusel et al. 2017, https://arxiv.org/abs/1706.08500),
    FID where the features are Inception's. The root's trace is the sum of the roots of the
    eigenvalues of C1^½·C2·C1^½, a symmetric matrix, so that nothing imaginary comes out. Means over
    few images are biased: with fewer rows than features the covariances are not of full rank.

    Raises:
      ValueError: fewer than two rows.
    """
    first, second = made.covariance, real.covariance
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    both = np.linalg.eigvalsh(root @ second @ root)
    trace = np.trace(first) + np.trace(second) - 2 * np.sqrt(np.maximum(both, 0)).sum()
    return float(np.sum((made.mean - real.mean) ** 2) + trace)


def nearest(queries: np.ndarray, others: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(i[N] the nearest of `others`, f64[N] the distance of the k-th nearest), Euclidean.

    Args:
      queries: f[N, D].
      others: f[M, D], M at least k.
      k: 1 for the nearest's own distance.
    """
    queries, others = np.asarray(queries, np.float64), np.asarray(others, np.float64)
    squares = np.sum(others**2, axis=1)
    which, far = [], []
    for rows in _chunks(queries, len(others)):
        products = rows @ others.T
        squared = np.sum(rows**2, axis=1)[:, None] + squares[None] - 2 * products  # [n, M]
        first = squared.argmin(1)
        which.append(first)
        if k == 1:  # of the difference itself: next to zero the above is rounding
            far.append(np.linalg.norm(rows - others[first], axis=1))
        else:
            kth = np.partition(squared, k - 1, axis=1)[:, k - 1]
            far.append(np.sqrt(np.maximum(kth, 0)))
    return np.concatenate(which), np.concatenate(far)


def _chunks(rows: np.ndarray, others: int) -> Iterator[np.ndarray]:
    """The rows, as many at once as have at most MOST distances to so many others."""
    size = max(1, min(CHUNK, MOST // max(others, 1)))
    return (rows[start : start + size] for start in range(0, len(rows), size))


def precision_recall(made: np.ndarray, real: np.ndarray, k: int = NEIGHBORS) -> tuple[float, float]:
    """(share of the made within the real ones' neighborhoods, share of the real within the made).

    Kynkäänniemi et al. 2019 (https://arxiv.org/abs/1904.06991): a set's neighborhoods are balls
    around its members that reach to their k-th nearest other member.

    Args:
      made: features f[N, D].
      real: features f[M, D].
      k: of the neighborhoods.

    Raises:
      ValueError: not more than k images in either.
    """
    if min(len(made), len(real)) <= k:
        raise ValueError(f"neighborhoods of {k} images need more than {k} images in each set")
    return _covered(made, real, k), _covered(real, made, k)


def _covered(points: np.ndarray, members: np.ndarray, k: int) -> float:
    """Share of the points in some ball of the members."""
    points, members = np.asarray(points, np.float64), np.asarray(members, np.float64)
    _, radius = nearest(members, members, k + 1)  # each is its own nearest
    squares, inside = np.sum(members**2, axis=1), []
    for rows in _chunks(points, len(members)):
        squared = np.sum(rows**2, axis=1)[:, None] + squares[None] - 2 * rows @ members.T
        inside.append((squared <= radius[None] ** 2).any(1))
    return float(np.concatenate(inside).mean())


@dataclass(frozen=True)
class Copies:
    """How far images are from the training images, beside real ones that were held out.

    Attributes:
      index: i[N], the nearest training image of each.
      distances: f64[N], to it.
      held_out: f64[M], of the held-out images to theirs.
    """

    index: np.ndarray
    distances: np.ndarray
    held_out: np.ndarray

    @property
    def ratio(self) -> float:
        """The mean distance over that of held-out images: well below 1, training is repeated."""
        return float(self.distances.mean() / self.held_out.mean())

    @property
    def flagged(self) -> np.ndarray:
        """bool[N]: nearer than COPY times the median of held-out images."""
        return self.distances < COPY * np.median(self.held_out)

    @property
    def flagged_held_out(self) -> float:
        """The share of held-out images that would be flagged, of which none is a copy."""
        return float((self.held_out < COPY * np.median(self.held_out)).mean())


def find_copies(made: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Copies:
    """The nearest training images of made ones, by features f[N, D], f[T, D] and f[M, D]."""
    index, distances = nearest(made, train)
    return Copies(index, distances, nearest(held_out, train)[1])
