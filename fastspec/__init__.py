"""Speculative decoding for LLaVA-style multimodal models: the same answers in law, several times faster."""

from importlib import import_module

from fastspec.version import __version__

__all__ = [
    "DraftTree",
    "Rule",
    "SpeculativeDecoder",
    "__version__",
    "choose_tree",
    "clear_decoders",
    "custom_generate",
    "generate",
]

_HOMES = {
    "DraftTree": "fastspec.tree",
    "Rule": "fastspec.verification",
    "SpeculativeDecoder": "fastspec.decoder",
    "choose_tree": "fastspec.shape",
    "clear_decoders": "fastspec.generation",
    "custom_generate": "fastspec.generation",
    "generate": "fastspec.generation",
}


def __getattr__(name: str):
    # On first use: torch and transformers take seconds to import, and `fastspec --help` needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module 'fastspec' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
