"""What this installation can do: versions, GPU, backends, the attention of prompts, and why one is off."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from fastspec.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "numpy",
    "pillow",
    "safetensors",
)


def collect() -> dict:
    """Facts about the installation, ready for JSON."""
    import torch

    from fastspec.ops.backends import backends
    from fastspec.ops.causal_attention import attentions

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "compute_capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "multiprocessors": properties.multi_processor_count,
                }
            )
    return {
        "fastspec": __version__,
        "location": str(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "backends": [backend._asdict() for backend in backends()],
        "attention": [backend._asdict() for backend in attentions()],
        "warnings": name_clash(),
    }


def name_clash() -> list[str]:
    """Warns if the unrelated PyPI project with the same import name is installed as well."""
    version = _version("fastspec")
    if version is None:
        return []
    return [
        f"the unrelated distribution 'fastspec' {version} is installed and shares the import name; "
        "run: pip uninstall fastspec, then reinstall fastspec-llava"
    ]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
