"""Found by every Python process of a run under test (PYTHONPATH); acts in its training ranks."""

import os
import sys

if "RANK" in os.environ and "nanochat.stages.base_train" in sys.orig_argv:
    from tests.faults.inject import install

    install()
