"""The process that solves equations: one JSON string a line in, one JSON string (or null) a line out.

Its memory and its time are limited by the system, because what sympy needs for a given equation cannot be foreseen.
"""

import json
import resource
import sys

MEMORY_BYTES = 1 << 30
CPU_S = 600  # in its whole life; the parent starts another


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.setrecursionlimit(2_000)
    from moss_jt.plugins.equations import solve_equations

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            answer: str | None = solve_equations(json.loads(line))
        except Exception:  # noqa: BLE001  sympy raises anything for what it cannot solve; the answer is then none
            answer = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
