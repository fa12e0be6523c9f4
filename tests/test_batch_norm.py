"""Batch norm through the op suite, on the backend under test."""

from channel_norm_suite import ChannelNormSuite
from channel_norms import BATCH_NORM


class TestBatchNorm(ChannelNormSuite):
    spec = BATCH_NORM
