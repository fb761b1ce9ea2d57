"""What every test can count on, however the suite was started."""

import signal

# A shell without job control starts background commands with SIGINT ignored, and children inherit that: tests of Ctrl-C
# would wait for ever. With Python's own handler set, children get the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)
