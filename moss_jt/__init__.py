"""MOSS in little memory, with Jittor. Importing this package imports no Jittor."""
