"""The process that solves equations: one JSON string a line in, one JSON string (or null) a line out.

Its memory and its time are limited by the system, because what sympy needs for a given equation cannot be foreseen.
"""

import json
import resource
import sys

MEMORY_BYTES = 1 << 30
CPU_S = 60  # for one answer: a parent that was killed cannot end this process


def allow_cpu() -> None:
    """CPU_S more seconds of processor time from now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + CPU_S, most))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.setrecursionlimit(2_000)
    from moss_jt.plugins.equations import solve_equations

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        allow_cpu()
        try:
            answer: str | None = solve_equations(json.loads(line))
        except Exception:  # noqa: BLE001  sympy raises anything for what it cannot solve; the answer is then none
            answer = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
