"""What a compute device has, has left and does: by NVML, by torch, or by process and cgroup."""

import logging
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil

from expertmesh.runtime.cgroup import read_cgroup_memory
from expertmesh.runtime.errors import ConfigError
from expertmesh.v1 import control_pb2 as pb

_log = logging.getLogger(__name__)

_MIN_CPU_INTERVAL_S = 0.02
_DEVICE = re.compile(r"cpu|cuda(?::(?P<index>[0-9]{1,4}))?")


@dataclass(frozen=True)
class DeviceReading:
    """Memory and use of a device at one moment."""

    kind: Literal["cuda", "cpu"]
    name: str
    source: Literal["nvml", "torch", "process"]
    """Where the numbers come from."""
    total_bytes: int
    """What the device has; on CPU the cgroup's limit if that is less than the machine's memory."""
    free_bytes: int
    """What nobody uses; on CPU what the cgroup or the machine can still give."""
    used_bytes: int
    """What this process uses; the whole device's use where the driver cannot tell."""
    utilisation_frac: float
    """Share of the last interval in which the device was busy, 0 to 1; 0 where nobody can tell."""

    def to_proto(self) -> pb.DeviceState:
        """The same as it rides on heartbeats."""
        return pb.DeviceState(**vars(self))


class DeviceProbe(Protocol):
    """Reads one device. Cheap enough for every heartbeat (well below 1 ms)."""

    def read(self) -> DeviceReading:
        """The device now."""


class NvmlProbe:
    """An NVIDIA GPU through NVML, which needs no CUDA context.

    NVML counts GPUs in PCI order. CUDA counts them fastest first unless
    CUDA_DEVICE_ORDER=PCI_BUS_ID is set, which a node with different GPUs therefore needs.

    Args:
        nvml: the `pynvml` module (PyPI nvidia-ml-py).
        index: CUDA ordinal as this process sees it, after CUDA_VISIBLE_DEVICES.
        visible_devices: value of CUDA_VISIBLE_DEVICES, None if unset.
        pid: whose memory counts as used.

    Raises:
        ConfigError: no such device is visible.
        pynvml.NVMLError: no driver.
    """

    def __init__(
        self,
        nvml: Any,
        index: int = 0,
        visible_devices: str | None = None,
        pid: int | None = None,
    ) -> None:
        nvml.nvmlInit()
        self._nvml = nvml
        self._pid = pid or os.getpid()
        self._handle = _nvml_handle(nvml, index, visible_devices)
        name = nvml.nvmlDeviceGetName(self._handle)
        self._name: str = name.decode() if isinstance(name, bytes) else name

    def read(self) -> DeviceReading:
        """The GPU now; utilisation is the driver's, over its own last sample period."""
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return DeviceReading(
            kind="cuda",
            name=self._name,
            source="nvml",
            total_bytes=memory.total,
            free_bytes=memory.free,
            used_bytes=self._own_bytes(memory.used),
            utilisation_frac=self._utilisation_frac(),
        )

    def _own_bytes(self, device_used_bytes: int) -> int:
        # In a container the driver reports pids of another namespace, so our own may not be there.
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == self._pid and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return device_used_bytes

    def _utilisation_frac(self) -> float:
        try:
            percent: int = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
        except self._nvml.NVMLError_NotSupported:  # MIG slices have no such counter
            return 0.0
        return min(percent / 100, 1.0)


def _nvml_handle(nvml: Any, index: int, visible_devices: str | None) -> Any:
    """NVML's handle of CUDA ordinal `index` under CUDA_VISIBLE_DEVICES."""
    count = nvml.nvmlDeviceGetCount()
    if visible_devices is None:
        visible = [str(ordinal) for ordinal in range(count)]
    else:
        visible = [entry.strip() for entry in visible_devices.split(",")]
    if index >= len(visible) or visible[index] in ("", "-1"):
        raise ConfigError.of(
            "device",
            expected=f"one of the visible CUDA devices ({visible_devices or count})",
            got=f"cuda:{index}",
        )
    entry = visible[index]
    if entry.isdigit():
        if int(entry) < count:
            return nvml.nvmlDeviceGetHandleByIndex(int(entry))
    elif entry.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(entry)
    else:
        # CUDA accepts any unique beginning of a UUID, NVML only all of it.
        for ordinal in range(count):
            handle = nvml.nvmlDeviceGetHandleByIndex(ordinal)
            if nvml.nvmlDeviceGetUUID(handle).startswith(entry):
                return handle
    raise ConfigError.of(
        "CUDA_VISIBLE_DEVICES", expected=f"entries among the {count} GPUs of this host", got=entry
    )


class TorchProbe:
    """A CUDA device through torch: memory only, and only once torch has a context there.

    Args:
        cuda: the `torch.cuda` module.
        index: CUDA ordinal as this process sees it.
    """

    def __init__(self, cuda: Any, index: int = 0) -> None:
        if index >= cuda.device_count():
            raise ConfigError.of(
                "device",
                expected=f"one of {cuda.device_count()} CUDA devices torch sees",
                got=f"cuda:{index}",
                hint="Use device: cpu, or check the NVIDIA driver.",
            )
        self._cuda = cuda
        self._index = index

    def read(self) -> DeviceReading:
        """The GPU now; `used_bytes` is what torch's allocator holds, utilisation is not known."""
        free_bytes, total_bytes = self._cuda.mem_get_info(self._index)
        return DeviceReading(
            kind="cuda",
            name=self._cuda.get_device_name(self._index),
            source="torch",
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            used_bytes=self._cuda.memory_reserved(self._index),
            utilisation_frac=0.0,
        )


class CpuProbe:
    """This process on the CPUs and the memory it may use.

    Args:
        num_threads: compute threads of the process; default the CPUs it may run on.
        cgroup_root: where the cgroup file systems are mounted.
        proc_root: where procfs is mounted.
        clock, cpu_clock: wall and process CPU time, in seconds.
    """

    def __init__(
        self,
        num_threads: int | None = None,
        *,
        cgroup_root: Path = Path("/sys/fs/cgroup"),
        proc_root: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        num_cpus = len(os.sched_getaffinity(0))
        self._num_busy_max = min(num_threads or num_cpus, num_cpus)
        self._process = psutil.Process()
        self._cgroup_root = cgroup_root
        self._membership = _read_text(proc_root / "self/cgroup")
        self._name = _cpu_name(_read_text(proc_root / "cpuinfo"))
        self._clock, self._cpu_clock = clock, cpu_clock
        self._wall_s, self._cpu_s = clock(), cpu_clock()
        self._utilisation_frac = 0.0

    def read(self) -> DeviceReading:
        """The process now; utilisation since the previous reading."""
        machine = psutil.virtual_memory()
        total_bytes, free_bytes = machine.total, machine.available
        for limit in read_cgroup_memory(self._cgroup_root, self._membership):
            total_bytes = min(total_bytes, limit.limit_bytes)
            free_bytes = min(free_bytes, limit.free_bytes)
        return DeviceReading(
            kind="cpu",
            name=self._name,
            source="process",
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            used_bytes=self._process.memory_info().rss,
            utilisation_frac=self._utilisation(),
        )

    def _utilisation(self) -> float:
        wall_s, cpu_s = self._clock(), self._cpu_clock()
        passed_s = wall_s - self._wall_s
        if passed_s >= _MIN_CPU_INTERVAL_S:  # readings in quick succession would measure themselves
            busy_frac = (cpu_s - self._cpu_s) / (passed_s * self._num_busy_max)
            self._utilisation_frac = min(max(busy_frac, 0.0), 1.0)
            self._wall_s, self._cpu_s = wall_s, cpu_s
        return self._utilisation_frac


def _read_text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _cpu_name(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1] if found else platform.machine()


def probe_for(device: str, num_threads: int | None = None) -> DeviceProbe:
    """The best probe of `device`: "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: no such device here.
    """
    match = _DEVICE.fullmatch(device)
    if not match:
        raise ConfigError.of("device", expected="cpu, cuda or cuda:N", got=repr(device))
    if device == "cpu":
        return CpuProbe(num_threads)
    return _cuda_probe(int(match["index"] or 0))


def _cuda_probe(index: int) -> DeviceProbe:
    import pynvml

    try:
        return NvmlProbe(pynvml, index, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except pynvml.NVMLError as error:
        _log.warning("device: NVML does not work (%s); asking torch instead", error)
    import torch

    return TorchProbe(torch.cuda, index)
