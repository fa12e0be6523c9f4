"""RMS norm through the op suite, on the backend under test."""

from norm_suite import RowNormSuite
from norms import RMS_NORM


class TestRMSNorm(RowNormSuite):
    spec = RMS_NORM
