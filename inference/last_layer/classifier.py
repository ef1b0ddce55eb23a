"""The engine behind scikit-learn's conventions, so that pipelines, searches and other tools can use it."""

from __future__ import annotations

from typing import Any, Self

import jax
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from ssm_nn.inference.last_layer.head_likelihoods import Categorical
from ssm_nn.inference.last_layer.head_predictions import PredictiveMethod, Probit
from ssm_nn.inference.last_layer.head_states import HeadState
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.structures import HeadStructure

__all__ = ["LastLayerClassifier"]

Array = Any


class LastLayerClassifier(ClassifierMixin, BaseEstimator):
    """``p(y = k | x) = E_W softmax(W [x, 1])_k`` with W Gaussian: multinomial logistic regression, Bayesian in Laplace's sense.

    ``fit`` finds the posterior mode of all examples, ``partial_fit`` is the engine's update with new ones, whose classes may
    be new too. Everything is computed in float64.

    Args:
        prior_precision: tau > 0 of every weight, the intercept's too.
        fit_intercept: whether there is one.
        structure: of the covariance; None takes the richest that the size allows.
        method: of the predictions; None is ``Probit()``.

    Attributes:
        classes_: (K,), sorted by ``fit``; classes that come later stand behind.
        coef_, intercept_: (K, D) and (K,), the mean of the weights.
        engine_, state_: the engine and its state.
        n_iter_: steps of Newton in the last fit or update.
    """

    engine_: LastLayerFilter
    state_: HeadState
    classes_: np.ndarray
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        prior_precision: float = 1.0,
        fit_intercept: bool = True,
        structure: HeadStructure | None = None,
        method: PredictiveMethod | None = None,
    ):
        self.prior_precision = prior_precision
        self.fit_intercept = fit_intercept
        self.structure = structure
        self.method = method

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Forget everything, and learn n examples X (n, D) with classes y (n,) that count ``sample_weight`` (n,) times."""
        checked: Any = validate_data(self, X, y, dtype=np.float64)
        x, y = checked
        check_classification_targets(y)
        return self._begin(np.unique(y), x.shape[1])._learn(x, y, sample_weight)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Learn more examples. ``classes`` names those that may come, at the first call; others are added as they arrive."""
        first = not hasattr(self, "state_")
        checked: Any = validate_data(self, X, y, dtype=np.float64, reset=first)
        x, y = checked
        check_classification_targets(y)
        if first:
            self._begin(np.unique(y if classes is None else classes), x.shape[1])
        if classes is not None and not np.isin(y, classes).all():
            raise ValueError(f"y holds {np.setdiff1d(y, classes)[:5].tolist()}, which classes does not")
        new = np.setdiff1d(y, self.classes_)
        if new.size:
            self._grow(new)
        return self._learn(x, y, sample_weight)

    def _begin(self, classes: np.ndarray, width: int) -> Self:
        if len(classes) < 2:
            raise ValueError(f"y holds one class, {classes[0]!r}; a classifier needs at least 2 classes")
        self.classes_ = classes
        with jax.enable_x64(True):
            head = feature_head(
                Categorical(len(classes)),
                width,
                prior_precision=self.prior_precision,
                intercept=bool(self.fit_intercept),
            )
            self.engine_ = LastLayerFilter(head, self.structure)
            self.state_ = self.engine_.init()
        return self

    def _grow(self, new: np.ndarray) -> None:
        with jax.enable_x64(True):
            self.engine_, self.state_ = self.engine_.grow(self.state_, len(new))
        self.classes_ = np.concatenate([self.classes_, new])

    def _learn(self, x: np.ndarray, y: np.ndarray, sample_weight: Any) -> Self:
        weights = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        order = np.argsort(self.classes_, kind="stable")
        labels = order[np.searchsorted(self.classes_, y, sorter=order)]
        with jax.enable_x64(True):
            self.state_, info = self.engine_.update(self.state_, {"x": x, "y": labels}, weights=weights)
        self.n_iter_ = max(info.steps, 1)
        return self

    @property
    def coef_(self) -> np.ndarray:
        """(K, D)."""
        return self.engine_.weights(self.state_)[:, : self.n_features_in_]

    @property
    def intercept_(self) -> np.ndarray:
        """(K,)."""
        whole = self.engine_.weights(self.state_)
        return whole[:, -1] if self.fit_intercept else np.zeros(len(whole))

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n, K), in the order of ``classes_``."""
        check_is_fitted(self)
        x: Any = validate_data(self, X, dtype=np.float64, reset=False)
        with jax.enable_x64(True):
            prediction = self.engine_.predict(self.state_, x, Probit() if self.method is None else self.method)
        assert prediction.probabilities is not None  # a Categorical has them
        return prediction.probabilities / prediction.probabilities.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """(n,), the most probable class."""
        places = self.predict_proba(X).argmax(axis=1)  # first: it checks that there is a fit
        return self.classes_[places]
