"""What nodes call their GPUs: the label `nvidia.com/gpu.product` of NVIDIA's device plugin."""

from collections.abc import Mapping

PRODUCT_LABEL = "nvidia.com/gpu.product"
PRODUCTS: Mapping[str, tuple[str, ...]] = {
    "t4": ("Tesla-T4",),
    "v100": ("Tesla-V100-SXM2-16GB", "Tesla-V100-PCIE-16GB"),
    "a10": ("NVIDIA-A10", "NVIDIA-A10G"),
    "l4": ("NVIDIA-L4",),
    "rtx4090": ("NVIDIA-GeForce-RTX-4090",),
    "a100": ("NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"),
    "l40s": ("NVIDIA-L40S",),
    "a100-80g": ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"),
    "h100": ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"),
    "h200": ("NVIDIA-H200",),
    "b200": ("NVIDIA-B200",),
}
"""GPU of `gpus.GPUS` -> the products that are it."""
