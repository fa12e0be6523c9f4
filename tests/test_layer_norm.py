"""Layer norm through the op suite, on the backend under test."""

from norm_suite import RowNormSuite
from norms import LAYER_NORM


class TestLayerNorm(RowNormSuite):
    spec = LAYER_NORM
