"""One module per command of moss-jt."""
