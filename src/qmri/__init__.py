"""Quantitative MRI: signal models, noise, maximum likelihood, bounds, and real data."""

from qmri.crb import cramer_rao_bound, fisher_information
from qmri.mle import Fit, MaximumLikelihood, fit_mle
from qmri.models import IVIM, FunctionModel, Parameter, SignalModel
from qmri.noise import Gaussian, Noise, Rician
from qmri.sources import fetch

__version__ = "0.1.0"

__all__ = [
    "IVIM",
    "Fit",
    "FunctionModel",
    "Gaussian",
    "MaximumLikelihood",
    "Noise",
    "Parameter",
    "Rician",
    "SignalModel",
    "cramer_rao_bound",
    "fetch",
    "fisher_information",
    "fit_mle",
]
