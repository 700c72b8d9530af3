"""Device and way to offload are decided before Jittor starts, and wrong choices are told."""

import os
import sys

import pytest
from click.testing import CliRunner

from moss_jt import Moss
from moss_jt.backend import device
from moss_jt.backend.device import (
    CARDS_SWITCH,
    DEVICE_SWITCH,
    MANAGED_SWITCH,
    SWAP_SWITCH,
    check_choice,
    decide,
    parse_device,
)
from moss_jt.commands.generate import command as generate
from moss_jt.errors import MossError

SWITCHES = (DEVICE_SWITCH, SWAP_SWITCH, MANAGED_SWITCH)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process in which nothing was decided and Jittor does not run."""
    for switch in (*SWITCHES, CARDS_SWITCH):
        monkeypatch.setenv(switch, "set, so that it is restored")
        monkeypatch.delenv(switch)
    monkeypatch.delitem(sys.modules, "moss_jt.backend.jittor", raising=False)
    monkeypatch.setattr(device, "cards_given", lambda: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("chosen", "offload", "wanted"),
    [
        ("cpu", "stream", ("cpu", None, None)),
        ("cpu", "swap", ("cpu", "1", None)),
        ("gpu", "stream", ("gpu", None, None)),
        ("gpu", "swap", ("gpu", "1", None)),
        ("gpu", "unified", ("gpu", None, "1")),
    ],
)
def test_the_choice_travels_in_the_environment(
    fresh: pytest.MonkeyPatch, chosen: device.Device, offload: device.Offload, wanted: tuple[str | None, ...]
) -> None:
    decide(chosen, offload)
    assert tuple(os.environ.get(switch) for switch in SWITCHES) == wanted
    fresh.setitem(sys.modules, "moss_jt.backend.jittor", sys)
    decide(chosen, offload)  # once more, with Jittor running


@pytest.mark.parametrize(
    ("chosen", "offload"), [("gpu", "stream"), ("cpu", "swap"), ("gpu", "unified"), ("gpu", "swap")]
)
def test_a_running_jittor_keeps_its_choice(
    fresh: pytest.MonkeyPatch, chosen: device.Device, offload: device.Offload
) -> None:
    decide("cpu", "stream")
    fresh.setitem(sys.modules, "moss_jt.backend.jittor", sys)
    with pytest.raises(MossError, match=r"runs in this process for the CPU without swapping.*new process"):
        decide(chosen, offload)
    assert device.chosen_device() == "cpu" and not device.swaps() and not device.managed()


def test_a_card_is_chosen_before_cuda_starts_and_kept(fresh: pytest.MonkeyPatch) -> None:
    decide("gpu", "stream", 1)
    assert os.environ[DEVICE_SWITCH] == "gpu:1" and os.environ[CARDS_SWITCH] == "1"
    assert (device.chosen_device(), device.chosen_card()) == ("gpu", 1)
    decide("gpu", "stream")  # a second load, where the first has failed
    assert os.environ[DEVICE_SWITCH] == "gpu" and os.environ[CARDS_SWITCH] == "0"
    decide("cpu", "stream")
    assert CARDS_SWITCH not in os.environ
    decide("gpu", "stream", 1)
    fresh.setitem(sys.modules, "moss_jt.backend.jittor", sys)
    decide("gpu", "stream", 1)
    with pytest.raises(MossError, match=r"runs in this process for the GPU 1 without.*device='gpu:2'"):
        decide("gpu", "stream", 2)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cpu", ("cpu", 0)),
        ("gpu", ("gpu", 0)),
        ("gpu:0", ("gpu", 0)),
        ("gpu:12", ("gpu", 12)),
        ("cuda:1", ("gpu", 1)),
    ],
)
def test_a_device_is_written_as_in_pytorch(text: str, wanted: tuple[str, int]) -> None:
    assert parse_device(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "tpu", "cpu:1", "gpu:", "gpu:-1", "gpu:1\n", "gpu:1234", "GPU", "gpu: 1", "gpu:１"]
)
def test_what_is_no_device_is_told(text: str) -> None:
    with pytest.raises(MossError, match="no device .*give 'cpu', 'gpu', or 'gpu:1' for the second card"):
        parse_device(text)


def test_auto_streams_and_unknown_choices_are_refused() -> None:
    assert check_choice("cpu", "auto") == check_choice("gpu", "auto") == "stream"
    with pytest.raises(MossError, match="no offload 'magic' on the GPU: give auto, stream, swap, unified"):
        check_choice("gpu", "magic")
    with pytest.raises(MossError, match="no offload 'unified' on the CPU: give auto, stream, swap"):
        check_choice("cpu", "unified")
    with pytest.raises(MossError, match="no device 'tpu'"):
        Moss.load("anything", device="tpu")


def test_limits_of_the_other_device_are_refused() -> None:
    with pytest.raises(MossError, match="the GPU has two, gpu_memory and host_memory"):
        Moss.load("anything", device="gpu", memory="8GiB")
    with pytest.raises(MossError, match="the GPU has two"):
        Moss.load("anything", gpu_memory="8GiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "--memory", "8GiB"], "with --gpu give --gpu-memory and --host-memory"),
        (["--gpu-memory", "8GiB"], "--gpu-memory needs --gpu"),
        (["--host-memory", "8GiB"], "--host-memory needs --gpu"),
        (["--offload", "unified"], "--offload unified needs --gpu"),
        (["--device", "1"], "--device needs --gpu"),
        (["--gpu", "--device", "-1"], "-1 is not in the range"),
    ],
)
def test_the_command_line_says_which_limit_is_whose(options: list[str], message: str) -> None:
    result = CliRunner().invoke(generate, ["moss-tiny", "--prompt", "a", *options])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
