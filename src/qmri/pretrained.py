"""Trained networks by name, as the studies have left them in ``data/``."""

from __future__ import annotations

import re

from numpy.typing import ArrayLike

from qmri.artefacts import MissingArtefacts, Study, with_prefix
from qmri.models import IVIM
from qmri.networks import FingerprintEstimator, FingerprintNetwork, NetworkEstimator, Networks

__all__ = ["estimators", "load_estimator"]

# The study behind the first part of a name.
_STUDIES = {"ivim": "training-labels", "ivim-abdomen": "training-labels-abdomen"}
_FINGERPRINTS = {"mt": "crb-loss"}
_NAME = re.compile(r"(?P<family>[a-z-]+)/snr(?P<snr>\d+)/(?P<recipe>[a-z0-9.-]+)")
FILE = "networks.npz"


def estimators() -> tuple[str, ...]:
    """Names of all stored networks, for `load_estimator`."""
    names = []
    for family, study in _STUDIES.items():
        try:
            stored = Study(study)
        except MissingArtefacts:
            continue
        names += [
            f"{family}/snr{snr}/{recipe}"
            for snr in stored.settings["snrs"]
            for recipe in stored.settings["recipes"]
        ]
    for family, study in _FINGERPRINTS.items():
        try:
            stored = Study(study)
        except MissingArtefacts:
            continue
        names += [f"{family}/{loss}" for loss in stored.results["networks"]]
    return tuple(names)


def load_estimator(
    name: str,
    *,
    bvalues: ArrayLike | None = None,
    snr: float | None = None,
    basis: ArrayLike | None = None,
    replicate: int = 0,
) -> NetworkEstimator | FingerprintEstimator:
    """A stored network, ready to estimate.

    Parameters
    ----------
    name : str
        One of `estimators`, e.g. ``"ivim/snr15/supervised-mle-rician"`` or ``"mt/crb"``.
    bvalues : (measurements,), optional
        s/mm2, of the signals to be estimated.
    snr : float, optional
        S0 / sigma of the signals to be estimated.
    basis : (pulses, rank), optional
        Of the coefficients to be estimated, for a network for fingerprints.
    replicate : int
        Which of the independently trained networks of that name; 0 is the one that the book
        shows, whatever came out of the others.

    Returns
    -------
    NetworkEstimator or FingerprintEstimator

    Raises
    ------
    ValueError
        If there is no such network, or it was not trained for `bvalues`, `snr` or `basis`.
    MissingArtefacts
        If the study has not been run; the message names the command.
    """
    if isinstance(name, str) and name.split("/")[0] in _FINGERPRINTS:
        return _load_fingerprint_estimator(name, bvalues, snr, basis, replicate)
    if basis is not None:
        raise ValueError(f"basis belongs to fingerprints, and {name!r} is not a network for them")
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or match["family"] not in _STUDIES:
        raise ValueError(
            f"name must be like 'ivim/snr15/supervised-gt', one of qmri.estimators(), got {name!r}"
        )
    study = Study(_STUDIES[match["family"]])
    settings = study.settings
    if int(match["snr"]) not in settings["snrs"]:
        raise ValueError(
            f"name {name!r} asks for SNR {match['snr']}, but networks were trained for "
            f"{' and '.join(str(s) for s in settings['snrs'])}"
        )
    if match["recipe"] not in settings["recipes"]:
        raise ValueError(
            f"name {name!r} asks for {match['recipe']!r}, expected one of "
            f"{', '.join(settings['recipes'])}"
        )
    if replicate not in range(settings["replicates"]):
        raise ValueError(
            f"replicate must be from 0 to {settings['replicates'] - 1}, got {replicate!r}"
        )
    arrays, prefix = study.arrays(FILE), f"snr{match['snr']}/{match['recipe']}/"
    network = Networks(arrays["widths"].tolist(), arrays["scale"], seeds=[0])
    network.load(
        {
            key: value[replicate : replicate + 1]
            for key, value in with_prefix(arrays, prefix).items()
        }
    )
    model = IVIM(settings["bvalues"])
    estimator = NetworkEstimator(network, model, float(match["snr"]), name)
    estimator.require(bvalues=bvalues, snr=snr)
    return estimator


def _load_fingerprint_estimator(
    name: str,
    bvalues: ArrayLike | None,
    snr: float | None,
    basis: ArrayLike | None,
    replicate: int,
) -> FingerprintEstimator:
    for argument, value in (("bvalues", bvalues), ("snr", snr)):
        if value is not None:
            raise ValueError(
                f"{argument} does not belong to fingerprints, which {name!r} is a network for"
            )
    family, _, loss = name.partition("/")
    study = Study(_FINGERPRINTS[family])
    stored = study.results["networks"]
    if loss not in stored:
        raise ValueError(
            f"name must be one of {family}/{f', {family}/'.join(stored)}, got {name!r}"
        )
    if replicate != 0:
        raise ValueError(f"replicate must be 0, the only one stored, got {replicate!r}")
    network = FingerprintNetwork(**stored[loss]["settings"]).load(
        with_prefix(study.arrays(FILE), f"{loss}/")
    )
    estimator = FingerprintEstimator(network, stored[loss]["basis"], name)
    if basis is not None:
        estimator.require(basis=basis)
    return estimator
