"""Group norm through the op suite, on the backend under test."""

from group_norm_suite import GroupNormSuite
from group_norms import GROUP_NORM


class TestGroupNorm(GroupNormSuite):
    spec = GROUP_NORM
