"""How long does the draft's own sampling take in a captured cycle?"""

from __future__ import annotations

import torch

from bench.ceilings import empty_kernel
from bench.report import result_row
from bench.setup import Setup
from bench.timing import Timing, interleaved
from bench.verify import PARAMS, VOCABULARIES
from fastspec import DraftTree
from fastspec.ops import Proposer
from fastspec.sampling import SamplingTensors
from fastspec.verification import Rule

LEVELS = {
    "chain": (DraftTree.chain(5), 0),
    "fork4": (DraftTree.kary((4,)), 0),
    "rows12x4": (DraftTree.kary((3, 4, 4)), 2),
}


def measure(setup: Setup) -> list[dict]:
    """Rows ``propose/<level>/V<vocabulary>/<sampling>/<backend>``: one level of the tree each."""
    launch = empty_kernel()
    rows = [result_row("ceiling/empty_kernel", Timing(launch, launch, launch))]
    for vocab_size in VOCABULARIES:
        for level_name, (tree, level) in LEVELS.items():
            for params_name, params in PARAMS.items():
                count = len(tree.levels[level])
                logits = torch.randn(1, count, vocab_size, device="cuda") * 4
                sampling = SamplingTensors(1, vocab_size, "cuda")
                sampling.set(0, params, 1)
                positions = torch.tensor([640], device="cuda")
                tokens = torch.zeros(1, tree.num_nodes, dtype=torch.int64, device="cuda")
                draft_logits = torch.zeros(1, len(tree.inner), vocab_size, device="cuda")
                rule = Rule.BLOCK if tree.is_chain else Rule.RECURSIVE_REJECTION

                def call(
                    backend,
                    tree=tree,
                    level=level,
                    rule=rule,
                    inputs=(logits, tokens, draft_logits, sampling, positions),
                ):
                    proposer = Proposer(tree, 1, inputs[0].shape[2], rule, "cuda", backend)
                    logits, tokens, draft_logits, sampling, positions = inputs
                    return lambda: proposer(logits, level, tokens, draft_logits, sampling, positions)

                calls = {
                    "cuda": call("cuda"),
                    "triton": call("triton"),
                    "torch_graph": lambda logits=logits: (
                        torch.softmax(logits, -1).div_(torch.empty_like(logits).exponential_()).topk(4)
                    ),
                }
                timings = interleaved(calls, repeats=32, samples=20 if setup.quick else 60)
                floor = launch + 2 * count * vocab_size * 4 / setup.read_bandwidth * 1e6
                others = {"torch_graph": timings["torch_graph"]} if params_name == "temperature" else {}
                name = f"propose/{level_name}/V{vocab_size}/{params_name}"
                rows += [
                    result_row(f"{name}/{backend}", timings[backend], floor, others)
                    for backend in ("cuda", "triton")
                ]
    return rows
