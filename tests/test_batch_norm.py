"""Batch norm through the op suite, on the backend under test."""

from batch_norm_suite import BatchNormSuite
from channel_norms import BATCH_NORM


class TestBatchNorm(BatchNormSuite):
    spec = BATCH_NORM
