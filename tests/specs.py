"""Every op's spec: what tests of all ops are parametrised with. A new op adds its line here."""

from channel_norms import BATCH_NORM
from norms import LAYER_NORM, RMS_NORM
from suite import OpSpec

ROW_NORMS: tuple[OpSpec, ...] = (LAYER_NORM, RMS_NORM)
SPECS: tuple[OpSpec, ...] = (*ROW_NORMS, BATCH_NORM)
