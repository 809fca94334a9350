"""Sampled stacks: read from py-spy's raw output, cleaned, weighed by CPU time, summed. Pure."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

OURS = "expertmesh/"
_THREAD = re.compile(r"thread \((\w+)\): (.*)")
_FRAME = re.compile(r"(.*) \((.*)\)")
_NUMBERED = re.compile(r"Thread-\d+ \((.*)\)")
_ROOTS = re.compile(r".*/(?:site-packages|python3\.\d+|(?=benchmarks/|expertmesh/))/?")
_LOOP = ("asyncio/runners.py", "Runner.run")
_BOOTSTRAP = ("<frozen runpy>", "threading.py")
_WRAPPERS = re.compile(r".*\b(_wrapped_call_impl|_call_impl|decorate_context|wrapper)")
"""Functions that do nothing but call the next one: torch's and transformers' decorators."""
_SLEEPS = re.compile(r"event loop|thread .*|_worker|(.*\.)?_?(wait|get|acquire|join|select|poll)")
"""Functions in which threads wait for work; `event loop` is uvloop's C code, epoll included."""


class Frame(NamedTuple):
    """A function on a stack."""

    function: str
    module: str = ""
    """Its file below the folder it is imported from, as expertmesh/router/plan.py; "" if native."""

    def __str__(self) -> str:
        place = self.module.removeprefix(OURS)
        return f"{self.function} ({place})" if place else self.function


Stack = tuple[Frame, ...]
"""From the thread to the innermost function."""
Stacks = Mapping[Stack, float]
"""How much each weighs."""


class ThreadTime(NamedTuple):
    """What the kernel says of a thread, during a recording."""

    name: str
    cpu_s: float
    queued_s: float
    """Woken, but waiting for a core."""


def read_raw(raw: str) -> dict[str, dict[Stack, float]]:
    """Samples of each stack by thread id, from `py-spy record --threads --format raw`."""
    threads: dict[str, dict[Stack, float]] = defaultdict(lambda: defaultdict(float))
    for line in raw.splitlines():
        names, samples = line.rsplit(" ", 1)
        head, *rest = names.split(";")
        if thread := _THREAD.fullmatch(head):
            threads[thread[1]][_cleaned(thread[2], rest)] += float(samples)
    return threads


def _cleaned(thread: str, names: list[str]) -> Stack:
    """Without what every stack of a Python thread or event loop begins with."""
    frames = [_frame(name) for name in names]
    loops = [place for place, frame in enumerate(frames) if frame[::-1] == _LOOP]
    if loops or thread == "MainThread":  # now and then py-spy misses the outer frames
        return Frame("event loop"), *_telling(frames[loops[-1] + 1 if loops else 0 :])
    while frames and frames[0].module in _BOOTSTRAP:
        frames.pop(0)
    numbered = _NUMBERED.fullmatch(thread)
    return Frame(f"thread {numbered[1] if numbered else thread}"), *_telling(frames)


def _telling(frames: list[Frame]) -> list[Frame]:
    inner = frames[-1:]
    return [frame for frame in frames[:-1] if not _WRAPPERS.fullmatch(frame.function)] + inner


def _frame(name: str) -> Frame:
    found = _FRAME.fullmatch(name)
    function, file = found.groups() if found else (name, "")
    module = _ROOTS.sub("", file, count=1)
    return Frame(function, module.rsplit("/", 1)[-1] if module.startswith("/") else module)


def weighed(samples: Mapping[str, Stacks], threads: Mapping[str, ThreadTime]) -> dict[Stack, float]:
    """CPU seconds of each stack: what each thread used, shared by its samples.

    A thread that has been woken but waits for a core looks busy to a profiler: how long that was is
    taken off the functions in which threads sleep. Threads that never run Python have no samples:
    they are there under the name the kernel has of them.

    Args:
        samples: stacks by thread id.
        threads: by thread id.
    """
    stacks: dict[Stack, float] = defaultdict(float)
    for thread, time in threads.items():
        if not time.cpu_s:
            continue
        native: Stacks = {(Frame(f"native thread {time.name}"),): 1.0}
        own = _awake(samples.get(thread) or native, time.queued_s / (time.cpu_s + time.queued_s))
        total = sum(own.values())
        for stack, count in own.items():
            stacks[stack] += time.cpu_s * count / total
    return dict(stacks)


def _awake(samples: Stacks, queued_frac: float) -> Stacks:
    """The samples without that part of all, which is taken off those in functions that sleep."""
    sleeping = {stack for stack in samples if _SLEEPS.fullmatch(stack[-1].function)}
    asleep = sum(samples[stack] for stack in sleeping)
    queued = queued_frac * sum(samples.values())
    left_frac = max(1 - queued / asleep, 0.0) if asleep else 1.0
    awake = {stack: n * (left_frac if stack in sleeping else 1.0) for stack, n in samples.items()}
    return awake if any(awake.values()) else samples


def inclusive(stacks: Stacks, key: Callable[[Frame], str]) -> dict[str, float]:
    """Weight of the stacks with at least one frame of each key; "" is no key."""
    return _summed((key_, w) for stack, w in stacks.items() for key_ in {*map(key, stack)})


def innermost(stacks: Stacks, key: Callable[[Frame], str]) -> dict[str, float]:
    """Weight by the key of the innermost frame that has one: it pays for all that it calls."""
    found = ((next(filter(None, map(key, reversed(s))), ""), w) for s, w in stacks.items())
    return _summed(found)


def self_time(stacks: Stacks, key: Callable[[Frame], str] = str) -> dict[str, float]:
    """Weight by the key of the function that was running itself."""
    return _summed((key(stack[-1]), weight) for stack, weight in stacks.items())


def _summed(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for key, weight in pairs:
        if key:
            sums[key] += weight
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
