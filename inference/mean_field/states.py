"""What a mean-field engine carries from batch to batch, and what it says of itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["QUANTILES", "MeanFieldInfo", "MeanFieldState"]

Array = Any

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class MeanFieldState(NamedTuple):
    """All that the next batch needs of the past, as arrays: N(mean, diag sigma^2) over the weights.

    Attributes:
        step: number of batches so far.
        examples: number of examples so far.
        key: of the draws; those of a batch are a function of ``key`` and ``step`` alone.
        mean, sigma: (P,).
    """

    step: Array
    examples: Array
    key: Array
    mean: Array
    sigma: Array


class MeanFieldInfo(NamedTuple):
    """What a block of K batches says of itself; host arrays. All but the last four are by batch (K,), sums over its examples,
    and judge the belief before it has seen the batch (prequential).

    Attributes:
        free_energy: E_q[-log p(batch | w)] at the predicted belief, which bounds -log p(batch | past) from above, in nats.
        log_predictive: log p(batch | past), by the draws.
        correct: examples whose most probable class was theirs; nan where no single site has classes.
        epistemic: mutual information between label and weights, in nats; nan likewise.
        counted: the examples.
        divergence: KL(q | predicted q) of the last batch: how much was learnt, in nats.
        clipped_share: share of the weights that the trust region held back, in the last batch.
        sigma_quantiles: at ``QUANTILES``, after the last batch.
        left_out: numbers of the batches in the block whose step failed; their information was left out.
    """

    free_energy: np.ndarray
    log_predictive: np.ndarray
    correct: np.ndarray
    epistemic: np.ndarray
    counted: np.ndarray
    divergence: float
    clipped_share: float
    sigma_quantiles: np.ndarray
    left_out: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the block's examples that were predicted right before they were learnt."""
        return float(np.sum(self.correct) / np.sum(self.counted))

    @classmethod
    def nothing(cls) -> MeanFieldInfo:
        """Of no batch."""
        empty = np.zeros(0)
        return cls(empty, empty, empty, empty, empty, 0.0, 0.0, np.full(len(QUANTILES), np.nan), np.zeros(0, int))

    @classmethod
    def join(cls, infos: list[MeanFieldInfo]) -> MeanFieldInfo:
        """One Info of several blocks in a row; the last four are those of the last block, but for ``left_out``."""
        starts = np.cumsum([0, *(len(info.counted) for info in infos[:-1])])
        joined = (np.concatenate([getattr(info, name) for info in infos]) for name in cls._fields[:5])
        left_out = np.concatenate([s + info.left_out for s, info in zip(starts, infos, strict=True)])
        return infos[-1]._replace(**dict(zip(cls._fields[:5], joined, strict=True)), left_out=left_out)
