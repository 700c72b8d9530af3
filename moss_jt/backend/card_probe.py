"""Asks NVIDIA's driver for its cards. Run as a program, which prints them as JSON: see moss_jt.backend.cards.

A process that has once asked keeps CUDA_VISIBLE_DEVICES as it was then; so another one asks. Standard library only.
"""

import ctypes
import json
from typing import Any

# CUDA's numbers of three attributes of a device.
COMPUTE_MAJOR, COMPUTE_MINOR, CONCURRENT_MANAGED = 75, 76, 89


def probe() -> dict[str, Any]:
    """What the driver says.

    Returns:
        ``code``: CUDA's error, 0 for none, None where there is no driver; ``driver``: the newest CUDA that it knows, 12040 for
        12.4; ``cards``: in CUDA's order.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"code": None, "driver": 0, "cards": []}
    count, known = ctypes.c_int(), ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(known))
    cards = [] if code else [_card(driver, number) for number in range(count.value)]
    return {"code": code, "driver": known.value, "cards": cards}


def _card(driver: ctypes.CDLL, number: int) -> dict[str, Any]:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name, bus = ctypes.create_string_buffer(100), ctypes.create_string_buffer(64)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    driver.cuDeviceGetPCIBusId(bus, len(bus), device)
    return {
        "name": name.value.decode(errors="replace"),
        "bus": bus.value.decode(errors="replace"),
        "total": total.value,
        "compute": [_attribute(driver, which, device) for which in (COMPUTE_MAJOR, COMPUTE_MINOR)],
        "unified": _attribute(driver, CONCURRENT_MANAGED, device) != 0,
    }


def _attribute(driver: ctypes.CDLL, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    return value.value


if __name__ == "__main__":
    print(json.dumps(probe()))
