"""What torch.testing._internal needs of the package expecttest, for a machine that does not have it.

torch's own samples (test_conformance.py) are reached through a module that derives a test class from
``expecttest.TestCase``; nothing here runs that class or its golden texts. conftest.py puts this folder at the end of
the search path, and only where the package is missing: a GPU machine that can install nothing runs those tests too.
"""

from __future__ import annotations

import unittest

ACCEPT = False


class TestCase(unittest.TestCase):
    """The base class that torch's own test case derives from."""
