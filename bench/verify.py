"""How long does verification take in a captured cycle, beside PyTorch, torch.compile and FlashInfer?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.ceilings import empty_kernel
from bench.report import clock_megahertz, result_row
from bench.setup import Setup
from bench.timing import Timing, interleaved, time_eager
from fastspec import DraftTree
from fastspec.ops import Proposer, Verifier
from fastspec.sampling import SamplingParams, SamplingTensors
from fastspec.verification import Rule

TREES = {
    "chain5": DraftTree.chain(5),
    "chain7": DraftTree.chain(7),
    "tree16": DraftTree.kary((3, 2, 1)),
    "tree64": DraftTree.kary((3, 4, 4)),
}
VOCABULARIES = (32064, 128256)
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=1.0),
    "topk_topp": SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
}
#: Inputs differ from launch to launch, as many as fit the L2 cache together: that is where a pass leaves its logits.
ROTATION_BYTES = 24 << 20
MAX_ROTATION = 8
#: In a graph, of the CUDA kernel so many that the graph's start is no part of the time of each.
LAUNCHES, CUDA_LAUNCHES = 4 * MAX_ROTATION, 32 * MAX_ROTATION
#: What lies between the marks at which the kernel notes the clock.
PARTS = ("read", "statistics", "walk", "output")


@dataclass
class Inputs:
    """What one verification reads, drawn by the draft itself."""

    tree: DraftTree
    rule: Rule
    logits: torch.Tensor
    draft_logits: torch.Tensor
    tokens: torch.Tensor
    sampling: SamplingTensors
    positions: torch.Tensor


def make_inputs(
    tree: DraftTree, vocab_size: int, params: SamplingParams, seed: int, batch: int = 1
) -> Inputs:
    """Logits with the spread of a language model's, and a draft that agrees often but not always."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    logits = normal(batch, tree.num_nodes, vocab_size) * 2.5
    likely = torch.randint(vocab_size, (batch, tree.num_nodes, 8), generator=generator, device="cuda")
    boost = 9 + 3 * normal(batch, tree.num_nodes, 8)
    logits.scatter_add_(-1, likely, boost)
    raw = logits[:, list(tree.inner)] + 0.5 * normal(batch, len(tree.inner), vocab_size)
    rule = Rule.BLOCK if tree.is_chain else Rule.RECURSIVE_REJECTION
    sampling = SamplingTensors(batch, vocab_size, "cuda")
    for row in range(batch):
        sampling.set(row, params, seed * 1000 + row)
    positions = torch.full((batch,), 640, device="cuda")
    tokens = torch.zeros(batch, tree.num_nodes, dtype=torch.int64, device="cuda")
    draft_logits = torch.zeros(batch, len(tree.inner), vocab_size, device="cuda")
    proposer = Proposer(tree, batch, vocab_size, rule, "cuda")
    for level, nodes in enumerate(tree.levels):
        rows = [tree.inner_index[node] for node in nodes]
        proposer(raw[:, rows].contiguous(), level, tokens, draft_logits, sampling, positions)
    return Inputs(tree, rule, logits, draft_logits, tokens, sampling, positions)


def torch_chain(logits, draft_logits, tokens, temperature):
    """Token-level verification of a chain as it is usually written in PyTorch."""
    p = torch.softmax(logits[0] / temperature, -1)
    q = torch.softmax(draft_logits[0], -1)
    drafted = tokens[0, 1:]
    p_x = p[:-1].gather(1, drafted[:, None])[:, 0]
    q_x = q.gather(1, drafted[:, None])[:, 0]
    accepted = (torch.rand_like(p_x) * q_x < p_x).long().cumprod(0).sum()
    residual = torch.cat([(p[:-1] - q).clamp(min=0), p[-1:]]).index_select(0, accepted.view(1))[0]
    noise = torch.empty_like(residual).exponential_()
    return accepted, (residual / noise).argmax()


def torch_block_chain(logits, draft_logits, tokens, temperature):
    """Block verification of a chain, the kernel's own rule (Sun et al. 2403.10444), in PyTorch."""
    p = torch.softmax(logits[0] / temperature, -1)
    q = torch.softmax(draft_logits[0], -1)
    drafted = tokens[0, 1:]
    ratios = (p[:-1].gather(1, drafted[:, None]) / q.gather(1, drafted[:, None]))[:, 0]
    r = [torch.ones_like(ratios[0])]
    for ratio in ratios.unbind():
        r.append((r[-1] * ratio).clamp(max=1))
    r = torch.stack(r)
    laws = torch.cat([(r[:-1, None] * p[:-1] - q).clamp(min=0), p[-1:]])
    masses = laws[1:-1].sum(-1)
    h = torch.cat([masses / (masses + 1 - r[1:-1]), r[-1:]])
    nodes = torch.arange(1, len(r), device=h.device)
    stop = torch.where(torch.rand_like(h) <= h, nodes, 0).amax()
    law = laws.index_select(0, stop.view(1))[0]
    noise = torch.empty_like(law).exponential_()
    return stop, (law / noise).argmax()


TORCH_CHAINS = {"torch": torch_chain, "torch_block": torch_block_chain}


def make_verifier(each: Inputs, backend: str) -> Verifier:
    return Verifier(each.tree, each.logits.shape[0], each.logits.shape[2], each.rule, "cuda", backend)


def rotating(inputs: list[Inputs], backend: str) -> Callable[[], object]:
    """A call that verifies the next of several inputs; nothing is made between launches."""
    verifiers = [make_verifier(each, backend) for each in inputs]
    state = {"next": 0}

    def call():
        index = state["next"] % len(inputs)
        state["next"] += 1
        each = inputs[index]
        verifiers[index](each.logits, each.tokens, each.sampling, each.positions, each.draft_logits)

    return call


def flashinfer_chain(each: Inputs) -> Callable[[], object] | None:
    """FlashInfer's chain sampling with the softmaxes it needs, where it is installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    from flashinfer.sampling import chain_speculative_sampling

    drafted = each.tokens[:, 1:].int()
    return lambda: chain_speculative_sampling(
        torch.softmax(each.draft_logits, -1), drafted, torch.softmax(each.logits, -1)
    )


def measure(setup: Setup) -> list[dict]:
    """Rows ``verify/<tree>/V<vocabulary>/<sampling>/<backend>`` and the parts of the fused launch."""
    launch = empty_kernel()
    rows = [result_row("ceiling/empty_kernel", Timing(launch, launch, launch))]
    samples = 20 if setup.quick else 60
    for vocab_size in VOCABULARIES:
        for tree_name, tree in TREES.items():
            for params_name, params in PARAMS.items():
                read = (tree.num_nodes + (len(tree.inner) if params_name != "greedy" else 0)) * vocab_size * 4
                rotation = max(1, min(MAX_ROTATION, ROTATION_BYTES // read))
                inputs = [make_inputs(tree, vocab_size, params, seed) for seed in range(rotation)]
                # Compiling takes longer than measuring: quick runs compile for the chain of five alone.
                compiled = not setup.quick or (tree_name == "chain5" and vocab_size == VOCABULARIES[0])
                backends = ("cuda", "triton") if compiled else ("cuda",)
                calls = {backend: rotating(inputs, backend) for backend in backends}
                if compiled and tree.is_chain and params_name == "temperature":
                    calls |= _chain_baselines(inputs[0])
                name = f"verify/{tree_name}/V{vocab_size}/{params_name}"
                launches = dict.fromkeys(calls, LAUNCHES) | {"cuda": CUDA_LAUNCHES}
                timings = interleaved(calls, launches, samples)
                for baseline in TORCH_CHAINS:
                    if f"{baseline}_graph" in calls:
                        timings[f"{baseline}_eager"] = time_eager(calls[f"{baseline}_graph"])
                floor = launch + read / setup.read_bandwidth * 1e6
                others = {other: timing for other, timing in timings.items() if other not in backends}
                rows += [
                    result_row(f"{name}/{backend}", timings[backend], floor, others) for backend in backends
                ]
                rows += [
                    result_row(f"baseline/{tree_name}/V{vocab_size}/{other}", timing)
                    for other, timing in others.items()
                ]
                if tree_name in ("chain5", "tree64") and vocab_size == VOCABULARIES[0]:
                    rows += _parts(name, inputs)
    return rows


def _chain_baselines(each: Inputs) -> dict[str, Callable[[], object]]:
    arguments = (each.logits, each.draft_logits, each.tokens, 1.0)
    calls: dict[str, Callable[[], object]] = {}
    for name, function in TORCH_CHAINS.items():
        compiled = torch.compile(function, dynamic=False)
        compiled(*arguments)
        calls[f"{name}_graph"] = partial(function, *arguments)
        calls[f"{name}_compile_graph"] = partial(compiled, *arguments)
    flashinfer = flashinfer_chain(each)
    return calls if flashinfer is None else {**calls, "flashinfer_graph": flashinfer}


def _parts(name: str, inputs: list[Inputs]) -> list[dict]:
    """Where the time inside a launch goes, by the clock of its first thread."""
    marks = []
    for each in inputs:
        verifier = make_verifier(each, "cuda")
        verifier.clock = torch.zeros(len(PARTS) + 1, dtype=torch.int64, device="cuda")
        for _ in range(20):
            verifier(each.logits, each.tokens, each.sampling, each.positions, each.draft_logits)
        torch.cuda.synchronize()
        for _ in range(20):
            verifier(each.logits, each.tokens, each.sampling, each.positions, each.draft_logits)
            marks.append(verifier.clock.clone())
    cycles = torch.stack(marks).diff(dim=1).double().cpu()
    megahertz = clock_megahertz()
    timings = []
    for part in range(len(PARTS)):
        p10, median, p90 = (cycles[:, part].quantile(q).item() / megahertz for q in (0.1, 0.5, 0.9))
        timings.append(Timing(median, p10, p90))
    return [
        result_row(f"parts/{name.removeprefix('verify/')}/{part}", timing)
        for part, timing in zip(PARTS, timings, strict=True)
    ]


def plot(rows: list[dict], path: Path) -> None:
    """Bars per tree and kind of sampling, in microseconds."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [row for row in rows if row["name"].startswith("verify/") and row["name"].endswith("/cuda")]
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(chosen) + 1.2))
    labels = [row["name"].removeprefix("verify/").removesuffix("/cuda") for row in chosen]
    axes.barh(labels, [row["us"] for row in chosen], color="#3b6ea8")
    axes.invert_yaxis()
    axes.bar_label(axes.containers[0], fmt="%.1f", padding=2)
    axes.set_xlabel("microseconds in a CUDA graph")
    axes.set_title("One launch: logits of all tree nodes to accepted path and next token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
