"""Against other libraries: scikit-learn's estimator checks and logistic regression, laplace-torch's last-layer posterior."""

import jax
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import check_estimator

from ssm_nn.inference.last_layer.classifier import LastLayerClassifier
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import Categorical
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(30, 3))
    return x, np.array(["ash", "beech", "elm"])[np.argmax(x + rng.normal(size=x.shape), axis=1)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learns_estimator_checks_pass():
    check_estimator(LastLayerClassifier())


def test_its_mean_is_scikit_learns_ridge_logistic_regression(data):
    x, y = data
    ours = LastLayerClassifier(prior_precision=2.0, fit_intercept=False).fit(x, y)
    theirs = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    assert ours.classes_.tolist() == ["ash", "beech", "elm"]
    assert clone(ours).get_params()["prior_precision"] == 2.0
    assert (ours.predict(x) == theirs.predict(x)).mean() > 0.9


def test_classes_that_come_later_are_learnt_by_partial_fit(data):
    x, y = data
    early = y != "beech"
    model = LastLayerClassifier().fit(x[early], y[early])
    model.partial_fit(x[~early], y[~early])
    assert model.classes_.tolist() == ["ash", "elm", "beech"]
    p = model.predict_proba(x)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-12)
    assert (model.predict(x[~early]) == "beech").mean() > 0.6
    named = LastLayerClassifier().partial_fit(x[:4], y[:4], classes=["ash", "beech", "elm"])
    assert named.classes_.tolist() == ["ash", "beech", "elm"]
    with pytest.raises(ValueError, match="which classes does not"):
        named.partial_fit(x[:4], y[:4], classes=["oak"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of what laplace-torch imports
def test_laplace_torchs_full_last_layer_posterior_is_reproduced():
    torch = pytest.importorskip("torch")
    laplace = pytest.importorskip("laplace")
    rng = np.random.default_rng(0)
    x, y, tau = rng.normal(size=(20, 3)), rng.integers(0, 3, 20), 0.8
    new = rng.normal(size=(5, 3))
    with jax.enable_x64(True):
        engine = LastLayerFilter(feature_head(Categorical(3), 3, prior_precision=tau), Full())
        state, info = engine.update(engine.init(), {"x": x, "y": y})
        weights = engine.weights(state)
        scale = np.tile(engine.head.scale, 3)
        ours = (scale[:, None] * np.asarray(state.belief.matrix) * scale).reshape(3, 4, 3, 4)
        predicted = engine.predict(state, new).probabilities
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(3, 3)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(weights[:, :-1]))
        model[1].bias.copy_(torch.tensor(weights[:, -1]))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)), batch_size=20
    )
    la = laplace.Laplace(
        model, "classification", subset_of_weights="last_layer", hessian_structure="full", prior_precision=tau
    )
    la.fit(loader)
    theirs = la.posterior_covariance.numpy()
    kernel = ours[:, :3, :, :3].reshape(9, 9)  # torch has all of the kernel, then the bias
    np.testing.assert_allclose(theirs[:9, :9], kernel, atol=1e-6)
    np.testing.assert_allclose(theirs[9:, 9:], ours[:, 3, :, 3], atol=1e-6)
    np.testing.assert_allclose(theirs[:9, 9:], ours[:, :3, :, 3].reshape(9, 3), atol=1e-6)
    assert float(la.log_marginal_likelihood()) == pytest.approx(info.log_evidence, abs=1e-6)
    probit = la(torch.tensor(new), pred_type="glm", link_approx="probit").numpy()
    np.testing.assert_allclose(predicted, probit, atol=1e-6)
