"""Dense bf16 peaks of tensor cores by device: the denominator of MFU.

Data sheets print the figure with 2:4 sparsity first, which is twice this one; so do some tables in use. Sources: NVIDIA's data sheets of
A100, A10G, A30, A40, L4, L40, L40S, H100, H200, GH200, B200, the white papers of Ampere GA102 and Ada (bf16 with fp32 accumulation), and
AMD's of MI250X and MI300X.
"""

import re

# All words of a key must be words of the device's name; the longest such key wins. TFLOP/s.
DENSE_BF16_TFLOPS: dict[str, float] = {
    "a10": 125.0,
    "a100": 312.0,
    "a10g": 70.0,
    "a30": 165.0,
    "a40": 149.7,
    "a800": 312.0,
    "b200": 2250.0,
    "geforce rtx 3090": 71.0,
    "geforce rtx 4090": 165.2,
    "gh200": 989.4,
    "h100": 989.4,
    "h100 hbm2e": 756.5,
    "h100 hbm3": 989.4,
    "h100 nvl": 835.5,
    "h100 pcie": 756.5,
    "h200": 989.4,
    "h200 nvl": 835.5,
    "h800": 989.4,
    "h800 pcie": 756.5,
    "l4": 121.0,
    "l40": 181.0,
    "l40s": 362.0,
    "mi250x": 383.0,
    "mi300x": 1307.4,
    "rtx 6000 ada": 364.2,
    "rtx a6000": 154.8,
}


def dense_bf16_peak(device_name: str) -> float | None:
    """FLOP/s of a device by `torch.cuda.get_device_name`'s name; None where it is unknown, or a slice (MIG) of a device."""
    words = set(re.split(r"[^a-z0-9.]+", device_name.lower()))
    if "mig" in words:
        return None
    matches = [key for key in DENSE_BF16_TFLOPS if set(key.split()) <= words]
    return DENSE_BF16_TFLOPS[max(matches, key=len)] * 1e12 if matches else None
