"""Network shapes, and many small networks side by side.

A network of ten units a layer is so small that a processor spends its time on the calls, not
on the numbers. `Networks` therefore holds many of one shape as a stack: each layer is one
batched matrix product, and sixteen networks cost hardly more than one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from qmri.models import Array, SignalModel

__all__ = ["NetworkEstimator", "Networks", "mlp_widths"]

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
        scale = np.asarray(scale, dtype=np.float64)
        if scale.shape != (widths[-1],) or not np.all(np.isfinite(scale) & (scale > 0)):
            raise ValueError(
                f"scale must hold {widths[-1]} positive numbers, one for each output, got {scale}"
            )
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
                if name not in arrays:
                    raise ValueError(f"arrays must hold {name!r}, got {sorted(arrays)}")
                new = np.asarray(arrays[name])
                if new.shape[1:] != value.shape[1:] or len(new) not in (1, len(value)):
                    raise ValueError(
                        f"arrays[{name!r}] must have shape {tuple(value.shape)}, got {new.shape}"
                    )
                if not np.isfinite(new).all():
                    raise ValueError(f"arrays[{name!r}] must be finite")
                value.copy_(torch.from_numpy(new.astype(np.float32)))
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
            inputs = torch.from_numpy(np.array(signals, dtype=np.float32, order="C"))
        usable = torch.isfinite(inputs.sum(dim=1))
        self._check_scale(inputs.amax(dim=1)[usable])
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
