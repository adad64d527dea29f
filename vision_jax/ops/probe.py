"""What frozen features are worth: nearest neighbours, few-shot and logistic regression."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

CHUNK = 1024  # test rows at a time: a row of similarities is as long as the training set
TEMPERATURE = 0.07  # of the votes; Wu et al. 2018 (https://arxiv.org/abs/1805.01978), and DINO
L2 = 2.0**10  # of the regression; big_vision's evaluators/fewshot_lsr.py reports at this value


def knn_predict(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    features: np.ndarray,
    *,
    num_classes: int,
    neighbors: Sequence[int],
) -> dict[int, np.ndarray]:
    """Classes by the votes of the nearest training examples, for several numbers of neighbours.

    Similarity is the cosine; each of the k nearest votes for its class with exp(similarity / 0.07).
    Source: DINO (https://arxiv.org/abs/2104.14294), eval_knn.py.

    Args:
      train_features: f[M, D].
      train_labels: i[M].
      features: f[N, D].
      num_classes: C.
      neighbors: each k; one larger than M counts as M.

    Returns:
      {k: i[N]}.
    """
    most = min(max(neighbors), len(train_features))
    train, labels = jnp.asarray(unit(train_features)), jnp.asarray(train_labels)

    @jax.jit
    def predict(chunk):
        similarity, nearest = jax.lax.top_k(chunk @ train.T, most)  # [n, most]
        # Relative to the nearest: the sum of exponentials can't overflow.
        weights = jnp.exp((similarity - similarity[:, :1]) / TEMPERATURE)
        votes = jax.nn.one_hot(labels[nearest], num_classes) * weights[..., None]
        return [votes[:, :k].sum(1).argmax(-1) for k in neighbors]  # [n] each

    normalized = unit(features)
    parts = [
        jax.device_get(predict(normalized[i : i + CHUNK])) for i in range(0, len(features), CHUNK)
    ]
    return {k: np.concatenate([part[i] for part in parts]) for i, k in enumerate(neighbors)}


def few_shot_predict(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    features: np.ndarray,
    *,
    num_classes: int,
    shots: int,
    seed: int,
) -> np.ndarray:
    """Classes i[N] by ridge regression on `shots` random training examples of each class.

    Features are standardized by the chosen examples' statistics, targets are 1 for the class and
    -1 for the others, and a constant column is the bias. Source: big_vision's
    evaluators/fewshot_lsr.py.

    Args:
      train_features: f[M, D].
      train_labels: i[M].
      features: f[N, D].
      num_classes: C.
      shots: examples of each class; a class with fewer gives all it has.
      seed: of the choice. More shots of one seed contain fewer.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train_labels))
    chosen = np.concatenate(
        [order[train_labels[order] == label][:shots] for label in range(num_classes)]
    )
    x = train_features[chosen].astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    x = np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=1)  # [S, D + 1]
    y = 2.0 * np.eye(num_classes)[train_labels[chosen]] - 1  # [S, C]
    if len(x) > x.shape[1]:
        kernel = np.linalg.solve(x.T @ x + L2 * np.eye(x.shape[1]), x.T @ y)
    else:  # the same solution by the smaller system
        kernel = x.T @ np.linalg.solve(x @ x.T + L2 * np.eye(len(x)), y)
    standardized = (features - mean) / std
    return (standardized @ kernel[:-1] + kernel[-1]).argmax(-1)


def unit(features: np.ndarray) -> np.ndarray:
    """Features f[N, D] of length 1 each, whose products are cosines; zeros stay."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norm, np.finfo(features.dtype).tiny)


def fit_logistic(
    features: np.ndarray, labels: np.ndarray, *, num_classes: int, strength: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Multinomial logistic regression, a linear probe: a function f[N, D] -> logits f64[N, C].

    Minimizes the sum of cross-entropies times `strength`, plus half the squared norm of the kernel,
    not of the bias: scikit-learn's LogisticRegression(C=strength). Features are standardized by the
    mean and standard deviation of those given, as its StandardScaler does. The problem is convex,
    and its solution the same whatever the start; L-BFGS in float64, from zero, ends where no
    gradient of the mean exceeds 1e-6, or after 1,000 steps.

    Args:
      features: f[M, D].
      labels: i[M].
      num_classes: C.
      strength: above 0; the smaller, the smaller the kernel.
    """
    wide = np.asarray(features, np.float64)
    mean, std = wide.mean(0), wide.std(0)
    std = np.where(std > 0, std, 1)
    x = np.pad((wide - mean) / std, ((0, 0), (0, 1)), constant_values=1)  # [M, D + 1]
    target = np.eye(num_classes)[labels]  # [M, C]
    shape, decay = (x.shape[1], num_classes), 1 / (strength * len(x))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel = flat.reshape(shape)
        penalized = np.concatenate([kernel[:-1], np.zeros((1, num_classes))])
        log_p = log_softmax(x @ kernel, axis=1)
        value = -(target * log_p).sum() / len(x) + decay / 2 * (penalized**2).sum()
        gradient = x.T @ (np.exp(log_p) - target) / len(x) + decay * penalized
        return value, gradient.ravel()

    options = {"gtol": 1e-6, "ftol": 0.0, "maxiter": 1000, "maxfun": 4000}
    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    kernel = found.x.reshape(shape)

    def predict(others: np.ndarray) -> np.ndarray:
        return (others - mean) / std @ kernel[:-1] + kernel[-1]

    return predict
