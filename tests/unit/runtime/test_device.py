"""Device probes: a stand-in driver for NVML and torch.cuda, real files for cgroups and procfs."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tests.fakes import GIB, FakeClock, FakeProbe

from expertmesh.runtime.cgroup import CgroupMemory, read_cgroup_memory
from expertmesh.runtime.device import CpuProbe, DeviceProbe, NvmlProbe, TorchProbe, probe_for
from expertmesh.runtime.errors import ConfigError


class FakeNvmlError(Exception):
    """NVML's base error."""


class FakeNotSupportedError(FakeNvmlError):
    """What a MIG slice answers to a utilisation query."""


@dataclass
class FakeNvml:
    """The functions of pynvml that a probe calls, over a list of GPUs; a handle is a UUID."""

    uuids: list[str] = field(default_factory=lambda: ["GPU-aaa-1", "GPU-aab-2", "GPU-ccc-3"])
    processes: list[Any] = field(default_factory=list)
    gpu_percent: int | None = 25
    NVMLError: type[Exception] = FakeNvmlError
    NVMLError_NotSupported: type[Exception] = FakeNotSupportedError

    def nvmlInit(self) -> None:
        if not self.uuids:
            raise FakeNvmlError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.uuids[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"NVIDIA {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=24 * GIB, free=18 * GIB, used=6 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return self.processes

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if self.gpu_percent is None:
            raise FakeNotSupportedError
        return SimpleNamespace(gpu=self.gpu_percent)


def process(pid: int, used: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_nvml_reads_memory_use_and_name() -> None:
    nvml = FakeNvml(processes=[process(1, 2 * GIB), process(42, GIB)])
    reading = NvmlProbe(nvml, pid=42).read()
    assert (reading.kind, reading.source) == ("cuda", "nvml")
    assert reading.name == "NVIDIA GPU-aaa-1"
    assert (reading.total_bytes, reading.free_bytes) == (24 * GIB, 18 * GIB)
    assert reading.used_bytes == GIB
    assert reading.utilisation_frac == 0.25


@pytest.mark.parametrize("processes", [[], [process(7, 2 * GIB)], [process(42, None)]])
def test_nvml_takes_the_devices_use_when_it_cannot_see_the_process(processes: list[Any]) -> None:
    assert NvmlProbe(FakeNvml(processes=processes), pid=42).read().used_bytes == 6 * GIB


def test_a_mig_slice_has_no_utilisation() -> None:
    nvml = FakeNvml(gpu_percent=None)
    reading = NvmlProbe(nvml, 0, "MIG-5c6e").read()
    assert (reading.name, reading.utilisation_frac) == ("NVIDIA MIG-5c6e", 0.0)


@pytest.mark.parametrize(
    ("visible", "index", "uuid"),
    [
        (None, 2, "GPU-ccc-3"),
        ("2", 0, "GPU-ccc-3"),
        ("2, 0", 1, "GPU-aaa-1"),
        ("GPU-aab", 0, "GPU-aab-2"),
        ("1,GPU-ccc-3", 1, "GPU-ccc-3"),
    ],
)
def test_visible_devices_map_cuda_ordinals_to_gpus(
    visible: str | None, index: int, uuid: str
) -> None:
    assert NvmlProbe(FakeNvml(), index, visible).read().name == f"NVIDIA {uuid}"


@pytest.mark.parametrize(
    ("visible", "index", "message"),
    [
        (None, 3, r"device: expected one of the visible CUDA devices \(3\), got cuda:3"),
        ("0", 1, r"device: .*\(0\), got cuda:1"),
        ("", 0, "got cuda:0"),
        ("-1", 0, "got cuda:0"),
        ("9", 0, "CUDA_VISIBLE_DEVICES: .*3 GPUs of this host, got 9"),
        ("GPU-zzz", 0, "CUDA_VISIBLE_DEVICES: .*got GPU-zzz"),
    ],
)
def test_a_device_that_is_not_there_is_named(visible: str | None, index: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NvmlProbe(FakeNvml(), index, visible)


class FakeCuda:
    """The functions of torch.cuda that a probe calls."""

    def device_count(self) -> int:
        return 1

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 3 * GIB, 8 * GIB

    def get_device_name(self, index: int) -> str:
        return "NVIDIA L4"

    def memory_reserved(self, index: int) -> int:
        return 4 * GIB


def test_torch_reads_memory() -> None:
    reading = TorchProbe(FakeCuda()).read()
    assert (reading.source, reading.name, reading.utilisation_frac) == ("torch", "NVIDIA L4", 0.0)
    sizes = (reading.total_bytes, reading.free_bytes, reading.used_bytes)
    assert sizes == (8 * GIB, 3 * GIB, 4 * GIB)


def test_torch_without_the_device_says_so() -> None:
    with pytest.raises(ConfigError, match="1 CUDA devices torch sees, got cuda:1"):
        TorchProbe(FakeCuda(), 1)


def cpu_probe(root: Path, membership: str = "", **options: Any) -> CpuProbe:
    (root / "self").mkdir()
    (root / "self/cgroup").write_text(membership)
    (root / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fake CPU 9000\nflags\t: x\n")
    return CpuProbe(proc_root=root, cgroup_root=root / "cgroup", **options)


def write_group(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def test_cpu_without_a_limit_reads_the_machine(tmp_path: Path) -> None:
    reading = cpu_probe(tmp_path, "0::/\n").read()
    assert (reading.kind, reading.source, reading.name) == ("cpu", "process", "Fake CPU 9000")
    assert reading.total_bytes == psutil.virtual_memory().total
    assert 0 < reading.free_bytes <= reading.total_bytes
    assert 10 << 20 < reading.used_bytes < reading.total_bytes


def test_cpu_in_a_limited_group_has_what_the_group_has(tmp_path: Path) -> None:
    probe = cpu_probe(tmp_path, "0::/pod/worker\n")
    write_group(
        tmp_path / "cgroup/pod/worker",
        memory__max=100 << 20,
        memory__current=70 << 20,
        memory__stat=f"anon 1\ninactive_file {20 << 20}",
    )
    reading = probe.read()
    assert reading.total_bytes == 100 << 20
    assert reading.free_bytes == 50 << 20, "idle page cache can be taken back"


def test_cgroup_v2_counts_every_limit_on_the_way_up(tmp_path: Path) -> None:
    write_group(
        tmp_path / "pod", memory__max=100, memory__current=90, memory__stat="inactive_file 5"
    )
    write_group(tmp_path / "pod/a", memory__max="max", memory__current=1, memory__stat="anon 1")
    write_group(tmp_path / "pod/a/b", memory__max=60, memory__current=80, memory__stat="anon 1")
    limits = read_cgroup_memory(tmp_path, "0::/pod/a/b\n")
    assert limits == [CgroupMemory(60, 80), CgroupMemory(100, 85)]
    assert [limit.free_bytes for limit in limits] == [0, 15]


@pytest.mark.parametrize("membership", ["4:memory:/docker/1f\n0::/\n", "4:cpu,memory:/\n"])
def test_cgroup_v1_and_a_container_that_sees_only_its_own_group(
    tmp_path: Path, membership: str
) -> None:
    write_group(
        tmp_path / "memory",
        memory__limit_in_bytes=100,
        memory__usage_in_bytes=40,
        memory__stat="cache 9\ntotal_inactive_file 10",
    )
    assert read_cgroup_memory(tmp_path, membership) == [CgroupMemory(100, 30)]


def test_a_group_outside_of_the_mount_is_not_followed(tmp_path: Path) -> None:
    write_group(tmp_path / "x", memory__max=1, memory__current=1, memory__stat="anon 1")
    assert read_cgroup_memory(tmp_path / "cgroup", "0::/../x\n") == []


def test_cpu_utilisation_is_of_the_threads_over_the_last_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    wall, cpu = FakeClock(), FakeClock()
    probe = cpu_probe(tmp_path, num_threads=4, clock=wall, cpu_clock=cpu)
    wall.advance(1.0)
    cpu.advance(2.0)
    assert probe.read().utilisation_frac == pytest.approx(0.5)
    wall.advance(0.001)
    cpu.advance(0.004)
    assert probe.read().utilisation_frac == pytest.approx(0.5), "too short to say anything new"
    wall.advance(0.999)
    assert probe.read().utilisation_frac == pytest.approx(0.001)
    wall.advance(1.0)
    cpu.advance(9.0)
    assert probe.read().utilisation_frac == 1.0


def test_a_reading_travels_as_device_state() -> None:
    probe: DeviceProbe = FakeProbe(total_bytes=8 * GIB, free_bytes=2 * GIB)
    state = probe.read().to_proto()
    assert (state.kind, state.source, state.free_bytes) == ("cuda", "nvml", 2 * GIB)
    assert state.used_bytes == 6 * GIB


def test_probe_for_the_cpu() -> None:
    assert probe_for("cpu").read().kind == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_an_unknown_device_names_the_field(name: str) -> None:
    with pytest.raises(ConfigError, match="device: expected cpu, cuda or cuda:N"):
        probe_for(name)


def test_cuda_prefers_nvml_under_the_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert probe_for("cuda:1").read().name == "NVIDIA GPU-ccc-3"


def test_cuda_falls_back_to_torch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(uuids=[]))
    monkeypatch.setattr("torch.cuda", FakeCuda())
    assert probe_for("cuda").read().source == "torch"
    assert "NVML does not work (Driver Not Loaded)" in caplog.text
