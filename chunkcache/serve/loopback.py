"""By which names a machine reaches itself, and nobody else does."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
