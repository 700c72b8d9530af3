"""Which weights stay and which stream, from sizes and a budget; what this machine has."""
