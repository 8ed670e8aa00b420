"""What "close" means to a network: a table of labels, spaces and weights.

Every network of the first paper is one line of `RECIPES`. The loss functions themselves take a
batch of estimates of several networks side by side and know nothing about networks. The second
paper's networks are told apart by their weight on each error alone: `FINGERPRINT_LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from qmri._choices import check_choice
from qmri.datasets import Dataset
from qmri.models import Array, SignalModel

__all__ = [
    "FINGERPRINT_LOSSES",
    "RECIPES",
    "FingerprintLoss",
    "Recipe",
    "absolute_error",
    "fingerprint_loss",
    "hybrid",
    "overweighted",
    "recipe",
    "signal_error",
    "squared_error",
]


@dataclass(frozen=True)
class FingerprintLoss:
    """What counts as an error of a parameter estimated from a fingerprint.

    Parameters
    ----------
    measure : {"crb", "squared", "relative"}
        The squared error divided by the Cramer-Rao bound; the squared error in SI units; the
        absolute error divided by the truth.
    only : str, optional
        The one parameter that counts; all of them by default.

    References
    ----------
    Zhang et al. {cite}`zhang2022crb`.
    """

    measure: str
    only: str | None = None

    def __post_init__(self):
        if self.measure not in ("crb", "squared", "relative"):
            raise ValueError(
                f"measure must be 'crb', 'squared' or 'relative', got {self.measure!r}"
            )

    @property
    def power(self) -> int:
        """To which the error is raised: 1 or 2."""
        return 1 if self.measure == "relative" else 2

    def weights(self, truth: ArrayLike, crb: ArrayLike, names: Sequence[str]) -> Array:
        """Factors on the errors, raised to `power`, whose mean is the loss.

        Parameters
        ----------
        truth, crb : (n, targets)
        names : sequence of str
            Of the targets.

        Returns
        -------
        (n, targets)
            0 where the bound is infinite, if it counts, and for parameters that do not. Others
            are scaled up to make good for them: the loss is the mean over parameters that count
            of the mean over their samples that do.

        Raises
        ------
        ValueError
            If a bound is infinite for all samples, or a truth is zero where it divides.
        """
        truth, crb = np.asarray(truth, dtype=np.float64), np.asarray(crb, dtype=np.float64)
        weights = np.ones_like(truth)
        if self.measure == "crb":
            counted = np.isfinite(crb)
            if not counted.any(axis=0).all():
                raise ValueError("crb must be finite for some samples of each parameter")
            weights = 1 / crb / counted.mean(axis=0)
        elif self.measure == "relative":
            if np.any(truth == 0):
                raise ValueError(
                    f"truth must not be zero for relative errors, got {int(np.sum(truth == 0))} "
                    "zeros"
                )
            weights = 1 / np.abs(truth)
        if self.only is not None:
            check_choice("only", self.only, names)
            weights = weights * np.where(np.array(names) == self.only, len(names), 0)
        return weights


FINGERPRINT_LOSSES: Mapping[str, FingerprintLoss] = MappingProxyType(
    {
        "crb": FingerprintLoss("crb"),
        "mse": FingerprintLoss("squared"),
        "relative": FingerprintLoss("relative"),
        "crb-m0s": FingerprintLoss("crb", only="m0s"),
        "crb-t1": FingerprintLoss("crb", only="T1"),
        "crb-t2f": FingerprintLoss("crb", only="T2f"),
    }
)


def fingerprint_loss(name: str) -> FingerprintLoss:
    """The loss of a name, one of `FINGERPRINT_LOSSES`.

    Raises
    ------
    ValueError
        If there is no such loss.
    """
    check_choice("name", name, FINGERPRINT_LOSSES)
    return FINGERPRINT_LOSSES[name]


@dataclass(frozen=True)
class Recipe:
    """What a network is taught, and what counts as an error.

    Parameters
    ----------
    labels : mapping of str to float
        Weight of each kind of label, adding up to 1; none at all for self-supervision, where
        the network's own input is the target.
    error : {"squared", "absolute"}
    emphasis : mapping of str to float
        Factor on the weight W of the parameters named; 1 for the others.

    Notes
    -----
    The loss of one voxel is ``sum_p (W_p (estimate_p - label_p))**2``, with W the inverse mean
    of each parameter over the training tissue times its emphasis. A mixture of squared errors,
    ``sum_l a_l |x - y_l|^2``, differs from the squared error to the mixed label
    ``sum_l a_l y_l`` by a number that does not depend on x, so that the mixed label is what
    the network is shown.

    References
    ----------
    Epstein et al. {cite}`epstein2024labels`.
    """

    labels: Mapping[str, float]
    error: str = "squared"
    emphasis: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.error not in ("squared", "absolute"):
            raise ValueError(f"error must be 'squared' or 'absolute', got {self.error!r}")
        shares = list(self.labels.values())
        if shares and (min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-9)):
            raise ValueError(
                f"labels must have weights of 0 or more that add up to 1, got {dict(self.labels)}"
            )
        if len([s for s in shares if s > 0]) > 1 and self.error == "absolute":
            raise ValueError("labels can be mixed for squared errors only, got error='absolute'")
        if not shares and (self.error != "squared" or self.emphasis):
            raise ValueError(
                "labels must be given where error is 'absolute' or parameters have an emphasis: "
                f"without them errors are those of signals, got error={self.error!r} and "
                f"emphasis={dict(self.emphasis)}"
            )
        for name, factor in self.emphasis.items():
            if not (math.isfinite(factor) and factor > 0):
                raise ValueError(f"emphasis[{name!r}] must be positive, got {factor!r}")
        for name in ("labels", "emphasis"):
            object.__setattr__(self, name, dict(getattr(self, name)))

    @property
    def space(self) -> str:
        """Where errors are measured: ``"parameter"``, or ``"signal"`` without labels."""
        return "parameter" if self.labels else "signal"

    def target(self, dataset: Dataset) -> tuple[Array, NDArray[np.bool_]]:
        """Mixed label of each voxel, (voxels, parameters), and whether it is usable, (voxels,)."""
        values = np.zeros_like(dataset.theta)
        usable = np.ones(len(values), dtype=bool)
        for name, share in self.labels.items():
            if name not in dataset.labels:
                raise ValueError(
                    f"dataset must hold the labels {name!r}, it holds {sorted(dataset.labels)}"
                )
            if share > 0:
                label = dataset.labels[name]
                usable &= label.usable
                values += share * np.where(label.usable[:, np.newaxis], label.values, 0.0)
        return values, usable

    def weights(self, dataset: Dataset) -> Array:
        """W of each parameter, (parameters,), in its inverse unit; the largest emphasis is 1."""
        names = dataset.model.names
        unknown = [name for name in self.emphasis if name not in names]
        if unknown:
            raise ValueError(f"emphasis must name parameters among {names}, got {unknown}")
        mean = dataset.mean
        if not np.all(mean > 0):
            raise ValueError(
                "dataset must have positive means of all parameters, as weights are their "
                f"inverse, got {dict(zip(names, mean.tolist(), strict=True))}"
            )
        # With a largest factor of 1 no number overflows. Adam sees the scale of a loss only where
        # gradients fall below its epsilon of 1e-8: beside an emphasis of 1e6, the weights that
        # serve the other outputs alone hardly move.
        factors = np.array([self.emphasis.get(name, 1.0) for name in names])
        return factors / factors.max() / mean


def hybrid(alpha: float) -> Recipe:
    """Ground truth with weight `alpha`, Rician maximum-likelihood labels with the rest.

    Raises
    ------
    ValueError
        If `alpha` is not from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 (maximum likelihood) to 1 (truth), got {alpha!r}")
    return Recipe({"truth": alpha, "mle-rician": 1 - alpha})


def overweighted(parameter: str, factor: float = 1e6) -> Recipe:
    """Rician maximum-likelihood labels, one parameter's weight multiplied by `factor`."""
    return Recipe({"mle-rician": 1.0}, emphasis={parameter: factor})


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "supervised-gt": Recipe({"truth": 1.0}),
        "self-supervised": Recipe({}),
        "supervised-mle-rician": Recipe({"mle-rician": 1.0}),
        "supervised-mle-gaussian": Recipe({"mle-gaussian": 1.0}),
        "hybrid-0.5": hybrid(0.5),
        "supervised-mle-rician-f": overweighted("f"),
        "supervised-mle-rician-dslow": overweighted("Dslow"),
        "supervised-mle-rician-dfast": overweighted("Dfast"),
        "supervised-gt-mae": Recipe({"truth": 1.0}, error="absolute"),
        "supervised-mle-rician-mae": Recipe({"mle-rician": 1.0}, error="absolute"),
    }
)


def recipe(name: str) -> Recipe:
    """The recipe of a name: one of `RECIPES`, or ``hybrid-`` and its alpha, e.g. ``hybrid-0.25``.

    Raises
    ------
    ValueError
        If there is no such recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.startswith("hybrid-"):
        try:
            alpha = float(name.removeprefix("hybrid-"))
        except ValueError:
            pass
        else:
            return hybrid(alpha)
    raise ValueError(f"name must be hybrid-ALPHA or one of {', '.join(RECIPES)}, got {name!r}")


def squared_error(estimate: Tensor, target: Tensor, weights: Tensor, usable: Tensor) -> Tensor:
    """Mean weighted squared error over the usable voxels of each network.

    Parameters
    ----------
    estimate, target : (networks, voxels, parameters)
    weights : (networks, 1, parameters)
    usable : (networks, voxels)
        1 or 0.

    Returns
    -------
    (networks,)
    """
    return _mean((weights * (estimate - target)).square().sum(dim=2), usable)


def absolute_error(estimate: Tensor, target: Tensor, weights: Tensor, usable: Tensor) -> Tensor:
    """Mean weighted absolute error; shapes as for `squared_error`."""
    return _mean((weights * (estimate - target)).abs().sum(dim=2), usable)


def signal_error(estimate: Tensor, signals: Tensor, model: SignalModel) -> Tensor:
    """Mean squared difference between the signals and those of the estimated tissue.

    The model is the decoder of an autoencoder: its `jacobian` carries the gradient back, so
    that any signal model with a derivative will do, compiled or not.

    Parameters
    ----------
    estimate : (networks, voxels, parameters)
    signals : (networks, voxels, measurements)
    model : SignalModel

    Returns
    -------
    (networks,)

    References
    ----------
    Barbieri et al. 2020 {cite}`barbieri2020ivimnet`.
    """
    return (_Decoder.apply(estimate, model) - signals).square().mean(dim=(1, 2))


def _mean(error: Tensor, usable: Tensor) -> Tensor:
    return (error * usable).sum(dim=1) / usable.sum(dim=1).clamp(min=1)


class _Decoder(torch.autograd.Function):
    """A signal model as a layer without weights."""

    @staticmethod
    def forward(ctx, estimate: Tensor, model: SignalModel) -> Tensor:
        theta = estimate.detach().numpy().reshape(-1, estimate.shape[-1])
        if ctx.needs_input_grad[0]:
            signal, jacobian = model.signal_and_jacobian(theta)
            jacobian = jacobian.reshape(*estimate.shape[:-1], *jacobian.shape[1:])
            ctx.save_for_backward(torch.from_numpy(jacobian))
        else:
            signal = model.signal(theta)
        shaped = signal.reshape(*estimate.shape[:-1], -1)
        return torch.from_numpy(shaped).to(estimate.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (jacobian,) = ctx.saved_tensors
        back = torch.einsum("...m,...mp->...p", gradient.to(jacobian.dtype), jacobian)
        return back.to(gradient.dtype), None
