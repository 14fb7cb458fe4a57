"""Tests of ``treadle_fabric.accelerators.accelerator``, ``treadle_fabric.accelerators.cpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from treadle_fabric.accelerators import (
    ACCELERATOR_REGISTRY,
    Accelerator,
    AcceleratorRegistry,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    find_usable_cuda_devices,
)
from treadle_fabric.errors import DeviceUnavailableError, MisconfigurationException


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four CUDA devices and an MPS one, as far as counting goes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


class TestCPU:
    @pytest.mark.parametrize(
        ("devices", "count"), [("auto", 1), (-1, 1), ("-1", 1), (1, 1), (3, 3), ("3", 3), (" 2 ", 2)]
    )
    def test_devices(self, devices: Any, count: int) -> None:
        assert CPUAccelerator.parse_devices(devices) == count
        assert CPUAccelerator.get_parallel_devices(devices) == [torch.device("cpu")] * count

    @pytest.mark.parametrize("devices", [0, -2, "x", "", 1.5, None, True, "1.5"])
    def test_refused(self, devices: Any) -> None:
        with pytest.raises(DeviceUnavailableError, match="number from 1"):
            CPUAccelerator.parse_devices(devices)

    @pytest.mark.parametrize("devices", [[0, 1], "0,1", (0, 5)])
    def test_indices_are_refused_with_the_remedy(self, devices: Any) -> None:
        with pytest.raises(DeviceUnavailableError, match="Use devices=2"):
            CPUAccelerator.parse_devices(devices)

    def test_use(self) -> None:
        accelerator = CPUAccelerator()
        assert accelerator.is_available()
        assert accelerator.auto_device_count() == 1
        accelerator.setup_device(torch.device("cpu"))
        with pytest.raises(DeviceUnavailableError, match="no CPU device"):
            accelerator.setup_device(torch.device("cuda", 0))
        accelerator.teardown()

    def test_stats(self) -> None:
        pytest.importorskip("psutil")
        stats = CPUAccelerator().get_device_stats("cpu")
        assert set(stats) == {"cpu_vm_percent", "cpu_percent", "cpu_swap_percent"}
        assert 0 < stats["cpu_vm_percent"] <= 100


@pytest.mark.usefixtures("gpus")
class TestCUDA:
    @pytest.mark.parametrize(
        ("devices", "indices"),
        [
            ("auto", [0, 1, 2, 3]),
            (-1, [0, 1, 2, 3]),
            ("-1", [0, 1, 2, 3]),
            (1, [0]),
            (3, [0, 1, 2]),
            ("3", [0, 1, 2]),
            ([3], [3]),
            ([2, 0], [2, 0]),
            ((1, 2), [1, 2]),
            ("0,1", [0, 1]),
            ("3, 1", [3, 1]),
            ("2,", [2]),
        ],
    )
    def test_devices(self, devices: Any, indices: list[int]) -> None:
        assert CUDAAccelerator.parse_devices(devices) == indices
        assert CUDAAccelerator.get_parallel_devices(devices) == [torch.device("cuda", i) for i in indices]

    @pytest.mark.parametrize("devices", [5, "5", [4], [0, 7], "1,9", [-1]])
    def test_what_is_not_there(self, devices: Any) -> None:
        with pytest.raises(DeviceUnavailableError, match=r"has 4 cuda devices \(index 0 to 3\)"):
            CUDAAccelerator.parse_devices(devices)

    @pytest.mark.parametrize("devices", [0, "0", [], [0, 0], "a,b", "x", None, 1.0, True, [True], [0.5]])
    def test_refused(self, devices: Any) -> None:
        with pytest.raises(DeviceUnavailableError):
            CUDAAccelerator.parse_devices(devices)

    def test_none_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert not CUDAAccelerator.is_available()
        for devices in (1, -1, "auto", [0]):
            with pytest.raises(DeviceUnavailableError, match="no cuda device"):
                CUDAAccelerator.parse_devices(devices)

    def test_wrong_device(self) -> None:
        with pytest.raises(DeviceUnavailableError, match="no CUDA device"):
            CUDAAccelerator().setup_device(torch.device("cpu"))

    def test_usable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def zeros(*size: int, device: torch.device) -> None:
            if device.index in (0, 2):
                raise RuntimeError("busy")

        monkeypatch.setattr(torch, "zeros", zeros)
        assert find_usable_cuda_devices() == [1, 3]
        assert find_usable_cuda_devices(1) == [1]
        assert find_usable_cuda_devices(0) == []
        with pytest.raises(DeviceUnavailableError, match=r"only \[1, 3\]"):
            find_usable_cuda_devices(3)
        with pytest.raises(DeviceUnavailableError, match="has 4"):
            find_usable_cuda_devices(5)


@pytest.mark.usefixtures("gpus")
class TestMPS:
    @pytest.mark.parametrize("devices", ["auto", 1, "1", -1, [0], "0,"])
    def test_devices(self, devices: Any) -> None:
        assert MPSAccelerator.get_parallel_devices(devices) == [torch.device("mps", 0)]

    @pytest.mark.parametrize("devices", [2, [1], [0, 1], "0,1"])
    def test_there_is_one(self, devices: Any) -> None:
        with pytest.raises(DeviceUnavailableError, match=r"1 mps device \(index 0\)"):
            MPSAccelerator.parse_devices(devices)

    def test_wrong_device(self) -> None:
        with pytest.raises(DeviceUnavailableError, match="no MPS device"):
            MPSAccelerator().setup_device(torch.device("cpu"))


class TestRegistry:
    def test_order_is_the_preference(self) -> None:
        assert list(ACCELERATOR_REGISTRY) == ["cuda", "mps", "tpu", "cpu"]
        assert type(ACCELERATOR_REGISTRY.get("cpu")) is CPUAccelerator
        assert ACCELERATOR_REGISTRY.available_accelerators() == {"cuda", "mps", "tpu", "cpu"}

    def test_register(self) -> None:
        registry = AcceleratorRegistry()
        CPUAccelerator.register_accelerators(registry)
        with pytest.raises(MisconfigurationException, match="override=True"):
            CPUAccelerator.register_accelerators(registry)
        registry.register("cpu", MPSAccelerator, override=True)
        assert type(registry.get("cpu")) is MPSAccelerator
        registry.remove("cpu")
        with pytest.raises(MisconfigurationException, match="There is none"):
            registry.get("cpu")
        with pytest.raises(MisconfigurationException, match="Did you mean 'cuda'"):
            ACCELERATOR_REGISTRY.get("cude")

    def test_interface(self) -> None:
        with pytest.raises(TypeError, match="abstract"):
            Accelerator()  # type: ignore[abstract]


@pytest.mark.gpu
def test_cuda_for_real() -> None:
    accelerator = CUDAAccelerator()
    device = accelerator.get_parallel_devices([0])[0]
    accelerator.setup_device(device)
    tensor = torch.ones(1024, device=device)
    assert accelerator.get_device_stats(device)["allocated_bytes.all.current"] >= tensor.nbytes
    assert 0 in find_usable_cuda_devices()
    accelerator.teardown()
