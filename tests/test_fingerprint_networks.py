"""The network for fingerprints is the plain one that a reader would write, only faster."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qmri.mt.basis import fingerprint
from qmri.networks import (
    FingerprintEstimator,
    FingerprintNetwork,
    compact_fingerprint_network,
    full_precision,
    paper_fingerprint_network,
    rounded_products,
)

RANK = 4
WIDTHS = (8, 64, 48, 64, 8, 6, 3)
SKIPS = ((1, 3), (0, 4))


def small(**changes) -> FingerprintNetwork:
    """A small one whose normalisations stretch and shift."""
    network = FingerprintNetwork(**{"widths": WIDTHS, "skips": SKIPS, "groups": 4, **changes})
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for values in (*network.gains, *network.shifts):
            values.add_(torch.randn(values.shape, generator=generator), alpha=0.3)
    return network


def coefficients(n: int, seed: int = 0, rank: int = RANK) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, rank)) + 1j * rng.standard_normal((n, rank))


def plain(network: FingerprintNetwork, inputs: torch.Tensor, groups: dict) -> torch.Tensor:
    """Layer by layer, with PyTorch's own parts."""
    sources, before, x = {b: a for a, b in network.skips}, {0: inputs}, inputs
    for k in range(1, len(network.widths) - 1):
        before[k] = F.linear(x, network.weights[k - 1].T, network.biases[k - 1])
        if k in sources:
            before[k] = before[k] + before[sources[k]]
        affine = (network.gains[k - 1], network.shifts[k - 1])
        x = F.relu(F.group_norm(before[k], groups[network.widths[k]], *affine))
    return F.linear(x, network.weights[-1].T, network.biases[-1])


GROUPS = {64: 4, 48: 3, 8: 1, 6: 1}  # of at least 16 units, or one


class TestStructure:
    def test_it_is_linear_layers_group_normalisation_and_relu(self):
        network, inputs = small(), torch.randn(150, 8, generator=torch.Generator().manual_seed(1))
        found = network(inputs).detach().numpy()
        np.testing.assert_allclose(found, plain(network, inputs, GROUPS).detach(), atol=1e-5)

    def test_so_is_its_gradient(self):
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(150, 8, generator=generator, requires_grad=True)
        wanted = torch.randn(150, 3, generator=generator)
        gradients = []
        for run in (FingerprintNetwork.forward, lambda n, x: plain(n, x, GROUPS)):
            network = small()
            inputs.grad = None
            (run(network, inputs) * wanted).sum().backward()
            gradients.append([inputs.grad, *(p.grad for p in network.parameters())])
        for one, other in zip(*gradients, strict=True):
            assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())

    def test_one_group_is_layer_normalisation(self):
        network, inputs = small(groups=1), torch.randn(20, 8)
        expected = plain(network, inputs, dict.fromkeys(GROUPS, 1)).detach()
        np.testing.assert_allclose(network(inputs).detach(), expected, atol=1e-5)

    def test_the_papers_widths_and_weights(self):
        network = paper_fingerprint_network()
        widths = (26, 128, 256, 512, 1024, 768, 640, 512, 384, 256, 192, 128, 26, 10, 6, 3)
        assert network.widths == widths
        products = sum(a * b for a, b in itertools.pairwise(widths))
        others = sum(widths[1:]) + 2 * sum(widths[1:-1])
        assert sum(p.numel() for p in network.parameters()) == products + others
        assert [(widths[a], widths[b]) for a, b in network.skips] == [
            (512, 512), (256, 256), (128, 128), (26, 26),
        ]  # fmt: skip

    def test_the_compact_one_is_as_deep(self):
        assert len(compact_fingerprint_network().widths) == len(paper_fingerprint_network().widths)

    def test_first_weights_depend_on_the_seed(self):
        one, same, other = (small(seed=s).arrays() for s in (1, 1, 2))
        for name in one:
            np.testing.assert_array_equal(one[name], same[name])
        assert np.all(one["weights.0"] != other["weights.0"])

    def test_not_a_number_is_not_hidden(self):
        inputs = torch.ones(3, 8)
        inputs[1, 0] = torch.nan
        found = small()(inputs)
        assert torch.isnan(found[1]).all() and torch.isfinite(found[[0, 2]]).all()

    def test_exponentials_are_positive(self):
        network = small(log_outputs=True, scale=(2, 3, 4))
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(5)
        raw = small()
        raw.load(network.arrays())
        inputs = torch.randn(50, 8)
        found, y = network(inputs).detach(), raw(inputs).detach()
        np.testing.assert_allclose(found[:, 0], 2 * y[:, 0], rtol=1e-5)
        small_enough = (y < 10).all(dim=1)
        np.testing.assert_allclose(
            found[small_enough, 1:],
            (y.exp() * torch.tensor([2, 3, 4]))[small_enough, 1:],
            rtol=1e-4,
        )
        assert torch.isfinite(found).all() and torch.all(found[:, 1:] > 0)

    def test_rounded_products_are_rounded_a_little(self):
        """Eight binary digits of each factor, where the processor has such products."""
        network, inputs = compact_fingerprint_network(), torch.randn(300, 26)
        with torch.inference_mode():
            exact = network(inputs)
            with rounded_products():
                rounded = network(inputs)
                with full_precision():
                    again = network(inputs)
        assert torch.equal(exact, again)
        assert float((rounded - exact).abs().mean()) < 0.05 * float(exact.std(dim=0).mean())


class TestInputs:
    def test_unit_norm_real_and_imaginary_parts(self):
        c = coefficients(50)
        found = small().inputs(1e3 * c).numpy()
        expected = c / np.linalg.norm(c, axis=1, keepdims=True)
        np.testing.assert_allclose(found[:, :RANK] + 1j * found[:, RANK:], expected, atol=1e-6)

    def test_rotated_inputs_forget_the_phase_of_m0(self):
        c = coefficients(50)
        phases = np.exp(2j * np.pi * np.random.default_rng(1).random((50, 1)))
        network = small(rotate=True)
        np.testing.assert_allclose(network.inputs(phases * c), network.inputs(c), atol=1e-6)
        assert network.inputs(c)[:, RANK].abs().max() < 1e-7

    def test_a_first_coefficient_of_zero_has_no_phase(self):
        c = coefficients(5)
        c[:, 0] = 0
        assert torch.isfinite(small(rotate=True).inputs(c)).all()


class TestWeights:
    def test_settings_and_arrays_make_the_same_network(self):
        old, inputs = small(rotate=True, log_outputs=True, scale=(1, 2, 3)), torch.randn(10, 8)
        new = FingerprintNetwork(**old.settings, seed=5).load(old.arrays())
        assert torch.equal(new(inputs), old(inputs))
        assert new.settings == old.settings

    def test_copies_are_independent(self):
        old, inputs = small(), torch.randn(10, 8)
        before = old(inputs).detach().clone()
        copy = old.copy()
        with torch.no_grad():
            copy.weights[0].zero_()
        old.arrays()["weights.0"][:] = 0
        assert torch.equal(old(inputs), before)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a.pop("gains.1"), r"arrays must hold 'gains.1', got \['biases.0'"),
            (
                lambda a: a.update({"weights.0": np.zeros((1, 64))}),
                r"arrays\['weights.0'\] must have shape \(8, 64\), got \(1, 64\)",
            ),
            (lambda a: a["biases.3"].fill(np.inf), r"arrays\['biases.3'\] must be finite"),
        ],
    )
    def test_weights_of_something_else(self, change, message):
        arrays = small().arrays()
        change(arrays)
        with pytest.raises(ValueError, match=message):
            small().load(arrays)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"widths": (7, 8, 3), "skips": ()}, "widths must hold .* first of them even"),
            ({"widths": (8,), "skips": ()}, "widths must hold at least 2"),
            ({"groups": 0}, "groups must be 1 or more, got 0"),
            ({"skips": [(1, 2)]}, r"skips must join .* equal width, from 0 to 5, got \(1, 2\)"),
            ({"skips": [(3, 1)]}, r"skips must join .* later one .*got \(3, 1\)"),
            ({"skips": [(1, 3), (1, 3)]}, "skips must end in different layers"),
            ({"scale": (1, 0, 1)}, "scale must hold 3 positive numbers"),
        ],
    )
    def test_shapes_that_are_none(self, changes, message):
        with pytest.raises(ValueError, match=message):
            small(**changes)


BASIS = np.linalg.qr(coefficients(30, seed=5))[0]


def estimator(**changes) -> FingerprintEstimator:
    options = {"network": small(), "basis": fingerprint(BASIS), "name": "mine", **changes}
    return FingerprintEstimator(**options)


class TestEstimator:
    def test_it_is_the_network(self):
        c = coefficients(10_000)
        network = small()
        expected = network(network.inputs(c)).detach().numpy()
        np.testing.assert_allclose(estimator().estimate(c), expected, atol=1e-5)

    def test_scale_does_not_matter(self):
        c = coefficients(100)
        np.testing.assert_allclose(
            estimator().estimate(1e-4 * c), estimator().estimate(c), atol=1e-5
        )

    def test_it_says_what_it_estimates(self):
        assert estimator().names == ("m0s", "T1", "T2f")
        assert estimator().units == ("1", "s", "s")
        assert "mine" in repr(estimator()) and "4 coefficients" in repr(estimator())

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 1j * np.nan])
    def test_a_bad_voxel_is_nan_and_spoils_nobody(self, bad):
        c = coefficients(5000)
        expected = estimator().estimate(c)
        c[4321, 2] = bad
        found = estimator().estimate(c)
        assert np.isnan(found[4321]).all()
        np.testing.assert_array_equal(np.delete(found, 4321, 0), np.delete(expected, 4321, 0))

    def test_air_is_nan(self):
        c = coefficients(5)
        c[2] = 0
        assert np.isnan(estimator().estimate(c)).all(axis=1).tolist() == [0, 0, 1, 0, 0]

    def test_no_voxels(self):
        assert estimator().estimate(np.empty((0, RANK), dtype=complex)).shape == (0, 3)

    @pytest.mark.parametrize(
        ("measured", "message"),
        [
            (coefficients(5).real, r"must be complex .*\(voxels, 4\), got float64"),
            (coefficients(5)[0], r"must be complex .*got complex128 of shape \(4,\)"),
            (coefficients(5)[:, :3], "must have 4 columns, got 3: mine was trained for 4 coeff"),
        ],
    )
    def test_coefficients_that_it_was_not_trained_for(self, measured, message):
        with pytest.raises(ValueError, match=f"coefficients {message}"):
            estimator().estimate(measured)

    def test_the_basis_of_training(self):
        estimator().require(basis=BASIS)
        other = BASIS[:, ::-1]
        message = rf"basis is {fingerprint(other)[:12]}.* of 30 x 4, but mine was trained for 4 .*"
        with pytest.raises(ValueError, match=message + fingerprint(BASIS)[:12]):
            estimator().require(basis=other)

    def test_another_number_of_parameters(self):
        with pytest.raises(ValueError, match="network must estimate 3 parameters, m0s, T1, T2f"):
            estimator(network=FingerprintNetwork((8, 16, 2)))
