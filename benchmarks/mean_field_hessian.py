"""The importance that sigma holds against the exact diagonal of the Hessian: softmax regression on digits."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from csv_files import write_csv
from mean_field_figures import draw_hessian
from mean_field_permuted import RULES
from mean_field_programs import classifier

from ssm_nn.inference.mean_field.engine import MeanFieldFilter
from ssm_nn.inference.mean_field.forgetting import Window
from ssm_nn.inference.mean_field.gradients import LocalReparameterisation
from ssm_nn.inference.mean_field.importance import importance
from ssm_nn.inference.mean_field.starts import AtPrior
from ssm_nn.inference.mean_field.streams import Batches
from ssm_nn.models.datasets import load

# A wide belief has its expected Hessian above the Hessian at the mean. A short window leaves one, and so does a wide prior.
PRIORS = (0.1, 1.0)
WINDOW, WINDOWS_SEEN, BATCH, DRAWS = 200_000, 9, 32, 10
CHECK_DRAWS = 200


def diagonal(x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """mean_n x_ni^2 p_nk (1 - p_nk), in float64."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return np.einsum("ni,nk->ik", x.astype(np.float64) ** 2, p * (1 - p)) / len(x)


def measure(out: Path, seed: int = 0) -> list[dict]:
    """A row a prior and rule: correlation, median ratio."""
    data = load("digits")
    x = data.train_x.reshape(len(data.train_x), -1)
    network = (lambda params, x: x @ params["kernel"], {"kernel": jnp.zeros((x.shape[1], 10))})
    rows = []
    for prior, name in product(PRIORS, ("first-order", "fixed-point")):
        engine = MeanFieldFilter(
            classifier(network, prior),
            Window(WINDOW),
            rule=RULES[name],
            estimator=LocalReparameterisation(DRAWS),
            start=AtPrior(),
        )
        batches = Batches({"x": x, "y": data.train_y}, BATCH, epochs=WINDOWS_SEEN * WINDOW // len(x), seed=seed)
        state, _ = engine.run(seed, batches)
        found = np.asarray(importance(engine, state, batches.task)).reshape(-1, 10)
        mean, sigma = (np.asarray(array, np.float64).reshape(-1, 10) for array in (state.mean, state.sigma))
        exact = diagonal(x, x @ mean)
        noise = np.random.default_rng(seed).normal(size=(CHECK_DRAWS, len(x), 10))
        spread = np.sqrt(x.astype(np.float64) ** 2 @ sigma**2)
        expected = np.mean([diagonal(x, x @ mean + spread * e) for e in noise], axis=0)
        kept = exact > 0  # pixels that are black in every image say nothing
        row = {
            "prior": prior,
            "rule": name,
            "correlation": float(np.corrcoef(exact.ravel(), found.ravel())[0, 1]),
            "median_ratio_to_the_expected": float(np.median(found[kept] / expected[kept])),
            "median_ratio": float(np.median(found[kept] / exact[kept])),
            "median_ratio_of_the_upper_half": float(
                np.median((found / np.maximum(exact, 1e-30))[exact > np.median(exact)])
            ),
        }
        print(" ".join(f"{k} {v:.4g}" if not isinstance(v, str) else v for k, v in row.items()), flush=True)
        rows.append(row)
        if (prior, name) == (PRIORS[0], "first-order"):
            words = f"correlation {row['correlation']:.4f}, median ratio {row['median_ratio']:.3f}"
            draw_hessian(out / "hessian.png", exact.ravel(), found.ravel(), words)
    write_csv(out / "hessian.csv", rows)
    return rows
