"""Every op's spec: what tests of all ops are parametrised with. A new op adds its line here."""

from norms import LAYER_NORM, RMS_NORM
from suite import OpSpec

SPECS: tuple[OpSpec, ...] = (LAYER_NORM, RMS_NORM)
