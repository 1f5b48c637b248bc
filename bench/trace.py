"""``python -m bench.trace --out docs/cycle.svg``: two cycles kernel by kernel, and the seam between them."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import torch

from bench.shapes import DRAFTS, TARGETS
from fastspec.decoder import Request, SpeculativeDecoder
from fastspec.sampling import SamplingParams

GAMMA, AGREEMENT = 5, 0.75
WARM_UP, RECORDED = 4, 10
#: Kernels of a trace that are work on the GPU.
WORK = ("kernel", "gpu_memcpy", "gpu_memset")
#: The parts of a cycle, with the kernel that each is known by and its colour. The last pass is the target's.
PARTS = {
    "draft passes": ("pass_kernel", "#7fa3c7"),
    "propose": ("propose_kernel", "#6aa84f"),
    "target pass": ("pass_kernel", "#2f6aa8"),
    "verify": ("verify_kernel", "#c27c0e"),
    "commit": ("commit_kernel", "#8e63a9"),
    "the rest": (None, "#9aa5b1"),
}
MOVES = "compact_kernel"
#: Microseconds that the lower picture shows before and after the seam.
AROUND = 15.0

# Pixels.
WIDTH, LEFT, RIGHT, TOP, LANE, BAR, BETWEEN = 980, 100, 20, 58, 24, 18, 84


class Kernel(NamedTuple):
    """One piece of work on the GPU, in microseconds."""

    name: str
    start: float
    end: float


class Cycle(NamedTuple):
    """Kernels of one cycle in order, and the part of the cycle that each belongs to."""

    kernels: list[Kernel]
    parts: list[str]


def read_trace(path: Path) -> list[Kernel]:
    """The work on the GPU in a trace of torch.profiler, in order."""
    events = json.loads(path.read_text())["traceEvents"]
    work = [event for event in events if event.get("ph") == "X" and event.get("cat") in WORK]
    kernels = [Kernel(event["name"], event["ts"], event["ts"] + event["dur"]) for event in work]
    return sorted(kernels, key=lambda kernel: kernel.start)


def split(kernels: list[Kernel]) -> list[Cycle]:
    """The whole cycles of a trace; each ends with its commit, and with the copy of its report if that comes next."""
    groups: list[list[Kernel]] = [[]]
    committed = False
    for kernel in kernels:
        if committed and "Memcpy" not in kernel.name:
            groups.append([])
            committed = False
        groups[-1].append(kernel)
        committed = committed or PARTS["commit"][0] in kernel.name
    if not committed:
        groups.pop()
    cycles = [Cycle(group, _parts(group)) for group in groups]
    most = max((len(cycle.kernels) for cycle in cycles), default=0)
    # One whose beginning the profiler missed is shorter.
    return [cycle for cycle in cycles if len(cycle.kernels) == most]


def _parts(kernels: list[Kernel]) -> list[str]:
    known = {kernel: part for part, (kernel, _) in PARTS.items() if kernel and part != "target pass"}
    known[MOVES] = "commit"
    parts = [
        next((part for name, part in known.items() if name in kernel.name), "the rest") for kernel in kernels
    ]
    if "draft passes" in parts:
        parts[len(parts) - 1 - parts[::-1].index("draft passes")] = "target pass"
    return parts


def gaps(kernels: list[Kernel]) -> list[tuple[float, float]]:
    """(start, end) of the times between the first kernel and the last in which none runs."""
    found, until = [], kernels[0].end
    for kernel in kernels[1:]:
        if kernel.start > until:
            found.append((until, kernel.start))
        until = max(until, kernel.end)
    return found


def describe(cycle: Cycle, following: Cycle) -> str:
    """A cycle in words: its length up to the next one, how many kernels, how long nothing runs."""
    kernels = [*cycle.kernels, following.kernels[0]]
    length = kernels[-1].start - kernels[0].start
    idle = [end - start for start, end in gaps(kernels)]
    largest = max(idle, default=0.0)
    return (
        f"a cycle: {length:.0f} µs, {len(cycle.kernels)} kernels and copies; between them nothing runs for "
        f"{sum(idle):.1f} µs in all ({sum(idle) / length:.2%}), {largest:.1f} µs at most"
    )


def draw(first: Cycle, second: Cycle) -> str:
    """Two successive cycles as SVG: all of them, and below the seam with its gaps in microseconds."""
    zero, end = first.kernels[0].start, second.kernels[-1].end
    target = first.kernels[first.parts.index("target pass")]
    begin = second.kernels[second.parts.index("draft passes")].start
    height = 2 * (TOP + len(PARTS) * LANE) + BETWEEN
    lower = TOP + len(PARTS) * LANE + BETWEEN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
            'font-size="12"><rect width="100%" height="100%" fill="white"/>',
            f'<text x="{LEFT}" y="20" font-size="14">{escape(describe(first, second))}</text>',
            *_panel((first, second), zero, end, TOP, "two cycles, microseconds", marked=False),
            *_panel(
                (first, second),
                target.end - AROUND,
                begin + AROUND,
                lower,
                "from the end of the target's pass to the next cycle's first, microseconds; gaps above the lanes",
                marked=True,
            ),
            "</svg>\n",
        ]
    )


def _panel(
    cycles: tuple[Cycle, ...], begin: float, end: float, top: int, caption: str, *, marked: bool
) -> list[str]:
    """Lanes of kernels between two times, an axis below, and with ``marked`` the length of each gap."""
    scale = (WIDTH - LEFT - RIGHT) / (end - begin)
    bottom = top + len(PARTS) * LANE

    def at(time: float) -> float:
        return LEFT + (min(max(time, begin), end) - begin) * scale

    svg = []
    step = _step((end - begin) / 8)
    for tick in range(int((end - begin) / step) + 1):
        x = LEFT + tick * step * scale
        svg.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#00000022"/>')
        svg.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick * step:g}</text>')
    svg.append(f'<text x="{WIDTH - RIGHT}" y="{bottom + 32}" text-anchor="end">{escape(caption)}</text>')
    lanes = list(PARTS)
    for lane, part in enumerate(lanes):
        middle = top + lane * LANE + 16
        svg.append(f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(part)}</text>')
    for cycle in cycles:
        for kernel, part in zip(cycle.kernels, cycle.parts, strict=True):
            if kernel.end <= begin or kernel.start >= end:
                continue
            x, y = at(kernel.start), top + lanes.index(part) * LANE + (LANE - BAR) / 2
            width = max(at(kernel.end) - x, 0.5)
            svg.append(
                f'<rect x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{BAR}" fill="{PARTS[part][1]}">'
                f"<title>{escape(kernel.name[:60])}: {kernel.end - kernel.start:.2f} µs</title></rect>"
            )
    if marked:
        kernels = [kernel for cycle in cycles for kernel in cycle.kernels]
        inside = [(start, stop) for start, stop in gaps(kernels) if start >= begin and stop <= end]
        for number, (start, stop) in enumerate(inside):
            x, width, y = at(start), (stop - start) * scale, top - 6 - 12 * (number % 2)
            svg.append(
                f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{bottom - top}" fill="#d0402022"/>'
            )
            svg.append(
                f'<text x="{x + width / 2:.1f}" y="{y}" text-anchor="middle" font-size="10" fill="#b03020">'
                f"{stop - start:.1f}</text>"
            )
    return svg


def _step(least: float) -> float:
    """The first of 1, 2, 5, 10, ... that is not below."""
    step = 1.0
    while step < least:
        step *= 2.5 if str(step).startswith("2") else 2.0
    return step


def record(target: str, draft: str, path: Path) -> None:
    """Writes a trace of cycles that are launched ahead while the host reads what they commit."""
    from torch.profiler import ProfilerActivity, profile

    from bench.setup import Setup

    setup = Setup(1.0, target=target, draft=draft)
    new = (GAMMA + 1) * (WARM_UP + RECORDED + 4)
    decoder = SpeculativeDecoder(
        setup.target_model, setup.draft_model(AGREEMENT), gamma=GAMMA, capacity=setup.context + new
    )
    request = Request(setup.prompt(setup.context), new, SamplingParams(temperature=0.0))
    stream = decoder.stream([request])
    for _ in range(WARM_UP):
        next(stream)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(RECORDED):
            next(stream)
        torch.cuda.synchronize()
    stream.close()
    profiler.export_chrome_trace(str(path))


def main(arguments: list[str] | None = None) -> None:
    """Records a trace, or takes one, and draws it."""
    parser = argparse.ArgumentParser(prog="python -m bench.trace", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the SVG to write")
    parser.add_argument("--trace", type=Path, help="a trace to draw instead of recording one")
    parser.add_argument("--target", choices=list(TARGETS), default="llava7b")
    parser.add_argument(
        "--draft", choices=list(DRAFTS), default="", help="the target's usual one unless given"
    )
    given = parser.parse_args(arguments)
    if given.trace is None and not torch.cuda.is_available():
        parser.error(
            "recording needs an NVIDIA GPU, and torch finds none; --trace draws one that was recorded"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = given.trace
        if path is None:
            path = Path(folder) / "trace.json"
            record(given.target, given.draft, path)
        cycles = split(read_trace(path))
    if len(cycles) < 2:
        parser.error(f"the trace holds {len(cycles)} whole cycles of the fused kernels, expected 2 or more")
    # The last ones: by then the profiler has settled.
    first, second = cycles[-2:]
    given.out.write_text(draw(first, second))
    print(describe(first, second))
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
