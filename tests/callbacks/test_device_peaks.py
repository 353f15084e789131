"""Dense peaks by the names the driver gives."""

import pytest

from callbacks.device_peaks import dense_bf16_peak


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_devices(name: str, tflops: float) -> None:
    assert dense_bf16_peak(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Some Accelerator 9000", "NVIDIA L400", "cpu"])
def test_unknown_devices_and_slices_have_none(name: str) -> None:
    assert dense_bf16_peak(name) is None
