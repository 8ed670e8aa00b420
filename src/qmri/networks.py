"""Network shapes: many small networks side by side, and one deep one for fingerprints.

A network of ten units a layer is so small that a processor spends its time on the calls, not
on the numbers. `Networks` therefore holds many of one shape as a stack: each layer is one
batched matrix product, and sixteen networks cost hardly more than one. A `FingerprintNetwork`
is wide and deep; its time goes into matrix products, and whatever lies between two of them is
done in one pass over the numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from qmri.models import Array, SignalModel
from qmri.mt.basis import fingerprint

__all__ = [
    "FingerprintEstimator",
    "FingerprintNetwork",
    "NetworkBank",
    "NetworkEstimator",
    "Networks",
    "Routes",
    "as_reals",
    "compact_fingerprint_network",
    "full_precision",
    "mlp_widths",
    "paper_fingerprint_network",
    "rounded_products",
]

_ROWS = 4096  # voxels passed through at once: small enough for caches


def mlp_widths(model: SignalModel, hidden: int = 3, width: int | None = None) -> tuple[int, ...]:
    """Units of each layer of a fully connected network for a model, input and output included.

    Parameters
    ----------
    model : SignalModel
    hidden : int
        Hidden layers.
    width : int, optional
        Units of each; by default as many as there are measurements, as in the IVIM networks of
        Barbieri et al. {cite}`barbieri2020ivimnet` and Epstein et al. {cite}`epstein2024labels`.
    """
    width = model.measurements if width is None else width
    if hidden < 1 or width < 1:
        raise ValueError(f"hidden and width must be 1 or more, got {hidden!r} and {width!r}")
    return (model.measurements, *[width] * hidden, len(model.parameters))


class Networks(nn.Module):
    """Fully connected networks of one shape, side by side.

    ELU after each hidden layer; the last layer's absolute value times `scale` is the estimate.

    Parameters
    ----------
    widths : sequence of int
        Units of each layer, input and output included.
    scale : (parameters,)
        Typical size of each parameter, positive. The last layer then works on numbers near 1:
        the functions that the network can express are the same, but Dfast, some hundred times
        as large as f, is not reached in steps made for f.
    seeds : sequence of int
        One for each network, for its initial weights: uniform within 1 / sqrt(inputs).

    Attributes
    ----------
    weights : list of (networks, inputs, outputs)
    biases : list of (networks, 1, outputs)
    """

    def __init__(self, widths: Sequence[int], scale: ArrayLike, seeds: Sequence[int]):
        super().__init__()
        scale = _checked_scale(scale, widths[-1])
        if len(seeds) == 0:
            raise ValueError("seeds must hold one seed for each network, got none")
        self.widths = tuple(widths)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        weights, biases = [], []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for inputs, outputs in itertools.pairwise(self.widths):
            reach = 1 / inputs**0.5
            weights.append(_uniform((inputs, outputs), reach, generators))
            biases.append(_uniform((1, outputs), reach, generators))
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)

    def __len__(self) -> int:
        return len(self.weights[0])

    def forward(self, signals: Tensor) -> Tensor:
        """Estimates of each network.

        Parameters
        ----------
        signals : (networks, voxels, measurements)

        Returns
        -------
        (networks, voxels, parameters)
        """
        x = signals
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = _ELU.apply(torch.bmm(x, weight) + bias)
        return (torch.bmm(x, self.weights[-1]) + self.biases[-1]).abs() * self.scale

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of all weights by name, first axis networks."""
        return {name: value.detach().numpy().copy() for name, value in self.named_parameters()}

    def load(self, arrays: Mapping[str, ArrayLike]) -> Networks:
        """Take over weights as `arrays` returns them; one network's serve all of them.

        Raises
        ------
        ValueError
            If an array is missing, has another shape, or holds NaN.
        """
        with torch.no_grad():
            for name, value in self.named_parameters():
                value.copy_(_checked(arrays, name, value.shape, one_serves_all=True))
        return self

    def at(self, chosen: Sequence[int]) -> Networks:
        """Some of the networks, in the order asked for, as a copy."""
        part = Networks(self.widths, self.scale.numpy(), seeds=[0] * len(chosen))
        return part.load({name: value[list(chosen)] for name, value in self.arrays().items()})


class _ELU(torch.autograd.Function):
    """ELU as the larger of x and exp(x) - 1: several times faster on a CPU than PyTorch's own.

    PyTorch asks for expm1, which keeps relative precision near 0 and is slow; here the absolute
    precision is what counts.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        value = torch.maximum(x, x.clamp(max=0).exp_().sub_(1))
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return gradient * value.clamp(max=0).add_(1)


def _checked_scale(scale: ArrayLike, outputs: int) -> Array:
    scale = np.asarray(scale, dtype=np.float64)
    if scale.shape != (outputs,) or not np.all(np.isfinite(scale) & (scale > 0)):
        raise ValueError(
            f"scale must hold {outputs} positive numbers, one for each output, got {scale}"
        )
    return scale


def _checked(
    arrays: Mapping[str, ArrayLike], name: str, shape: torch.Size, one_serves_all: bool = False
) -> Tensor:
    """One of the arrays by name, if it is there, of the shape asked for, and finite."""
    if name not in arrays:
        raise ValueError(f"arrays must hold {name!r}, got {sorted(arrays)}")
    new, shape = np.asarray(arrays[name]), tuple(shape)
    if new.shape != shape and not (one_serves_all and new.shape == (1, *shape[1:])):
        raise ValueError(f"arrays[{name!r}] must have shape {shape}, got {new.shape}")
    if not np.isfinite(new).all():
        raise ValueError(f"arrays[{name!r}] must be finite")
    return torch.from_numpy(new.astype(np.float32))


def _uniform(shape: tuple[int, int], reach: float, generators: list) -> nn.Parameter:
    draws = [torch.empty(shape).uniform_(-reach, reach, generator=g) for g in generators]
    return nn.Parameter(torch.stack(draws))


class NetworkEstimator:
    """One trained network as an estimator: signals in, parameters out.

    Parameters
    ----------
    network : Networks
        A stack of one.
    model : SignalModel
        What it was trained for.
    snr : float
        S0 / sigma of the signals it was trained on.
    name : str
        For messages.
    """

    def __init__(self, network: Networks, model: SignalModel, snr: float, name: str = "network"):
        if len(network) != 1:
            raise ValueError(f"network must be a stack of one, got {len(network)} networks")
        if network.widths[0] != model.measurements or network.widths[-1] != len(model.parameters):
            raise ValueError(
                f"network must map {model.measurements} signals to {len(model.parameters)} "
                f"parameters, got widths {network.widths}"
            )
        self.network, self.model, self.snr, self.name = network, model, float(snr), name
        self.names, self.units = model.names, model.units

    def __repr__(self) -> str:
        return f"<NetworkEstimator {self.name}: {self.trained_for}>"

    @property
    def trained_for(self) -> str:
        """Acquisition, noise and scale of the training signals, in words."""
        return f"{self.model!r} at SNR {self.snr:g}" + self._scale()

    def _scale(self) -> str:
        if self.model.amplitude is None:
            return ""
        low, high = self._amplitude_range()
        return f" with {self.model.amplitude} from {low:g} to {high:g}"

    def _amplitude_range(self) -> tuple[float, float]:
        return self.model.parameters[self.model.names.index(self.model.amplitude)].training

    def require(self, *, bvalues: ArrayLike | None = None, snr: float | None = None) -> None:
        """Raise a ValueError unless the network was trained for this acquisition and noise.

        Parameters
        ----------
        bvalues : (measurements,), optional
            s/mm2, in the order of the signals.
        snr : float, optional
            May differ from the SNR of training by a tenth of it.
        """
        if bvalues is not None:
            asked = np.asarray(bvalues, dtype=np.float64)
            own = getattr(self.model, "bvalues", None)
            if own is None:
                raise ValueError(
                    f"bvalues are {asked.tolist()}, but {self.name} was trained for "
                    f"{self.model!r}, which has none"
                )
            if asked.shape != own.shape or not np.allclose(asked, own, rtol=0, atol=0.5):
                raise ValueError(
                    f"bvalues are {asked.tolist()}, but {self.name} was trained for "
                    f"{own.tolist()} s/mm2"
                )
        if snr is not None and not abs(snr - self.snr) <= 0.1 * self.snr:
            raise ValueError(f"snr is {snr!r}, but {self.name} was trained for SNR {self.snr:g}")

    def estimate(self, signals: ArrayLike) -> Array:
        """Estimates for each voxel.

        Parameters
        ----------
        signals : (voxels, measurements)
            Scaled as in training.

        Returns
        -------
        (voxels, parameters)
            In the model's units; NaN in a voxel whose signals are not finite.

        Raises
        ------
        ValueError
            If the shape is wrong, or the largest signal of half the voxels lies outside the
            range of training by more than five standard deviations of the noise: the network
            has never seen such signals, and what it returned would mean nothing.
        """
        inputs = self._inputs(signals)
        usable = torch.isfinite(inputs.sum(dim=1))
        self._check_scale(inputs.amax(dim=1)[usable])
        return self._pass_through(inputs, usable)

    def _inputs(self, signals: ArrayLike) -> Tensor:
        signals = np.asarray(signals)
        if np.iscomplexobj(signals) or signals.ndim != 2:
            raise ValueError(
                f"signals must be real and have shape (voxels, {self.model.measurements}), got "
                f"{signals.dtype} of shape {signals.shape}"
            )
        if signals.shape[1] != self.model.measurements:
            raise ValueError(
                f"signals must have {self.model.measurements} columns, got {signals.shape[1]}: "
                f"{self.name} was trained for {self.trained_for}"
            )
        with np.errstate(over="ignore"):  # beyond single precision is infinite, as good as lost
            return torch.from_numpy(np.array(signals, dtype=np.float32, order="C"))

    def _pass_through(self, inputs: Tensor, usable: Tensor) -> Array:
        estimates = torch.empty(len(inputs), len(self.names), dtype=torch.float64)
        with torch.inference_mode():
            for first in range(0, len(inputs), _ROWS):
                rows = slice(first, first + _ROWS)
                estimates[rows] = self.network(inputs[None, rows])[0]
        estimates[~usable] = torch.nan
        return estimates.numpy()

    def _check_scale(self, largest: Tensor) -> None:
        if self.model.amplitude is None or len(largest) == 0:
            return
        low, high = self._amplitude_range()
        margin = 5 * (low + high) / 2 / self.snr
        median = float(largest.median())
        if not low - margin <= median <= high + margin:
            raise ValueError(
                f"signals have a median maximum of {median:.4g}, expected {low - margin:.2g} to "
                f"{high + margin:.2g}: {self.name} was trained for {self.trained_for}; divide "
                "each voxel's signals by its mean at b = 0 and multiply the estimated "
                f"{self.model.amplitude} by it"
            )


class Routes(NamedTuple):
    """Which network of a bank each voxel goes to, and at which scale.

    Attributes
    ----------
    network : (voxels,) int
        Place in the bank.
    factor : (voxels,)
        What the voxel's signals are divided by; NaN in one without a positive, finite signal at
        b = 0.
    outside : (voxels,) bool
        Whether the voxel's S0 / sigma lies outside what any of the networks was trained for:
        its noise then differs from that of training.
    """

    network: NDArray[np.intp]
    factor: Array
    outside: NDArray[np.bool_]


class NetworkBank:
    """Networks of several SNRs as one estimator for signals in scanner units.

    A network of SNR s has learnt from signals with noise of 1 / s and with S0 in a range around
    1. Divided by sigma s, a voxel's signals have exactly that noise, and their S0 is the
    voxel's own S0 / sigma divided by s: in the range of training, if s is near enough. So each
    voxel goes to the network whose S0 comes out nearest to 1, and noise and scale are both
    right, if the networks' ranges leave no gap between them.

    Where S0 / sigma lies outside all of them, the signals are scaled until S0 is at the nearest
    end of the range. Their noise is then smaller than in training (above the highest SNR) or
    larger (below the lowest).

    Parameters
    ----------
    networks : sequence of NetworkEstimator
        Trained for the same signal model, each at an SNR of its own.
    sigma : float
        Noise in each channel, in the unit of the signals.
    name : str
        For messages.
    """

    def __init__(self, networks: Sequence[NetworkEstimator], sigma: float, name: str = "networks"):
        self.networks = tuple(sorted(networks, key=lambda network: network.snr))
        self.snrs = tuple(network.snr for network in self.networks)
        if not self.networks or len(set(self.snrs)) < len(self.snrs):
            raise ValueError(f"networks must each have an SNR of their own, got SNRs {self.snrs}")
        model = self.networks[0].model
        models = sorted({repr(network.model) for network in self.networks})
        if len(models) > 1:
            raise ValueError(f"networks must have one signal model, got {' and '.join(models)}")
        if model.amplitude is None or getattr(model, "bvalues", None) is None:
            raise ValueError(
                f"networks must have a signal model with an amplitude and b-values, got {model!r}"
            )
        if np.ndim(sigma) != 0 or not (np.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma must be one positive, finite number, got {sigma!r}")
        self.model, self.sigma, self.name = model, float(sigma), name
        self.names, self.units = model.names, model.units

    def __repr__(self) -> str:
        return f"<NetworkBank {self.name}: {self.trained_for}, sigma {self.sigma:g}>"

    @property
    def trained_for(self) -> str:
        """Acquisition and SNRs of the training signals, in words."""
        low, high = self.snr_range
        return f"{self.model!r} at S0 / sigma from {low:.3g} to {high:.3g}"

    @property
    def snr_range(self) -> tuple[float, float]:
        """Lowest and highest S0 / sigma that a network of the bank has seen."""
        low, high = self.networks[0]._amplitude_range()
        return low * self.snrs[0], high * self.snrs[-1]

    def require(self, *, bvalues: ArrayLike | None = None, snr: float | None = None) -> None:
        """Raise a ValueError unless the networks were trained for this acquisition and noise.

        Parameters
        ----------
        bvalues : (measurements,), optional
            s/mm2, in the order of the signals.
        snr : float, optional
            S0 / sigma of a typical voxel.
        """
        if bvalues is not None:
            self.networks[0].require(bvalues=bvalues)
        low, high = self.snr_range
        if snr is not None and not low <= snr <= high:
            raise ValueError(
                f"snr is {snr!r}, but {self.name} was trained for {low:.3g} to {high:.3g}"
            )

    def routes(self, signals: ArrayLike, s0: ArrayLike | None = None) -> Routes:
        """Where each voxel goes; arguments as for `estimate`."""
        signals = self.networks[0]._inputs(signals)
        return self._routes(signals.numpy(), s0)

    def _routes(self, signals: NDArray[np.float32], s0: ArrayLike | None) -> Routes:
        if s0 is None:
            s0 = signals[:, self.model.bvalues == 0].mean(axis=1, dtype=np.float64)
        s0 = np.asarray(s0, dtype=np.float64)
        if s0.shape != (len(signals),):
            raise ValueError(f"s0 must have shape ({len(signals)},), got {s0.shape}")
        s0 = np.where(np.isfinite(s0) & (s0 > 0), s0, np.nan)
        low, high = self.networks[0]._amplitude_range()
        scaled = s0[:, np.newaxis] / self.sigma / np.array(self.snrs)
        away = np.abs(scaled - (low + high) / 2)
        network = np.where(np.isnan(away), np.inf, away).argmin(axis=1)
        scaled = scaled[np.arange(len(scaled)), network]
        inside = (scaled >= low) & (scaled <= high)
        factor = np.where(
            inside, self.sigma * np.array(self.snrs)[network], s0 / np.clip(scaled, low, high)
        )
        return Routes(network, factor, ~inside)

    def estimate(self, signals: ArrayLike, s0: ArrayLike | None = None) -> Array:
        """Estimates for each voxel.

        Parameters
        ----------
        signals : (voxels, measurements)
            In the unit of `sigma`.
        s0 : (voxels,), optional
            Signal without diffusion weighting, for the choice of the network alone; by default
            each voxel's mean at b = 0.

        Returns
        -------
        (voxels, parameters)
            In the model's units, the amplitude in that of the signals; NaN in a voxel whose
            signals are not finite, or whose `s0` is not positive.

        Raises
        ------
        ValueError
            If a shape is wrong, or the signals are complex.
        """
        signals = self.networks[0]._inputs(signals)
        route = self._routes(signals.numpy(), s0)
        estimates = np.full((len(signals), len(self.names)), np.nan)
        for place, network in enumerate(self.networks):
            voxels = np.flatnonzero((route.network == place) & np.isfinite(route.factor))
            factor = torch.from_numpy(route.factor[voxels].astype(np.float32))
            inputs = signals[voxels] / factor[:, np.newaxis]
            usable = torch.isfinite(inputs.sum(dim=1))
            estimates[voxels] = network._pass_through(inputs, usable)
        estimates[:, self.names.index(self.model.amplitude)] *= route.factor
        return estimates


def as_reals(coefficients: ArrayLike) -> NDArray[np.float32]:
    """Real parts, then imaginary parts, in single precision.

    Parameters
    ----------
    coefficients : (n, rank) complex

    Returns
    -------
    (n, 2 rank)
    """
    coefficients = np.asarray(coefficients)
    return np.concatenate([coefficients.real, coefficients.imag], axis=1, dtype=np.float32)


class FingerprintNetwork(nn.Module):
    """Fully connected network from the coefficients of a fingerprint to tissue parameters.

    Each layer but the last multiplies, adds its bias and what a skip connection brings,
    normalises over groups of units, and sets what is negative to zero. The last one only
    multiplies and adds its bias.

    Parameters
    ----------
    widths : sequence of int
        Units of each layer, input (two for each coefficient) and output included.
    skips : sequence of (int, int)
        Layers of equal width, numbered from 0 for the input: the values of the first before its
        normalisation are added to those of the second before its own.
    groups : int
        Of units that are normalised together, to mean 0 and variance 1, then stretched and
        shifted by weights of their own: 1 is layer normalisation. A layer that cannot be
        divided into so many groups of at least 16 units has as many as it can.
    rotate : bool
        Turn the phase of the first coefficient to zero before anything else: the phase of M0
        says nothing of the tissue.
    log_outputs : bool
        Whether T1 and T2f, all outputs but the first, are exponentials, and so positive.
    scale : (outputs,)
        What a last layer of ones (of zeros, for exponentials) stands for.
    standard : (2, inputs), optional
        Mean and SD of each input over the training fingerprints, which are taken from it and
        divided out; see `standardised`. By default inputs are used as they are.
    seed : int
        Of the first weights: uniform within 1 / sqrt(inputs).

    References
    ----------
    Zhang et al. {cite}`zhang2022crb`; normalisation over groups is due to Wu and He
    {cite}`wu2018groupnorm`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        skips: Sequence[tuple[int, int]] = (),
        *,
        groups: int = 8,
        rotate: bool = False,
        log_outputs: bool = False,
        scale: ArrayLike | None = None,
        standard: ArrayLike | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.widths = tuple(int(width) for width in widths)
        self.skips = tuple((int(a), int(b)) for a, b in skips)
        self.groups, self.rotate, self.log_outputs = int(groups), bool(rotate), bool(log_outputs)
        if len(self.widths) < 2 or min(self.widths) < 1 or self.widths[0] % 2:
            raise ValueError(
                "widths must hold at least 2 positive numbers, the first of them even (real and "
                f"imaginary parts), got {widths}"
            )
        if self.groups < 1:
            raise ValueError(f"groups must be 1 or more, got {groups!r}")
        last = len(self.widths) - 1
        for a, b in self.skips:
            if not 0 <= a < b < last or self.widths[a] != self.widths[b]:
                raise ValueError(
                    f"skips must join a layer to a later one of equal width, from 0 to {last - 1}, "
                    f"got {(a, b)} for widths {self.widths}"
                )
        if len({b for _, b in self.skips}) < len(self.skips):
            raise ValueError(f"skips must end in different layers, got {self.skips}")
        scale = _checked_scale(
            np.ones(self.widths[-1]) if scale is None else scale, self.widths[-1]
        )
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        if standard is not None:
            standard = np.asarray(standard, dtype=np.float32)
            if standard.shape != (2, self.widths[0]) or not np.all(
                np.isfinite(standard) & (standard[1] > 0)
            ):
                raise ValueError(
                    f"standard must hold means and positive SDs, (2, {self.widths[0]}), got "
                    f"{standard.tolist()}"
                )
        self.standard = standard
        generator = [torch.Generator().manual_seed(seed)]
        weights, biases, gains, shifts = [], [], [], []
        for inputs, outputs in itertools.pairwise(self.widths):
            reach = 1 / inputs**0.5
            weights.append(nn.Parameter(_uniform((inputs, outputs), reach, generator)[0].detach()))
            biases.append(nn.Parameter(_uniform((1, outputs), reach, generator)[0, 0].detach()))
        for width in self.widths[1:-1]:
            gains.append(nn.Parameter(torch.ones(width)))
            shifts.append(nn.Parameter(torch.zeros(width)))
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        self.gains, self.shifts = nn.ParameterList(gains), nn.ParameterList(shifts)

    @property
    def rank(self) -> int:
        """Coefficients of a fingerprint."""
        return self.widths[0] // 2

    @property
    def settings(self) -> dict:
        """All that the constructor needs to make a network that takes the same weights."""
        return {
            "widths": list(self.widths),
            "skips": [list(skip) for skip in self.skips],
            "groups": self.groups,
            "rotate": self.rotate,
            "log_outputs": self.log_outputs,
            "scale": self.scale.tolist(),
            "standard": None if self.standard is None else self.standard.tolist(),
        }

    def standardised(self, coefficients: ArrayLike) -> FingerprintNetwork:
        """The same first weights behind inputs of mean 0 and SD 1.

        The last coefficients of a fingerprint are a hundred times smaller than the first, and
        without this hardly noticed for many epochs.

        Parameters
        ----------
        coefficients : (n, rank) complex
            Noisy, as in training.
        """
        plain = FingerprintNetwork(**{**self.settings, "standard": None})
        inputs = plain.inputs(coefficients).numpy()
        # An input that never varies, as the phase that `rotate` turns away, stays as it is.
        sd = inputs.std(axis=0)
        standard = np.stack([inputs.mean(axis=0), np.where(sd > 1e-6, sd, 1.0)])
        return FingerprintNetwork(**{**self.settings, "standard": standard}).load(self.arrays())

    def inputs(self, coefficients: ArrayLike) -> Tensor:
        """What the network is shown: of unit norm, rotated if asked for, as real numbers.

        Parameters
        ----------
        coefficients : (n, rank) complex
            At any scale and phase.

        Returns
        -------
        (n, 2 rank)
            NaN in a row that is all zero or not finite.
        """
        coefficients = np.asarray(coefficients)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            factor = 1 / np.linalg.norm(coefficients, axis=1)
            if self.rotate:
                first = coefficients[:, 0]
                size = np.abs(first)
                phase = np.where(size > 0, first.conj() / np.where(size > 0, size, 1), 1)
                factor = factor * phase
            inputs = as_reals(coefficients * factor[:, np.newaxis])
            if self.standard is not None:
                inputs = (inputs - self.standard[0]) / self.standard[1]
            return torch.from_numpy(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Estimates of each fingerprint.

        Parameters
        ----------
        inputs : (n, 2 rank)
            As `inputs` makes them.

        Returns
        -------
        (n, outputs)
        """
        sources = {b: a for a, b in self.skips}
        x, before = inputs, {0: inputs}
        for k in range(1, len(self.widths) - 1):
            skip = before[sources[k]] if k in sources else None
            affine = (self.gains[k - 1], self.shifts[k - 1])
            layer = (self.weights[k - 1], self.biases[k - 1], *affine)
            x, before[k] = _Layer.apply(x, *layer, skip, _groups(self.widths[k], self.groups))
        with full_precision():
            y = x @ self.weights[-1] + self.biases[-1]
        if self.log_outputs:
            y = torch.cat([y[:, :1], y[:, 1:].clamp(max=_LARGEST_LOG).exp()], dim=1)
        return y * self.scale

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of all weights by name."""
        return {name: value.detach().numpy().copy() for name, value in self.named_parameters()}

    def load(self, arrays: Mapping[str, ArrayLike]) -> FingerprintNetwork:
        """Take over weights as `arrays` returns them.

        Raises
        ------
        ValueError
            If an array is missing, has another shape, or holds NaN.
        """
        with torch.no_grad():
            for name, value in self.named_parameters():
                value.copy_(_checked(arrays, name, value.shape))
        return self

    def copy(self) -> FingerprintNetwork:
        """The same network with weights of its own."""
        return FingerprintNetwork(**self.settings).load(self.arrays())


def paper_fingerprint_network(rank: int = 13, seed: int = 0) -> FingerprintNetwork:
    """The network of Zhang et al. {cite}`zhang2022crb`, plain: 2.7 million weights.

    Widths and skip connections are those of the code that accompanies the paper; the number of
    groups is not given there and is our choice. The rising layers of 128, 256 and 512 units are
    added to the falling ones of equal width, and the input to the falling layer of its width.

    Parameters
    ----------
    rank : int
        Coefficients of a fingerprint.
    seed : int
        Of the first weights.
    """
    rising, falling = (128, 256, 512, 1024, 768, 640), (512, 384, 256, 192, 128)
    widths = (2 * rank, *rising, *falling, 2 * rank, 10, 6, 3)
    return FingerprintNetwork(widths, ((3, 7), (2, 9), (1, 11), (0, 12)), seed=seed)


def compact_fingerprint_network(
    rank: int = 13, width: int = 256, seed: int = 0
) -> FingerprintNetwork:
    """A network of the paper's depth and equal widths, with all that was found to help.

    Every second layer is added to the one before the last; layer normalisation; the phase of
    the first coefficient is turned to zero; T1 and T2f come as exponentials.

    Parameters
    ----------
    rank : int
        Coefficients of a fingerprint.
    width : int
        Units of each hidden layer.
    seed : int
        Of the first weights.
    """
    return FingerprintNetwork(
        (2 * rank, *[width] * 14, 3),
        [(k, k + 2) for k in range(1, 13, 2)],
        groups=1,
        rotate=True,
        log_outputs=True,
        scale=(0.1, 1.0, 0.1),
        seed=seed,
    )


_LARGEST_LOG = 20.0  # exponentials beyond serve nobody, and overflow
_SMALLEST_GROUP = 16
_NARROW = 64


def _groups(width: int, groups: int) -> int:
    """Largest possible number of groups of at least 16 units: very small ones lose too much.

    A group of three has, once normalised, but one number left.
    """
    fitting = (g for g in range(min(groups, width), 1, -1) if width % g == 0)
    return next((g for g in fitting if width // g >= _SMALLEST_GROUP), 1)


def full_precision() -> AbstractContextManager[None]:
    """While it lasts, matrix products do not round their factors."""
    return _precision("highest")


def rounded_products() -> AbstractContextManager[None]:
    """While it lasts, matrix products may round their factors to eight binary digits.

    They do where the processor is faster with them; sums stay in single precision.
    """
    return _precision("medium")


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product; in full precision where a layer is narrow, as the first and last ones are.

    They cost little, and rounding of the first one's factors is rounding of the signal.
    """
    if min(*a.shape, *b.shape) < _NARROW:
        with full_precision():
            return a @ b
    return a @ b


class _Layer(torch.autograd.Function):
    """Matrix product, bias, skip connection, normalisation and ReLU in one pass each way."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gain: Tensor,
        shift: Tensor,
        skip: Tensor | None,
        groups: int,
    ) -> tuple[Tensor, Tensor]:
        """What the layer passes on, and its values before normalisation; both (n, outputs)."""
        before = _product(x, weight)
        after = torch.empty_like(before)
        mean = torch.empty(len(x), groups, dtype=before.dtype)
        scale = torch.empty_like(mean)
        added = before[:0] if skip is None else skip
        _normalise(
            before.numpy(),
            *(t.detach().contiguous().numpy() for t in (bias, added, gain, shift)),
            after.numpy(), mean.numpy(), scale.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, gain, shift, before, mean, scale)
        ctx.skipped = skip is not None
        return after, before

    @staticmethod
    def backward(ctx, after: Tensor, before: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gain, shift, values, mean, scale = ctx.saved_tensors
        gradient = torch.empty_like(values)
        sums = torch.zeros(3, values.shape[1])
        _normalise_backward(
            *(t.detach().contiguous().numpy() for t in (after, before, values, mean, scale)),
            gain.detach().numpy(), shift.detach().numpy(), gradient.numpy(), sums.numpy(),
        )  # fmt: skip
        bias, gains, shifts = sums
        back = _product(gradient, weight.T) if ctx.needs_input_grad[0] else None
        skip = gradient if ctx.skipped else None
        return back, _product(x.T, gradient), bias, gains, shifts, skip, None


# Sums may be taken in any order, which is what lets them use the processor's wide registers.
_SUMS = {"reassoc", "contract", "nsz"}


@njit(cache=True, fastmath=_SUMS, error_model="numpy")
def _normalise(before, bias, skip, gain, shift, after, mean, scale):
    """Fill `after`, `mean` and `scale`; bias and skip connection are added to `before`."""
    rows, units = before.shape
    groups = mean.shape[1]
    size = units // groups
    share = np.float32(1.0 / size)
    for i in range(rows):
        row = before[i]
        if skip.shape[0]:
            added = skip[i]
            for c in range(units):
                row[c] += bias[c] + added[c]
        else:
            for c in range(units):
                row[c] += bias[c]
        for g in range(groups):
            a, b = g * size, (g + 1) * size
            part, out, gains, shifts = row[a:b], after[i, a:b], gain[a:b], shift[a:b]
            total, square = np.float32(0), np.float32(0)
            for c in range(size):
                total += part[c]
            centre = total * share
            for c in range(size):
                square += (part[c] - centre) * (part[c] - centre)
            factor = np.float32(1) / np.sqrt(square * share + np.float32(1e-5))
            mean[i, g], scale[i, g] = centre, factor
            for c in range(size):
                value = (part[c] - centre) * factor * gains[c] + shifts[c]
                out[c] = np.float32(0) if value <= 0 else value  # NaN stays NaN


@njit(cache=True, fastmath=_SUMS, error_model="numpy")
def _normalise_backward(after, before, values, mean, scale, gain, shift, gradient, sums):
    """Fill `gradient` of the values before normalisation; add those of bias, gain and shift.

    `after` and `before` are the gradients that arrive; `sums` has a row for each of the three.
    """
    rows, units = values.shape
    groups = mean.shape[1]
    size = units // groups
    share = np.float32(1.0 / size)
    normal, pull = np.empty(size, np.float32), np.empty(size, np.float32)
    for i in range(rows):
        for g in range(groups):
            a, b = g * size, (g + 1) * size
            part, up, gains, shifts = values[i, a:b], after[i, a:b], gain[a:b], shift[a:b]
            d_bias, d_gain, d_shift = sums[0, a:b], sums[1, a:b], sums[2, a:b]
            out, direct = gradient[i, a:b], before[i, a:b]
            centre, factor = mean[i, g], scale[i, g]
            first, second = np.float32(0), np.float32(0)
            for c in range(size):
                x = (part[c] - centre) * factor
                y = np.float32(0) if x * gains[c] + shifts[c] <= 0 else up[c]
                d_gain[c] += y * x
                d_shift[c] += y
                y *= gains[c]
                first += y
                second += y * x
                normal[c], pull[c] = x, y
            first *= share
            second *= share
            for c in range(size):
                value = factor * (pull[c] - first - normal[c] * second) + direct[c]
                out[c] = value
                d_bias[c] += value


class FingerprintEstimator:
    """A trained network as an estimator: coefficients in, tissue parameters out.

    Parameters
    ----------
    network : FingerprintNetwork
    basis : str
        `qmri.mt.basis.fingerprint` of the basis of the coefficients it was trained on.
    name : str
        For messages.
    """

    names = ("m0s", "T1", "T2f")
    units = ("1", "s", "s")

    def __init__(self, network: FingerprintNetwork, basis: str, name: str = "network"):
        if network.widths[-1] != len(self.names):
            raise ValueError(
                f"network must estimate {len(self.names)} parameters, {', '.join(self.names)}, got "
                f"widths {network.widths}"
            )
        self.network, self.basis, self.name = network, basis, name

    def __repr__(self) -> str:
        return f"<FingerprintEstimator {self.name}: {self.trained_for}>"

    def require(self, *, basis: ArrayLike) -> None:
        """Raise a ValueError unless the network was trained for coefficients in this basis.

        Parameters
        ----------
        basis : (pulses, rank)
        """
        asked = fingerprint(basis)
        if asked != self.basis:
            shape = " x ".join(str(n) for n in np.shape(basis))
            raise ValueError(
                f"basis is {asked[:12]}... of {shape}, but {self.name} was trained for "
                f"{self.trained_for}"
            )

    @property
    def trained_for(self) -> str:
        """Its coefficients, in words."""
        return f"{self.network.rank} coefficients in the basis {self.basis[:12]}..."

    def estimate(self, coefficients: ArrayLike) -> Array:
        """Estimates for each voxel.

        Parameters
        ----------
        coefficients : (voxels, rank) complex
            At any scale and phase.

        Returns
        -------
        (voxels, 3)
            m0s, T1 (s) and T2f (s); NaN in a voxel whose coefficients are not finite or all
            zero.

        Raises
        ------
        ValueError
            If the coefficients are real, or not as many as those of training.
        """
        coefficients = np.asarray(coefficients)
        if not np.iscomplexobj(coefficients) or coefficients.ndim != 2:
            raise ValueError(
                f"coefficients must be complex and have shape (voxels, {self.network.rank}), got "
                f"{coefficients.dtype} of shape {coefficients.shape}"
            )
        if coefficients.shape[1] != self.network.rank:
            raise ValueError(
                f"coefficients must have {self.network.rank} columns, got "
                f"{coefficients.shape[1]}: {self.name} was trained for {self.trained_for}"
            )
        inputs = self.network.inputs(coefficients)
        usable = torch.isfinite(inputs).all(dim=1)
        estimates = torch.empty(len(inputs), len(self.names), dtype=torch.float64)
        with torch.inference_mode(), full_precision():
            for first in range(0, len(inputs), _ROWS):
                rows = slice(first, first + _ROWS)
                estimates[rows] = self.network(inputs[rows])
        estimates[~usable] = torch.nan
        return estimates.numpy()
