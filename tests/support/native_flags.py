"""Flags of x86-64 processors that have a level of vectors; other processors compile plain C++."""

FLAGS = {
    "512-vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "512": ["-march=x86-64-v4"],
    "256-vnni": ["-march=native"],  # there are two encodings
    "256": ["-march=x86-64-v3"],
    "0": [],
}
