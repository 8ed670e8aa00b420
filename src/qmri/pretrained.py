"""Trained networks by name, as the studies have left them in ``data/``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from numpy.typing import ArrayLike

from qmri._choices import check_choice
from qmri.artefacts import MissingArtefacts, Study, with_prefix
from qmri.models import IVIM
from qmri.networks import (
    FingerprintEstimator,
    FingerprintNetwork,
    NetworkBank,
    NetworkEstimator,
    Networks,
)

__all__ = ["estimators", "load_estimator"]

# The study behind the first part of a name.
STUDIES = {"ivim": "training-labels", "ivim-abdomen": "training-labels-abdomen"}
_FINGERPRINTS = {"mt": "crb-loss"}
_NAME = re.compile(r"(?P<family>[a-z-]+)/(?:snr(?P<snr>\d+)/)?(?P<recipe>[a-z0-9.-]+)")
FILE = "networks.npz"


def estimators() -> tuple[str, ...]:
    """Names of all stored networks, for `load_estimator`.

    A name with an SNR is one network. Without it, ``"ivim-abdomen/supervised-gt"``, it stands
    for those of all SNRs together.
    """
    names = []
    for family, study in STUDIES.items():
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
    sigma: float | None = None,
    basis: ArrayLike | None = None,
    replicate: int = 0,
) -> NetworkEstimator | NetworkBank | FingerprintEstimator:
    """A stored network, ready to estimate.

    Parameters
    ----------
    name : str
        One of `estimators`, e.g. ``"ivim/snr15/supervised-mle-rician"`` or ``"mt/crb"``; or one
        without its SNR, ``"ivim-abdomen/supervised-mle-rician"``: the networks of all SNRs, of
        which each voxel goes to the one for its own.
    bvalues : (measurements,), optional
        s/mm2, of the signals to be estimated.
    snr : float, optional
        S0 / sigma of the signals to be estimated, for a name with an SNR.
    sigma : float, optional
        Noise of the signals to be estimated, in their unit. A name without SNR needs it.
    basis : (pulses, rank), optional
        Of the coefficients to be estimated, for a network for fingerprints.
    replicate : int
        Which of the independently trained networks of that name; 0 is the one that the book
        shows, whatever came out of the others.

    Returns
    -------
    NetworkEstimator, NetworkBank or FingerprintEstimator

    Raises
    ------
    ValueError
        If there is no such network, or it was not trained for `bvalues`, `snr` or `basis`, or
        `sigma` is missing.
    MissingArtefacts
        If the study has not been run; the message names the command.
    """
    if isinstance(name, str) and name.split("/")[0] in _FINGERPRINTS:
        for argument, value in (("bvalues", bvalues), ("snr", snr), ("sigma", sigma)):
            if value is not None:
                raise ValueError(
                    f"{argument} does not belong to fingerprints, which {name!r} is a network for"
                )
        return _load_fingerprint_estimator(name, basis, replicate)
    if basis is not None:
        raise ValueError(f"basis belongs to fingerprints, and {name!r} is not a network for them")
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or match["family"] not in STUDIES:
        raise ValueError(
            f"name must be like 'ivim/snr15/supervised-gt', one of qmri.estimators(), got {name!r}"
        )
    study = Study(STUDIES[match["family"]])
    settings = study.settings
    if match["snr"] is not None and int(match["snr"]) not in settings["snrs"]:
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
    wrong, needed = ("sigma", "snr") if match["snr"] is not None else ("snr", "sigma")
    if {"sigma": sigma, "snr": snr}[wrong] is not None:
        raise ValueError(
            f"{wrong} is {sigma if wrong == 'sigma' else snr!r}, but {name!r} takes {needed}: a "
            "name with an SNR is one network, for signals scaled to its noise, one without it "
            "stands for all SNRs, for signals in any unit"
        )
    arrays, model = study.arrays(FILE), IVIM(settings["bvalues"])
    if match["snr"] is not None:
        estimator = _one_network(arrays, model, match["snr"], match["recipe"], replicate, name)
        estimator.require(bvalues=bvalues, snr=snr)
        return estimator
    if sigma is None:
        raise ValueError(
            f"sigma must be given for {name!r}: it says which voxel goes to which of the SNRs "
            f"{', '.join(str(s) for s in settings['snrs'])}"
        )
    networks = [
        _one_network(arrays, model, s, match["recipe"], replicate, name) for s in settings["snrs"]
    ]
    bank = NetworkBank(networks, sigma, name)
    if bvalues is not None:
        bank.require(bvalues=bvalues)
    return bank


def _one_network(
    arrays: Mapping, model: IVIM, snr: str | int, recipe: str, replicate: int, name: str
) -> NetworkEstimator:
    network = Networks(arrays["widths"].tolist(), arrays["scale"], seeds=[0])
    weights = with_prefix(arrays, f"snr{snr}/{recipe}/")
    network.load({key: value[replicate : replicate + 1] for key, value in weights.items()})
    return NetworkEstimator(network, model, float(snr), name)


def _load_fingerprint_estimator(
    name: str, basis: ArrayLike | None, replicate: int
) -> FingerprintEstimator:
    family, _, loss = name.partition("/")
    study = Study(_FINGERPRINTS[family])
    stored = study.results["networks"]
    check_choice("name", name, [f"{family}/{other}" for other in stored])
    if replicate != 0:
        raise ValueError(f"replicate must be 0, the only one stored, got {replicate!r}")
    network = FingerprintNetwork(**stored[loss]["settings"]).load(
        with_prefix(study.arrays(FILE), f"{loss}/")
    )
    estimator = FingerprintEstimator(network, stored[loss]["basis"], name)
    if basis is not None:
        estimator.require(basis=basis)
    return estimator
