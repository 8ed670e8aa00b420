"""Quantitative MRI: signal models, noise, maximum likelihood, bounds, and real data."""

import os

# Threads that wait must not spin: on a machine that also does something else, or that lends
# fewer cores than it shows (a laptop in a lecture, Binder), spinning makes the compiled loops
# several times slower. It is read once, when the first compiled loop starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from qmri.crb import cramer_rao_bound, fisher_information
from qmri.files import estimate_files
from qmri.mle import Fit, MaximumLikelihood, fit_mle
from qmri.models import IVIM, FunctionModel, Parameter, SignalModel
from qmri.noise import ComplexGaussian, Gaussian, Noise, Rician
from qmri.pretrained import estimators, load_estimator
from qmri.sources import fetch

__version__ = "0.1.0"

__all__ = [
    "IVIM",
    "ComplexGaussian",
    "Fit",
    "FunctionModel",
    "Gaussian",
    "MaximumLikelihood",
    "Noise",
    "Parameter",
    "Rician",
    "SignalModel",
    "cramer_rao_bound",
    "estimate_files",
    "estimators",
    "fetch",
    "fisher_information",
    "fit_mle",
    "load_estimator",
]
