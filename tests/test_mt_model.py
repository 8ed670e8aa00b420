"""The two-pool simulator: against a plain loop of matrix exponentials, and physics it must obey."""

import numpy as np
import pytest
from scipy.linalg import expm

from qmri.mt import MTModel, PulseTrain, bloch, lineshape
from qmri.mt.basis import svd_basis

TR = 3.5e-3
NAMES = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
TISSUE = np.array([0.15, 1.2, 0.07, 40.0, 12e-6, 300.0, 0.95])


@pytest.fixture(scope="module")
def train():
    return PulseTrain.default(120)


@pytest.fixture(scope="module")
def model(train):
    return MTModel(train)


@pytest.fixture(scope="module")
def tissue(model):
    return model.sample(50, np.random.default_rng(11))


def hamiltonian(theta, w1, r2l):
    """Generator of (xf, yf, zf, xs, zs, 1)."""
    m0s, t1, t2f, rx, _, b0, _ = theta
    m0f, r1, r2f = 1 - m0s, 1 / t1, 1 / t2f
    h = np.zeros((6, 6))
    h[0, [0, 1, 2]] = -r2f, -b0, w1
    h[1, [0, 1]] = b0, -r2f
    h[2, [0, 2, 4, 5]] = -w1, -r1 - rx * m0s, rx * m0f, r1 * m0f
    h[3, [3, 4]] = -r2l, w1
    h[4, [2, 3, 4, 5]] = rx * m0s, -w1, -r1 - rx * m0f, r1 * m0s
    return h


def propagators(train, theta):
    """One 6 x 6 matrix for each period of the train, from echo to echo."""
    steps = []
    forget = np.diag([1.0, 1, 1, 0, 1, 1])
    advance = np.diag([-1.0, -1, 1, 1, 1, 1])
    for number, (angle, duration) in enumerate(
        zip(train.flip_angles, train.durations, strict=True)
    ):
        angle = angle * theta[6]
        r, _, _ = lineshape.lookup(angle, duration / theta[4], *lineshape.table())
        pulse = expm(hamiltonian(theta, angle / duration, r / duration) * duration)
        if number == 0:
            # Equal crushers: a mean over many places, each turned alike before and after. The
            # inversion turns about the x axis.
            quarter = turn(np.pi / 2)
            pulse = quarter @ pulse @ quarter.T
            places = np.arange(16) * 2 * np.pi / 16
            pulse = np.mean([turn(p) @ pulse @ turn(p) for p in places], axis=0)
        free = expm(hamiltonian(theta, 0, 0) * (train.repetition_time - duration) / 2)
        steps.append(free @ forget @ pulse @ forget @ advance @ free)
    return steps


def turn(angle):
    matrix = np.eye(6)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrix


def plain_signal(train, theta):
    """The train repeated until nothing changes: no equation for the steady state."""
    steps = propagators(train, theta)
    once = np.linalg.multi_dot(steps[::-1])
    m = np.linalg.matrix_power(once, 2**14) @ np.array([0, 0, 1 - theta[0], 0, theta[0], 1])
    signal = []
    for step in steps:
        m = step @ m
        signal.append(m[0] + 1j * m[1])
    return np.array(signal)


class TestSignal:
    def test_agrees_with_matrix_exponentials(self, train, model, tissue):
        signal = model.signal(tissue)
        for theta, found in zip(tissue, signal, strict=True):
            expected = plain_signal(train, theta)
            assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()

    def test_one_pool_is_the_bloch_equation(self, train, model):
        """Without a semi-solid pool nothing depends on it, and hard pulses tell the same."""
        theta = TISSUE.copy()
        theta[0], theta[3] = 0.0, 0.0
        one = model.signal([theta])[0]
        theta[[3, 4]] = 60.0, 9e-6
        assert np.allclose(model.signal([theta])[0], one, rtol=0, atol=1e-12)
        short = PulseTrain(train.flip_angles, np.full(train.pulses, 1e-4), TR)
        relaxed = hard_pulses(short.flip_angles * theta[6], theta[1], theta[2], theta[5])
        found = MTModel(short).signal([theta])[0]
        assert np.abs(found - relaxed).max() < 0.02 * np.abs(relaxed).max()

    def test_opposite_off_resonance_conjugates(self, model, tissue):
        mirrored = tissue.copy()
        mirrored[:, 5] *= -1
        assert np.allclose(model.signal(mirrored), model.signal(tissue).conj(), atol=1e-12)

    def test_neighbours_do_not_matter(self, model, tissue):
        """Eight tissues share registers; a result must not depend on the other seven."""
        together = model.signal(tissue)
        alone = np.concatenate([model.signal(tissue[k : k + 1]) for k in range(11)])
        assert np.allclose(together[:11], alone, rtol=0, atol=1e-10)
        assert model.signal(np.empty((0, 7))).shape == (0, 120)

    def test_magnetization_is_bounded_by_equilibrium(self, model, tissue):
        assert np.abs(model.signal(tissue)).max() < 1

    def test_period_of_off_resonance(self, model):
        """A period of 1 / TR later everything but the pulses' own duration is as before."""
        shifted = TISSUE + np.array([0, 0, 0, 0, 0, -2 * np.pi / TR, 0])
        signal, after = model.signal([TISSUE])[0], model.signal([shifted])[0]
        assert np.linalg.norm(after + signal) < 0.3 * np.linalg.norm(signal)


def hard_pulses(angles, t1, t2, b0):
    """One pool, pulses of no duration: rotation matrices only."""
    e1, e2 = np.exp(-TR / 2 / t1), np.exp(-TR / 2 / t2)
    c, s = np.cos(b0 * TR / 2), np.sin(b0 * TR / 2)
    free = np.diag([0.0, 0, e1, 1])
    free[:2, :2] = e2 * np.array([[c, -s], [s, c]])
    free[2, 3] = 1 - e1
    steps = []
    for number, angle in enumerate(angles):
        pulse = np.eye(4)
        pulse[np.ix_([0, 2], [0, 2])] = [
            [np.cos(angle), np.sin(angle)],
            [-np.sin(angle), np.cos(angle)],
        ]
        if number == 0:
            share = np.sin(angle / 2) ** 2
            pulse = np.diag([share, -share, np.cos(angle), 1])
        steps.append(free @ pulse @ np.diag([-1.0, -1, 1, 1]) @ free)
    once = np.linalg.multi_dot(steps[::-1])
    m = np.linalg.matrix_power(once, 2**14) @ [0, 0, 1, 1]
    signal = []
    for step in steps:
        m = step @ m
        signal.append(m[0] + 1j * m[1])
    return np.array(signal)


class TestConservation:
    def test_without_relaxation_a_pulse_only_turns(self):
        """T1 = T2 = inf, one pool: the length of the magnetization stays."""
        w = np.zeros(bloch._SIZE)
        theta = np.tile([0.0, np.inf, np.inf, 0.0, 12e-6, 700.0, 1.1], (bloch.W, 1))
        bloch._load_tissue(w, theta, 0)
        series, terms = bloch._chebyshev()
        start = np.random.default_rng(0).normal(size=(3, bloch.W))
        w[: 3 * bloch.W] = start.ravel()
        row, count, _ = bloch._prepare_pulse(w, 1.3, 3e-4, lineshape.table(), terms)
        bloch._pulse(w, series[row], count, 1.0)
        after = w[: 3 * bloch.W].reshape(3, bloch.W)
        assert np.allclose(np.linalg.norm(after, axis=0), np.linalg.norm(start, axis=0), rtol=1e-12)
        free = np.empty((1, bloch._FREE * bloch.W))
        bloch._prepare_free(w, np.array([2e-3]), free)
        bloch._relax(w, free[0], 1.0)
        later = w[: 3 * bloch.W].reshape(3, bloch.W)
        assert np.allclose(np.linalg.norm(later, axis=0), np.linalg.norm(start, axis=0), rtol=1e-12)


class TestJacobian:
    def test_is_the_derivative(self, model, tissue):
        """Against differences with an error of fourth order in the step."""
        tissue = tissue[:12]
        jacobian = model.jacobian(tissue)
        scale = np.array([0.1, 1.0, 0.05, 30.0, 1e-5, 300.0, 1.0])
        for p, name in enumerate(NAMES):
            h = 2e-4 * np.minimum(scale[p], np.abs(tissue[:, p]))
            moved = {}
            for k in (-2, -1, 1, 2):
                theta = tissue.copy()
                theta[:, p] += k * h
                moved[k] = model.signal(theta)
            slope = (8 * (moved[1] - moved[-1]) - (moved[2] - moved[-2])) / (12 * h[:, np.newaxis])
            error = np.abs(slope - jacobian[:, :, p]).max(axis=1)
            assert np.all(error < 1e-4 * np.abs(jacobian[:, :, p]).max(axis=1)), name

    def test_comes_with_the_signal(self, model, tissue):
        signal, jacobian = model.signal_and_jacobian(tissue)
        assert np.allclose(signal, model.signal(tissue), rtol=0, atol=1e-13)
        assert jacobian.shape == (50, 120, 7)

    def test_is_compressed_like_the_signal(self, train, model, tissue):
        basis, _ = svd_basis(model.signal(tissue), 5)
        compressed = MTModel(train, basis)
        signal, jacobian = compressed.signal_and_jacobian(tissue)
        assert np.allclose(signal, model.signal(tissue) @ basis.conj())
        expected = np.einsum("ntp,tr->nrp", model.jacobian(tissue), basis.conj())
        assert np.allclose(jacobian, expected)
        assert compressed.measurements == 5


class TestSample:
    def test_follows_the_distributions_asked_for(self, model):
        theta = model.sample(40_000, np.random.default_rng(3))
        m0s, t1, t2f, rx, t2s, b0, b1 = theta.T
        # Means and SDs of truncated Gaussians, from scipy.stats.truncnorm.
        from scipy.stats import truncnorm

        for values, mean, sd, low, high in (
            (m0s, 0.12, 0.08, 0.0, 0.6), (t1, 1.6, 0.8, 0.1, 5.0), (rx, 44, 20, 0, 150),
            (t2s, 12e-6, 3e-6, 8e-6, 20e-6), (b1, 1.0, 0.3, 0.2, 1.9),
        ):  # fmt: skip
            expected = truncnorm((low - mean) / sd, (high - mean) / sd, mean, sd)
            assert abs(values.mean() - expected.mean()) < 5 * expected.std() / 200
            assert values.std() == pytest.approx(expected.std(), rel=0.03)
        assert np.all((t2f >= 0.002) & (t2f <= t1))
        assert np.abs(b0).max() <= np.pi / TR
        assert abs(b0.mean()) < 5 * np.pi / TR / np.sqrt(3) / 200

    def test_same_seed_same_tissue(self, model):
        first, second = (model.sample(5, np.random.default_rng(1)) for _ in range(2))
        assert np.array_equal(first, second)

    def test_density_is_that_of_the_samples(self, model):
        """E[1 / density] over a box is the box's volume over its share: checked on two halves."""
        theta = model.sample(100_000, np.random.default_rng(5))
        low = np.array([0.05, 1.0, 0.05, 30, 10e-6, -300, 0.8])
        high = np.array([0.2, 2.0, 0.3, 60, 14e-6, 300, 1.2])
        inside = np.all((theta > low) & (theta < high), axis=1)
        kept = theta[inside]
        weight = np.exp(-model.log_prior(kept))
        for p in range(7):
            middle = (low[p] + high[p]) / 2
            lower = weight[kept[:, p] < middle].sum() / weight.sum()
            assert lower == pytest.approx(0.5, abs=0.08)

    def test_density_is_zero_outside(self, model):
        outside = np.tile(TISSUE, (3, 1))
        outside[0, 2], outside[1, 0], outside[2, 6] = 1.3, 0.7, 0.1
        assert np.all(model.log_prior(outside) == -np.inf)
        assert np.isfinite(model.log_prior([TISSUE]))


class TestBadInput:
    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            (0, -0.1, "m0s must be from 0 to below 1, got -0.1"),
            (0, 1.0, "m0s must be"),
            (1, 0.0, "T1 must be positive"),
            (2, 2.0, "T2f must be positive and no longer than T1"),
            (3, -1.0, "Rx must be 0 or more"),
            (4, 0.0, "T2s must be positive"),
            (6, -0.5, "B1 must be 0 or more"),
            (5, np.nan, "finite, got B0 = nan in row 1"),
            (1, np.inf, "finite, got T1 = inf in row 1"),
            (4, 12.0, "tau"),
            (6, 3.0, "alpha"),
        ],
    )
    def test_tissue_that_cannot_be(self, model, column, value, message):
        theta = np.tile(TISSUE, (3, 1))
        theta[1, column] = value
        with pytest.raises(ValueError, match=message):
            model.signal(theta)

    def test_wrong_number_of_columns(self, model):
        with pytest.raises(ValueError, match="one column for each of m0s, T1"):
            model.signal(np.ones((2, 6)))

    def test_basis_of_another_train(self, train):
        with pytest.raises(ValueError, match="basis"):
            MTModel(train, np.eye(100)[:, :5])

    def test_basis_that_is_not_orthonormal(self, train):
        with pytest.raises(ValueError, match="orthonormal"):
            MTModel(train, np.ones((120, 2)))

    def test_not_a_train(self):
        with pytest.raises(ValueError, match="train must be a PulseTrain"):
            MTModel([1, 2, 3])


class TestRangesOfATrain:
    """A model's own bounds are tissue that it can simulate, whatever the train."""

    @pytest.mark.parametrize("strongest", [np.pi, 3.5, 2 * np.pi])
    def test_bounds_can_be_simulated(self, strongest):
        train = PulseTrain(np.array([strongest, 0.5, 0.7]), np.full(3, 3e-4), TR)
        model = MTModel(train)
        for end in (0, 1):
            theta = np.clip(TISSUE, *model.bounds.T)
            theta[[4, 6]] = model.bounds[[4, 6], end]
            assert np.isfinite(model.signal([theta])).all()

    def test_pulses_beyond_the_line_shape_are_refused(self):
        with pytest.raises(ValueError, match="train must have pulses that the line shape"):
            MTModel(PulseTrain(np.array([1.0, 0.5]), np.array([1e-5, 2e-3]), TR))
