"""Magnetization-transfer fingerprinting: from a train of pulses to thirteen numbers."""

from qmri.mt.model import MTModel
from qmri.mt.train import PulseTrain

__all__ = ["MTModel", "PulseTrain"]
