"""What every test may rely on, whatever started the run."""

import signal

# A run in the background inherits an ignored Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
