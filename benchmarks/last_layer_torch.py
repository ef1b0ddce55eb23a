"""The last-layer benchmark's comparison with laplace-torch; it runs where torch and laplace-torch are installed.

    uv pip install torch laplace-torch

Its full last-layer Laplace approximation is fitted on all points at the weights of the Newton refit: the mode is the refit's,
and what is compared is covariance, predictions and time. Finding the mode is not counted.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
import warnings

import numpy as np

LARGEST = 1_000  # weights of a head; at 5,390 a fit of 1,500 points takes 10 s and 1,000 predictions 35
BATCH = 100


def version() -> str | None:
    """Of laplace-torch; None where it or torch is missing."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("laplace") is None:
        return None
    return importlib.metadata.version("laplace-torch")


def refit(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, prior_precision: float, new: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Probabilities of new points (m, D - 1) at the mode and by the probit approximation, and CPU seconds of the fit.

    Args:
        x, y: all points (n, D - 1), (n,).
        weights: (K, D) of the mode, the bias last.
        prior_precision: tau.
    """
    with warnings.catch_warnings():  # of what torch says of its own parts while laplace-torch is imported
        warnings.simplefilter("ignore")
        import laplace
        import torch

    double = {"dtype": torch.float64}
    linear = torch.nn.Linear(weights.shape[1] - 1, weights.shape[0], **double)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weights[:, :-1]))
        linear.bias.copy_(torch.tensor(weights[:, -1]))
    points = torch.utils.data.TensorDataset(torch.tensor(x, **double), torch.tensor(np.asarray(y, np.int64)))
    fitted = laplace.Laplace(
        torch.nn.Sequential(torch.nn.Identity(), linear),
        "classification",
        subset_of_weights="last_layer",
        hessian_structure="full",
        prior_precision=prior_precision,
    )
    began = time.process_time()
    fitted.fit(torch.utils.data.DataLoader(points, batch_size=256))
    _ = fitted.posterior_covariance
    seconds = time.process_time() - began
    asked = torch.tensor(new, **double)
    with torch.no_grad():
        at_mode = torch.softmax(linear(asked), dim=1).numpy()
        probit = [fitted(part, pred_type="glm", link_approx="probit") for part in asked.split(BATCH)]
    return at_mode, torch.cat(probit).numpy(), seconds
