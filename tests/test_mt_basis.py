"""Low-rank bases: against NumPy's SVD, and what conjugation does to coefficients."""

from __future__ import annotations

import numpy as np
import pytest

from qmri.mt.basis import (
    basis_from_gram,
    check_basis,
    compress,
    conjugation,
    conjugation_loss,
    energy_outside,
    fingerprint,
    gram_matrix,
    svd_basis,
)
from qmri.sources import is_available, load_mt_basis

PULSES = 40


def damped_oscillations(n, seed=0):
    """Signals of many tissues, smooth in two parameters: of low rank, but for rounding."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, PULSES)
    rate, frequency = rng.uniform(0.5, 3, (n, 1)), rng.uniform(-4, 4, (n, 1))
    return np.exp((-rate + 1j * frequency) * t)


SIGNALS = damped_oscillations(300)


@pytest.fixture
def published():
    name = "mt-brain/basis_for_compress.mat"
    if not is_available(name):
        pytest.skip(
            f"{name} is not on this computer: set QMRI_DATA_DIR to a folder that holds it, or "
            f"run qmri.fetch({name!r}) once"
        )
    return load_mt_basis(13)


class TestSvdBasis:
    def test_spans_what_numpys_svd_spans(self):
        basis, values = svd_basis(SIGNALS, 5)
        left, expected, _ = np.linalg.svd(SIGNALS.T, full_matrices=False)
        # Eigenvalues of the Gram matrix are good to rounding of the largest one.
        rounding = 1e-14 * expected[0] ** 2
        np.testing.assert_allclose(values**2, expected**2, atol=10 * rounding)
        np.testing.assert_allclose(
            basis @ basis.conj().T, left[:, :5] @ left[:, :5].conj().T, atol=1e-10
        )

    def test_is_orthonormal_and_falls(self):
        basis, values = svd_basis(SIGNALS, 8)
        np.testing.assert_allclose(basis.conj().T @ basis, np.eye(8), atol=1e-12)
        assert np.all(np.diff(values) <= 0) and len(values) == PULSES

    def test_energy_outside_is_that_of_the_dropped_singular_values(self):
        basis, values = svd_basis(SIGNALS, 3)
        energy = np.sum(np.abs(SIGNALS) ** 2, axis=1)
        outside = np.sum(energy_outside(SIGNALS, basis) * energy)
        assert outside == pytest.approx(np.sum(values[3:] ** 2), rel=1e-9)

    def test_signals_of_known_rank_are_kept_whole(self):
        rng = np.random.default_rng(1)
        pair = rng.standard_normal((50, 4)).view(complex)
        signals = pair @ rng.standard_normal((2, 2 * PULSES)).view(complex)
        basis, values = svd_basis(signals, 2)
        assert energy_outside(signals, basis).max() < 1e-20
        assert values[2] < 1e-7 * values[0]
        restored = compress(signals, basis) @ basis.T
        np.testing.assert_allclose(restored, signals, atol=1e-12)

    def test_the_set_may_come_in_pieces(self):
        whole = svd_basis(SIGNALS, 6)
        pieces = basis_from_gram(gram_matrix(SIGNALS[k : k + 70] for k in range(0, 300, 70)), 6)
        for one, other in zip(whole, pieces, strict=True):
            np.testing.assert_allclose(one[:6], other[:6], atol=1e-9)

    def test_many_signals_are_summed_block_by_block(self):
        signals = damped_oscillations(10_000, seed=4)
        np.testing.assert_allclose(
            gram_matrix([signals]), signals.T @ signals.conj(), rtol=1e-11, atol=1e-8
        )

    def test_largest_entry_is_real_and_positive(self):
        basis, _ = svd_basis(SIGNALS, 6)
        largest = basis[np.argmax(np.abs(basis), axis=0), np.arange(6)]
        assert np.all(largest.real > 0)
        np.testing.assert_allclose(largest.imag, 0, atol=1e-15)

    @pytest.mark.parametrize("rank", [0, -1, PULSES + 1, 2.5, "3", True])
    def test_bad_rank(self, rank):
        with pytest.raises(ValueError, match="rank must be a whole number from 1 to 40"):
            svd_basis(SIGNALS, rank)

    def test_bad_signals(self):
        with pytest.raises(ValueError, match=r"signals must be finite, got 1 of 3 .*first is 1"):
            svd_basis([[1.0, 2.0], [np.nan, 0.0], [0.0, 1.0]], 1)
        with pytest.raises(ValueError, match=r"signals must have shape \(tissues, pulses\)"):
            svd_basis(np.ones(4), 1)
        with pytest.raises(ValueError, match="pieces must hold at least one"):
            gram_matrix([])
        with pytest.raises(ValueError, match="pieces must all have 4 pulses .* got one of 5"):
            gram_matrix([np.ones((2, 4)), np.ones((2, 5))])

    def test_bad_gram_matrix(self):
        with pytest.raises(ValueError, match="gram must be Hermitian"):
            basis_from_gram([[1.0, 2.0], [0.0, 1.0]], 1)
        with pytest.raises(ValueError, match=r"gram must have shape \(pulses, pulses\)"):
            basis_from_gram(np.ones((2, 3)), 1)
        with pytest.raises(ValueError, match="gram must be finite"):
            basis_from_gram([[np.nan, 0], [0, 1]], 1)


def test_white_noise_stays_white():
    """Coefficients of independent noise are independent, with the same SD per real channel."""
    basis, _ = svd_basis(SIGNALS, 4)
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((40_000, 2 * PULSES)).view(complex)
    coefficients = compress(noise, basis)
    channels = np.concatenate([coefficients.real, coefficients.imag], axis=1)
    # Entries of a sample covariance of n normal values are known to sqrt(2 / n).
    np.testing.assert_allclose(np.cov(channels.T), np.eye(8), atol=5 * np.sqrt(2 / 40_000))


class TestConjugation:
    def test_conjugated_signal_has_the_predicted_coefficients(self):
        """The span of a function and its conjugate is closed, whatever basis it has."""
        rng = np.random.default_rng(3)
        real, _ = svd_basis(SIGNALS.real, 3)
        turn, _ = np.linalg.qr(rng.standard_normal((3, 6)).view(complex))
        basis = real @ turn
        signals = rng.standard_normal((20, 6)).view(complex) @ basis.T
        predicted = compress(signals, basis).conj() @ conjugation(basis)
        np.testing.assert_allclose(compress(signals.conj(), basis), predicted, atol=1e-12)
        assert conjugation_loss(basis) < 1e-12

    def test_real_basis_leaves_plain_conjugation(self):
        basis, _ = svd_basis(SIGNALS.real, 3)
        np.testing.assert_allclose(conjugation(basis), np.eye(3), atol=1e-12)

    def test_one_sided_spectrum_is_lost_altogether(self):
        t = np.arange(PULSES)
        basis = np.exp(2j * np.pi * np.outer(t, [1, 2]) / PULSES) / np.sqrt(PULSES)
        assert conjugation_loss(basis) == pytest.approx(1.0)
        np.testing.assert_allclose(conjugation(basis), 0, atol=1e-12)

    def test_real_part_of_the_gram_matrix_counts_the_conjugates_too(self):
        both = np.concatenate([SIGNALS, SIGNALS.conj()])
        expected, values = svd_basis(both, 4)
        basis, half = basis_from_gram(gram_matrix([SIGNALS]).real, 4)
        assert np.all(basis.imag == 0)
        assert conjugation_loss(basis) < 1e-12
        np.testing.assert_allclose(half[:4] * np.sqrt(2), values[:4], rtol=1e-9)
        np.testing.assert_allclose(basis, expected, atol=1e-7)

    def test_published_basis_is_closed(self, published):
        assert conjugation_loss(published[0]) < 1e-12


class TestCheckBasis:
    basis, _ = svd_basis(SIGNALS, 5)

    def test_passes_a_good_one(self):
        checked = check_basis(self.basis, PULSES)
        np.testing.assert_array_equal(checked, self.basis)
        assert checked.dtype == np.complex128
        single = check_basis(self.basis.astype(np.complex64), PULSES)
        np.testing.assert_allclose(single, self.basis, atol=1e-7)

    def test_passes_the_published_one(self, published):
        assert check_basis(published[0], 1142).shape == (1142, 13)

    @pytest.mark.parametrize(
        ("basis", "message"),
        [
            (basis[:-1], r"basis must have shape \(40, rank\), .* got \(39, 5\)"),
            (basis.T, r"basis must have shape \(40, rank\), .* got \(5, 40\)"),
            (basis[:, 0], r"got \(40,\)"),
            (basis[:, :0], "from 1 to 40 columns, .* got 0"),
            (np.concatenate([basis] * 9, axis=1), "from 1 to 40 columns, .* got 45"),
            (np.where(np.arange(5) == 2, np.nan, basis), "basis must be finite, got 40"),
            (basis * (1 + 1e-5), "orthonormal columns, .* differs from the identity by 2e-05"),
            (basis[:, [0, 0]], "orthonormal columns, .* differs from the identity by 1"),
            ("basis", "basis must hold numbers"),
        ],
    )
    def test_names_what_is_wrong(self, basis, message):
        with pytest.raises(ValueError, match=message):
            check_basis(basis, PULSES)


class TestEnergyOutside:
    def test_known_shares(self):
        basis = np.eye(4)[:, :2]
        signals = [[1, 0, 0, 0], [0, 1j, 1, 0], [0, 0, 2, 1j], [0, 0, 0, 0]]
        np.testing.assert_allclose(energy_outside(signals, basis), [0, 0.5, 1, 0], atol=1e-15)


class TestFingerprint:
    basis, _ = svd_basis(SIGNALS, 5)

    def test_survives_rounding_but_nothing_else(self):
        name = fingerprint(self.basis)
        assert fingerprint(self.basis + 1e-13) == name
        assert fingerprint(np.asfortranarray(self.basis)) == name
        changed = self.basis.copy()
        changed[3, 2] += 2e-6
        assert fingerprint(changed) != name
        assert fingerprint(self.basis[:, :4]) != name
        assert fingerprint(self.basis.conj()) != name
        assert fingerprint(self.basis[:, ::-1]) != name

    def test_shape_counts(self):
        assert fingerprint(np.zeros((2, 3))) != fingerprint(np.zeros((3, 2)))

    def test_minus_zero_is_zero(self):
        assert fingerprint(-np.zeros((2, 3))) == fingerprint(np.zeros((2, 3)))
