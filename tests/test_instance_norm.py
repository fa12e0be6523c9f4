"""Instance norm through the op suite, on the backend under test."""

from group_norm_suite import InstanceNormSuite
from group_norms import INSTANCE_NORM


class TestInstanceNorm(InstanceNormSuite):
    spec = INSTANCE_NORM
