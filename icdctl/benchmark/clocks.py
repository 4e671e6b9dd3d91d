"""Clocks for measurements.

On a CPU, the first clock is the CPU time of the process, which other work on the machine hardly changes; the second is
the wall clock. On CUDA, the first clock is the device's events.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from icdctl.engine.environment import describe_device
from icdctl.files import JsonObject
from icdctl.versions import versions

PACKAGES = ("icdctl", "torch", "torchvision", "numpy")
_FEWEST_STEPS = 3
_EVENTS_AT_A_TIME = 100


@dataclass(frozen=True)
class Timing:
    """The times of single steps, in milliseconds."""

    step_ms: tuple[float, ...]
    """Each step on the first clock: CPU time of the process, all threads together, or time between CUDA events."""
    wall_ms: tuple[float, ...]
    """Wall time: on a CPU of each step; on CUDA the mean step of each stretch between two synchronisations."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_name(device: torch.device) -> str:
    """The name of the first clock, for reports."""
    return "CUDA events" if device.type == "cuda" else "CPU seconds of the process"


def time_steps(step: Callable[[], None], *, seconds: float, device: torch.device) -> Timing:
    """Take steps for some time, at least three of them, and time each.

    Args:
        step: takes one step.
        seconds: wall seconds to run for.
        device: the device that the steps run on.
    """
    return _time_on_cuda(step, seconds, device) if device.type == "cuda" else _time_on_cpu(step, seconds)


def _time_on_cpu(step: Callable[[], None], seconds: float) -> Timing:
    own: list[float] = []
    wall: list[float] = []
    end = time.perf_counter() + seconds
    while len(own) < _FEWEST_STEPS or time.perf_counter() < end:
        wall_before, own_before = time.perf_counter(), time.process_time()
        step()
        own.append(1e3 * (time.process_time() - own_before))
        wall.append(1e3 * (time.perf_counter() - wall_before))
    return Timing(tuple(own), tuple(wall))


def _time_on_cuda(step: Callable[[], None], seconds: float, device: torch.device) -> Timing:
    own: list[float] = []
    wall: list[float] = []
    torch.cuda.synchronize(device)
    end = time.perf_counter() + seconds
    with torch.cuda.device(device):
        while len(own) < _FEWEST_STEPS or time.perf_counter() < end:
            events = [_event() for _ in range(_EVENTS_AT_A_TIME + 1)]
            wall_before = time.perf_counter()
            events[0].record()
            for event in events[1:]:
                step()
                event.record()
            torch.cuda.synchronize(device)
            wall.append(1e3 * (time.perf_counter() - wall_before) / _EVENTS_AT_A_TIME)
            own += [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
    return Timing(tuple(own), tuple(wall))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped


class PhaseClock:
    """Times the named phases of steps; each phase occurs once per step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent: dict[str, list[float]] = {}
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for this phase."""
        if self._device.type == "cuda":
            first, last = _event(), _event()
            first.record()
            yield
            last.record()
            self._events.setdefault(name, []).append((first, last))
            return
        before = time.process_time()
        yield
        self._spent.setdefault(name, []).append(1e3 * (time.process_time() - before))

    def clear(self) -> None:
        """Delete all times so far."""
        self._spent.clear()
        self._events.clear()

    def medians_ms(self) -> dict[str, float]:
        """The median time of each phase over the steps, in milliseconds."""
        synchronize(self._device)
        spent = {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in self._events.items()}
        return {name: statistics.median(times) for name, times in (self._spent | spent).items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


def repeat(work: Callable[[], object], *, seconds: float, device: torch.device, fewest: int = 3) -> float:
    """Median seconds of `work` over `fewest` to 10 repeats, after one that is not counted.

    On a CPU these are CPU seconds of the process; on CUDA, wall seconds until the device has finished.
    """
    work()
    synchronize(device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    while len(times) < fewest or (len(times) < 10 and time.perf_counter() < end):
        before = clock()
        work()
        synchronize(device)
        times.append(clock() - before)
    return statistics.median(times)


def describe(device: torch.device, precision: str) -> JsonObject:
    """The measured device for reports: its name and size, and how busy the machine is."""
    described = {**describe_device(device), "precision": precision, "clock": clock_name(device)}
    if device.type == "cpu":
        described["capability"] = torch.backends.cpu.get_cpu_capability()
    return {**described, "load_before": load()}


def load() -> float | None:
    """Mean number of processes that wanted a CPU in the last minute, with this one; None where it is not known."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that a measurement depends on."""
    return versions(PACKAGES)
