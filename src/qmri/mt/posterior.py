"""What the prior is worth: the smallest mean loss that any estimator can reach.

An unbiased estimator cannot beat the Cramer-Rao bound. One that knows the tissue it will meet
can, by leaning towards the likely. The least mean of the squared error over the bound belongs
to the weighted posterior mean, E[w theta | y] / E[w | y] with w = |M0|^2 / CRB(theta), and is
computed here by Markov chains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import i0e
from tqdm import tqdm

from qmri.crb import bound_from_jacobian, with_amplitude
from qmri.models import Array
from qmri.mt.model import MTModel

__all__ = ["BayesFloor", "bayes_floor"]

_LOGARITHMIC = ("T1", "T2f")  # walked in their logarithm: positive, and their error grows with them
_MIRRORED = 0.1  # share of the steps that change the sign of B0
_BURN_IN = 0.2
_CHAINS = 2
_SIZES = (0.1, 1.5)  # of a step, in units of the best one for a Gaussian posterior
_ROUNDING = 1e-11  # of a signal's energy: what two simulations of one tissue may differ by
_STUCK = 0.01  # of the steps: a chain that takes fewer has seen nothing of the posterior


@dataclass(frozen=True, eq=False)
class BayesFloor:
    """The smallest loss, one number for each fingerprint that was looked at.

    Attributes
    ----------
    floor : (n, targets)
        Posterior expectation of the squared error of the weighted posterior mean over the
        bound. Its mean over fingerprints is the smallest loss of any estimator.
    loss : (n, targets)
        What the weighted posterior mean, as far as the chains know it, costs at the truth. Its
        mean is above the floor by the chains' own noise.
    acceptance : (n,)
        Share of the steps that were taken.
    """

    floor: Array
    loss: Array
    acceptance: Array


def bayes_floor(
    model: MTModel,
    coefficients: ArrayLike,
    theta: ArrayLike,
    m0: ArrayLike,
    *,
    sigma: float,
    magnitude: tuple[float, float],
    steps: int,
    rng: np.random.Generator,
    targets: int = 3,
    thin: int = 10,
    progress: bool = False,
) -> BayesFloor:
    """Posterior means of noisy fingerprints whose tissue is known, and their loss.

    Parameters
    ----------
    model : MTModel
        Its tissue distribution is the prior.
    coefficients : (n, rank) complex
        Noisy.
    theta : (n, 7)
        The tissue behind each, drawn from the prior.
    m0 : (n,) complex
        The amplitude of each: its magnitude uniform over `magnitude`, its phase over the circle.
    sigma : float
        SD of the noise of each real and imaginary part.
    magnitude : (float, float)
    steps : int
        Of each of two chains for each fingerprint.
    rng : numpy.random.Generator
    targets : int
        How many of the first parameters are estimated.
    thin : int
        Every so many steps the chain's tissue counts, with its bound.
    progress : bool

    Returns
    -------
    BayesFloor

    Raises
    ------
    ValueError
        If shapes do not fit together, there are too few steps, or the noise is so small that
        chains do not move.

    Notes
    -----
    The truth is itself one draw from the posterior, so that chains that start there need not
    first find it; the first fifth is left out all the same, for the two chains of a fingerprint
    to part. Steps are Gaussian, with the covariance that Fisher information and prior give at
    the truth, in a random size; one in ten also changes the sign of B0. The phase of M0 is
    integrated out, its magnitude is walked.
    """
    y = np.asarray(coefficients, dtype=np.complex128)
    theta = model.check_theta(theta)
    m0 = np.asarray(m0, dtype=np.complex128)
    n = len(theta)
    if y.shape != (n, model.measurements) or m0.shape != (n,):
        raise ValueError(
            f"coefficients and m0 must have shapes {(n, model.measurements)} and {(n,)}, got "
            f"{y.shape} and {m0.shape}"
        )
    if steps < 10 * thin:
        raise ValueError(f"steps must be at least {10 * thin}, got {steps!r}")
    if np.sum(np.abs(y) ** 2, axis=1).max() * _ROUNDING > sigma**2:
        raise ValueError(
            f"sigma of {sigma:g} is too small: the simulator's rounding errors would outweigh it"
        )
    walk = _Walk(model, y, theta, np.abs(m0), sigma, magnitude, targets)
    counted, accepted = [], np.zeros(len(walk.rho))
    for step in tqdm(range(steps), disable=not progress, unit="step", desc="posterior"):
        accepted += walk.step(rng)
        if step >= _BURN_IN * steps and step % thin == 0:
            counted.append(walk.weighted())
    acceptance = accepted.reshape(_CHAINS, n).mean(axis=0) / steps
    if np.any(acceptance < _STUCK):
        raise ValueError(
            f"sigma of {sigma:g} is too small for these chains: those of "
            f"{int(np.sum(acceptance < _STUCK))} fingerprints do not move"
        )
    weights, values = (np.array(x).reshape(len(counted), _CHAINS, n, targets) for x in
                       zip(*counted, strict=True))  # fmt: skip
    weight = weights.mean(axis=(0, 1))
    means = np.mean(weights * values, axis=0) / weights.mean(axis=0)  # of each chain
    mean = np.mean(weights * values, axis=(0, 1)) / weight
    # Samples spread less about their own mean than about the true one: by as much as that mean
    # varies, which is a quarter of the squared difference between two chains.
    spread = np.mean(weights * (values - mean) ** 2, axis=(0, 1))
    floor = spread + weight * (means[0] - means[1]) ** 2 / 4
    loss = walk.weight(theta, np.abs(m0)) * (mean - theta[:, :targets]) ** 2
    return BayesFloor(floor, loss, acceptance)


class _Walk:
    """Chains side by side, so that the simulator always has a batch."""

    def __init__(self, model, y, theta, rho, sigma, magnitude, targets):
        self.model, self.sigma, self.magnitude, self.targets = model, sigma, magnitude, targets
        self.logarithmic = [model.names.index(name) for name in _LOGARITHMIC]
        self.b0 = model.names.index("B0")
        self.y = np.tile(y, (_CHAINS, 1))
        self.theta, self.rho = np.tile(theta, (_CHAINS, 1)), np.tile(rho, _CHAINS)
        self.factors = np.tile(self._proposal(theta, rho), (_CHAINS, 1, 1))
        self.density = self._density(self.theta, self.rho)

    def _proposal(self, theta: Array, rho: Array) -> Array:
        """Cholesky factors (n, 8, 8) of the covariance of the steps, at the truth."""
        signal, jacobian = self.model.signal_and_jacobian(theta)
        jacobian[:, :, self.logarithmic] *= theta[:, np.newaxis, self.logarithmic]
        columns = with_amplitude(signal, jacobian * rho[:, np.newaxis, np.newaxis]) / self.sigma
        columns = np.concatenate([columns.real, columns.imag], axis=1)
        spread = self.model.prior_sd(theta)
        spread[:, self.logarithmic] /= theta[:, self.logarithmic]
        spread[:, self.logarithmic] = np.minimum(spread[:, self.logarithmic], 1.0)
        low, high = self.magnitude
        amplitude = np.full((len(theta), 1), max(high - low, 1e-3) / np.sqrt(12))
        spread = np.concatenate([spread, amplitude, np.full_like(amplitude, 10.0)], axis=1)
        scaled = columns * spread[:, np.newaxis]
        information = scaled.swapaxes(1, 2) @ scaled + np.eye(scaled.shape[2])
        covariance = np.linalg.inv(information)[:, :-1, :-1]  # without the phase of M0
        size = spread[:, :-1]
        return size[:, :, np.newaxis] * np.linalg.cholesky(covariance)

    def _density(self, theta: Array, rho: Array) -> Array:
        """Logarithm of posterior density in the walked coordinates, up to a number per chain."""
        possible = self.model.log_prior(theta)
        low, high = self.magnitude
        possible[(rho < low) | (rho > high)] = -np.inf
        usable = np.isfinite(possible)
        signal = self.model.signal(theta[usable])
        size = rho[usable]
        overlap = np.abs(np.sum(self.y[usable].conj() * signal, axis=1)) * size / self.sigma**2
        power = np.sum(np.abs(signal) ** 2, axis=1) * size**2 / (2 * self.sigma**2)
        possible[usable] += overlap + np.log(i0e(overlap)) - power
        possible[usable] += np.log(theta[usable][:, self.logarithmic]).sum(axis=1)
        return possible

    def step(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        n, p = self.theta.shape
        size = 2.38 / np.sqrt(p + 1) * np.exp(rng.uniform(*np.log(_SIZES), n))
        move = np.einsum("nij,nj->ni", self.factors, rng.standard_normal((n, p + 1)))
        move *= size[:, np.newaxis]
        theta, rho = self.theta.copy(), self.rho + move[:, p]
        theta[:, self.logarithmic] *= np.exp(move[:, self.logarithmic])
        others = [k for k in range(p) if k not in self.logarithmic]
        theta[:, others] += move[:, others]
        mirrored = rng.random(n) < _MIRRORED
        theta[mirrored, self.b0] *= -1
        density = self._density(theta, rho)
        taken = np.log(rng.random(n)) < density - self.density
        self.theta[taken], self.rho[taken] = theta[taken], rho[taken]
        self.density[taken] = density[taken]
        return taken

    def weight(self, theta: Array, rho: Array) -> Array:
        """|M0|^2 / CRB, (n, targets)."""
        jacobian = with_amplitude(*self.model.signal_and_jacobian(theta))
        crb = bound_from_jacobian(jacobian, self.sigma)[:, : self.targets]
        return rho[:, np.newaxis] ** 2 / crb

    def weighted(self) -> tuple[Array, Array]:
        return self.weight(self.theta, self.rho), self.theta[:, : self.targets].copy()
