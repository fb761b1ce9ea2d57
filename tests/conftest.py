"""What every test can count on, however the suite was started."""

import os
import signal
import tempfile

# A shell without job control starts background commands with SIGINT ignored, and children inherit that: tests of Ctrl-C
# would wait for ever. With Python's own handler set, children get the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Symmetries that were proven are kept for the tests of one run and the commands that they start, not beyond. Workers of
# pytest-xdist have the folder of the process that started them, so that what one of them proved none proves again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="fastar-tests-")
    os.environ["FASTAR_CACHE"] = _cache.name
