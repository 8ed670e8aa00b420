"""What each network is taught: every recipe against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qmri import IVIM, FunctionModel, Parameter, Rician
from qmri.datasets import Dataset, Labels
from qmri.losses import (
    RECIPES,
    Recipe,
    absolute_error,
    hybrid,
    overweighted,
    recipe,
    signal_error,
    squared_error,
)

MODEL = IVIM((0, 10, 20, 30, 50, 80, 100, 200, 400, 800))
VOXELS = 40


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Labels need not come from a fit to be weighed; a third of each kind is not usable."""
    rng = np.random.default_rng(1)
    theta = MODEL.sample(VOXELS, rng)
    labels = {
        name: Labels(
            theta * rng.uniform(0.7, 1.3, theta.shape),
            rng.random(VOXELS) > 1 / 3,
            np.zeros(theta.shape, dtype=np.int8),
        )
        for name in ("mle-rician", "mle-gaussian")
    }
    signals = Rician(1 / 15).sample(MODEL.signal(theta), rng)
    return Dataset(MODEL, Rician(1 / 15), theta, signals, np.arange(VOXELS) < 32, labels)


@pytest.fixture(scope="module")
def estimate() -> np.ndarray:
    """Of two networks, (networks, voxels, parameters)."""
    rng = np.random.default_rng(2)
    return np.stack([MODEL.sample(VOXELS, rng), MODEL.sample(VOXELS, rng)])


def double(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def loss_of(recipe: Recipe, data: Dataset, estimate: torch.Tensor) -> torch.Tensor:
    """Loss of each network, from the library's parts."""
    if recipe.space == "signal":
        return signal_error(estimate, double(data.signals).expand(len(estimate), -1, -1), MODEL)
    target, usable = recipe.target(data)
    error = {"squared": squared_error, "absolute": absolute_error}[recipe.error]
    weights = double(recipe.weights(data)).expand(len(estimate), 1, -1)
    target, usable = (
        double(x).expand(len(estimate), *x.shape) for x in (target, usable.astype(float))
    )
    return error(estimate, target, weights, usable)


LABELS = {
    "supervised-gt": "truth",
    "supervised-gt-mae": "truth",
    "supervised-mle-gaussian": "mle-gaussian",
    "supervised-mle-rician": "mle-rician",
    "supervised-mle-rician-mae": "mle-rician",
    "supervised-mle-rician-f": "mle-rician",
    "supervised-mle-rician-dslow": "mle-rician",
    "supervised-mle-rician-dfast": "mle-rician",
}
EMPHASIS = {"f": 1, "dslow": 2, "dfast": 3}


class TestDefinitions:
    @pytest.mark.parametrize("name", LABELS)
    def test_supervised(self, data, estimate, name):
        label, emphasis = data.labels[LABELS[name]], name.rsplit("-", 1)[1]
        w = 1 / data.theta[data.training].mean(axis=0)
        if emphasis in EMPHASIS:
            w[EMPHASIS[emphasis]] *= 1e6
            w /= 1e6  # a common factor: it does not move the minimum
        error = np.abs(w * (estimate - label.values))[:, label.usable]
        expected = np.sum(error if emphasis == "mae" else error**2, axis=2).mean(axis=1)
        np.testing.assert_allclose(loss_of(RECIPES[name], data, double(estimate)), expected)

    def test_self_supervised(self, data, estimate):
        s0, f, dslow, dfast = np.moveaxis(estimate, 2, 0)[..., np.newaxis]
        b = MODEL.bvalues / 1000
        clean = s0 * (f * np.exp(-b * (dfast + dslow)) + (1 - f) * np.exp(-b * dslow))
        expected = np.mean((clean - data.signals) ** 2, axis=(1, 2))
        np.testing.assert_allclose(
            loss_of(RECIPES["self-supervised"], data, double(estimate)), expected
        )

    @pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
    def test_hybrid_has_the_minimum_of_the_mixture(self, data, estimate, alpha):
        """a |x - truth|^2 + (1 - a) |x - mle|^2, up to a number that x does not change."""
        usable = data.labels["mle-rician"].usable | (alpha == 1)
        w = 1 / data.theta[data.training].mean(axis=0)

        def mixture(x):
            to = [np.sum((w * (x - data.labels[n].values)) ** 2, axis=2) for n in two]
            return np.mean((alpha * to[0] + (1 - alpha) * to[1])[:, usable], axis=1)

        two = ("truth", "mle-rician")
        ours = loss_of(hybrid(alpha), data, double(estimate)).numpy()
        assert np.ptp(mixture(estimate) - ours) < 1e-12 * np.max(ours)

    def test_hybrid_has_the_gradient_of_the_mixture(self, data, estimate):
        x = double(estimate).requires_grad_()
        ends = [
            # The truth where the other label can be used too: what a mixture is taken over.
            Recipe({"truth": 1.0}),
            Recipe({"mle-rician": 1.0}),
        ]
        usable = data.labels["mle-rician"].usable
        both = data.with_labels(
            {"truth": Labels(data.theta, usable, np.zeros(data.theta.shape, dtype=np.int8))}
        )
        parts = sum(a * loss_of(r, both, x) for a, r in zip((0.3, 0.7), ends, strict=True))
        (expected,) = torch.autograd.grad(parts.sum(), x)
        (found,) = torch.autograd.grad(loss_of(hybrid(0.3), data, x).sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)

    def test_every_network_of_the_paper_has_a_recipe(self):
        assert set(RECIPES) == {*LABELS, "self-supervised", "hybrid-0.5"}
        assert RECIPES["hybrid-0.5"] == hybrid(0.5) == recipe("hybrid-0.5")


class TestWeights:
    def test_they_are_inverse_means_of_the_training_tissue(self, data):
        weights = RECIPES["supervised-gt"].weights(data)
        np.testing.assert_allclose(weights * data.theta[:32].mean(axis=0), 1)

    def test_overweighting_is_relative_to_the_others(self, data):
        plain = RECIPES["supervised-mle-rician"].weights(data)
        heavy = overweighted("Dslow", 50.0).weights(data)
        ratio = heavy / plain
        np.testing.assert_allclose(ratio[2] / ratio[[0, 1, 3]], 50)
        assert np.max(ratio) == pytest.approx(1)

    def test_parameters_in_other_units_weigh_the_same(self, data, estimate):
        """The loss is a pure number: doubling all values of Dfast changes nothing."""
        factor = np.array([1, 1, 1, 2.0])
        other = Dataset(MODEL, data.noise, data.theta * factor, data.signals, data.training)
        one = loss_of(RECIPES["supervised-gt"], data, double(estimate))
        two = loss_of(RECIPES["supervised-gt"], other, double(estimate * factor))
        torch.testing.assert_close(one, two)


class TestUsable:
    def test_voxels_that_are_not_usable_do_not_matter(self, data, estimate):
        label = data.labels["mle-rician"]
        values = np.where(label.usable[:, np.newaxis], label.values, np.nan)
        without = data.with_labels(
            {"mle-rician": Labels(values, label.usable, np.zeros(values.shape, dtype=np.int8))}
        )
        x = double(estimate).requires_grad_()
        for name in ("supervised-mle-rician", "supervised-mle-rician-mae", "hybrid-0.5"):
            with_them = loss_of(RECIPES[name], data, x)
            loss = loss_of(RECIPES[name], without, x)
            torch.testing.assert_close(loss, with_them, rtol=0, atol=0)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            assert torch.all(gradient[:, ~label.usable] == 0)
            assert torch.all(gradient[:, label.usable] != 0)

    def test_a_batch_without_any_teaches_nothing(self):
        x = double(np.ones((2, 3, 4))).requires_grad_()
        loss = squared_error(
            x, x.detach() + 1, double(np.ones((2, 1, 4))), double(np.zeros((2, 3)))
        )
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert torch.all(loss == 0) and torch.all(gradient == 0)


class TestDecoder:
    """Gradients through the signal model, against PyTorch's own and against differences."""

    def test_gradient_of_ivim_is_pytorchs(self, data, estimate):
        def by_hand(x):
            s0, f, dslow, dfast = x.unbind(dim=2)
            b = double(MODEL.bvalues / 1000)[:, None, None]
            clean = s0 * (f * torch.exp(-b * (dfast + dslow)) + (1 - f) * torch.exp(-b * dslow))
            return (clean.movedim(0, 2) - signals).square().mean(dim=(1, 2))

        signals = double(data.signals).expand(2, -1, -1)
        x = double(estimate).requires_grad_()
        (expected,) = torch.autograd.grad(by_hand(x).sum(), x)
        (found,) = torch.autograd.grad(signal_error(x, signals, MODEL).sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
        # Single precision, as in training: seven digits, some lost in the sum.
        single = double(estimate).float().requires_grad_()
        (rounded,) = torch.autograd.grad(signal_error(single, signals.float(), MODEL).sum(), single)
        assert rounded.dtype == torch.float32
        scale = expected.abs().amax(dim=(0, 1))
        assert torch.all((rounded - expected).abs() < 1e-5 * scale)

    @pytest.mark.parametrize(
        "model",
        [
            IVIM((0, 50, 800)),
            FunctionModel(
                lambda t, a, k: a / (1 + k * t),
                [0.5, 1.0, 3.0],
                [
                    Parameter("a", "a", "1", (0.5, 2), (0, 10)),
                    Parameter("k", "k", "1/s", (0.1, 1), (0, 10)),
                ],
            ),
        ],
        ids=["IVIM", "function"],
    )
    def test_gradient_is_that_of_differences(self, model):
        rng = np.random.default_rng(3)
        x = double(np.stack([model.sample(5, rng), model.sample(5, rng)])).requires_grad_()
        signals = double(rng.uniform(0, 1, (2, 5, model.measurements)))
        assert torch.autograd.gradcheck(lambda e: signal_error(e, signals, model), (x,), atol=1e-6)

    def test_the_truth_explains_its_own_signals(self):
        theta = MODEL.sample(10, np.random.default_rng(4))
        loss = signal_error(double(theta[np.newaxis]), double(MODEL.signal(theta)[None]), MODEL)
        assert float(loss) < 1e-30


class TestBadInput:
    @pytest.mark.parametrize("alpha", [-0.1, 1.1, np.nan, np.inf])
    def test_alpha_outside_0_to_1(self, alpha):
        with pytest.raises(ValueError, match=f"alpha must be from 0 .* to 1 .*, got {alpha}"):
            hybrid(alpha)
        with pytest.raises(ValueError, match="alpha must be from 0"):
            recipe(f"hybrid-{alpha}")

    @pytest.mark.parametrize(
        "labels", [{"truth": 0.9}, {"truth": 1.5, "mle-rician": -0.5}, {"truth": np.nan}]
    )
    def test_shares_that_do_not_add_up(self, labels):
        with pytest.raises(ValueError, match="labels must have weights of 0 or more that add up"):
            Recipe(labels)

    def test_absolute_errors_are_not_mixed(self):
        # |x - y| has no mixed label: its minimum is a median.
        with pytest.raises(ValueError, match="mixed for squared errors only, got error='absolute'"):
            Recipe({"truth": 0.5, "mle-rician": 0.5}, error="absolute")
        assert Recipe({"truth": 1.0, "mle-rician": 0.0}, error="absolute").error == "absolute"

    def test_an_error_that_does_not_exist(self):
        with pytest.raises(ValueError, match="error must be 'squared' or 'absolute', got 'cubic'"):
            Recipe({"truth": 1.0}, error="cubic")

    @pytest.mark.parametrize("changes", [{"error": "absolute"}, {"emphasis": {"f": 2.0}}])
    def test_nothing_is_weighted_in_signal_space(self, changes):
        with pytest.raises(ValueError, match="labels must be given where error is 'absolute'"):
            Recipe({}, **changes)

    @pytest.mark.parametrize("factor", [0, -1, np.nan, np.inf])
    def test_factors_are_positive(self, factor):
        with pytest.raises(ValueError, match=r"emphasis\['f'\] must be positive, got"):
            overweighted("f", factor)

    def test_a_parameter_that_the_model_lacks(self, data):
        with pytest.raises(ValueError, match=r"emphasis must name parameters among.*\['T1'\]"):
            overweighted("T1").weights(data)

    def test_labels_that_the_data_lack(self, data):
        bare = Dataset(MODEL, data.noise, data.theta, data.signals, data.training)
        with pytest.raises(ValueError, match=r"labels 'mle-rician', it holds \['truth'\]"):
            RECIPES["supervised-mle-rician"].target(bare)

    def test_weights_need_positive_means(self):
        model = FunctionModel(
            lambda t, a: a * t, [1.0, 2.0], [Parameter("a", "a", "1", (-1, 1), (-9, 9))]
        )
        theta = np.array([[-1.0], [-0.5], [0.5]])
        data = Dataset(model, Rician(1), theta, model.signal(theta), np.array([True, True, False]))
        with pytest.raises(ValueError, match=r"positive means of all parameters.*\{'a': -0.75\}"):
            RECIPES["supervised-gt"].weights(data)

    @pytest.mark.parametrize("name", ["supervised", "hybrid-", "hybrid-half", ""])
    def test_a_recipe_that_does_not_exist(self, name):
        with pytest.raises(ValueError, match=f"name must be hybrid-ALPHA or one of .*got '{name}'"):
            recipe(name)

    def test_the_table_cannot_be_changed(self):
        with pytest.raises(TypeError):
            RECIPES["mine"] = hybrid(0.5)
