"""Every op's spec: what tests of all ops are parametrised with. A new op adds its line here."""

from channel_norms import BATCH_NORM
from group_norms import GROUP_NORM, INSTANCE_NORM
from norms import LAYER_NORM, RMS_NORM
from suite import OpSpec

ROW_NORMS: tuple[OpSpec, ...] = (LAYER_NORM, RMS_NORM)
SPECS: tuple[OpSpec, ...] = (*ROW_NORMS, BATCH_NORM, GROUP_NORM, INSTANCE_NORM)
# Those whose operators are their own. Without running statistics instance norm is group norm of each channel by itself;
# what it has with them, the tests named test_group_norm_... are of.
OWN_WAYS: tuple[OpSpec, ...] = (*ROW_NORMS, BATCH_NORM, GROUP_NORM)
