"""Where the time inside a pass goes, by its own clock.

The linear layers and the attention of the fused pass are steps of one kernel, which cannot be launched alone.
Its first block notes when it begins each. So a phase here is what this block does between the beginnings of two
steps, and with it the wait for what slower blocks hand over. A phase can be shorter than its bytes take: its weights
are on their way while the phase before it ends.
"""

from __future__ import annotations

import torch

from bench.engine import Work
from bench.report import result_row
from bench.setup import Setup, kv_bytes
from bench.timing import Timing, summary

#: The steps of a layer, in the order of the clock; before the first stands the embedding, after the last the head.
STEPS = ("qkv", "attention", "output", "gate_up", "down")
WARM_UP = 5


def phase_timings(work: Work, samples: int) -> dict[str, Timing] | None:
    """The time of each phase, that of a step being the mean over the layers of a pass; medians over passes.

    Returns:
        By name: ``embedding``, the steps, ``head``; the embedding includes the start of all blocks. None where the
        pass has no clock, as that by PyTorch's operations.
    """
    run, layers = work.run, work.transformer.num_layers
    if not hasattr(run, "clock"):
        return None
    run.clock = torch.zeros(len(STEPS) * layers + 3, dtype=torch.int64, device=work.prefix.device)
    marks = []
    for _ in range(WARM_UP + samples):
        work()
        marks.append(run.clock.clone())
    run.clock = None
    spans = torch.stack(marks[WARM_UP:]).diff(dim=1).double().cpu() / 1e3
    steps = spans[:, 1:-1].view(samples, layers, len(STEPS)).mean(1)
    phases = {"embedding": spans[:, 0], **dict(zip(STEPS, steps.T, strict=True)), "head": spans[:, -1]}
    return {phase: summary(times.tolist()) for phase, times in phases.items()}


def phase_bytes(work: Work, keys: int) -> dict[str, int]:
    """What each phase must read, by name: embeddings of the rows, weights, or keys and values of one layer.

    Args:
        keys: rows of each sequence's cache that count.
    """
    transformer = work.transformer
    layer = transformer.layers[0]
    return {
        "embedding": work.token_ids.numel() * transformer.hidden_size * transformer.dtype.itemsize,
        "qkv": layer.qkv.nbytes,
        "attention": len(work.prefix) * kv_bytes(transformer, keys) // transformer.num_layers,
        "output": layer.output.nbytes,
        "gate_up": layer.gate_up.nbytes,
        "down": layer.down.nbytes,
        "head": transformer.lm_head.nbytes,
    }


def phase_rows(setup: Setup, name: str, work: Work) -> list[dict]:
    """Rows ``<name>/<phase>``, microseconds each time, with bytes and how often a pass has the phase.

    There are none where the pass has no clock.
    """
    timings = phase_timings(work, setup.samples)
    if timings is None:
        return []
    num_bytes = phase_bytes(work, int(work.prefix[0]))
    return [
        result_row(
            f"{name}/{phase}",
            timing,
            setup.floor(num_bytes[phase]),
            num_bytes=num_bytes[phase],
            megabytes=num_bytes[phase] / 1e6,
            times=work.transformer.num_layers if phase in STEPS else 1,
        )
        for phase, timing in timings.items()
    ]
