"""What do a reduced vocabulary and int8 weights save a draft? ``python -m bench.compact``, on a GPU or a CPU.

What is timed is all that a draft of 115 M does in one cycle: it catches up with the committed tokens, drafts a chain of
five and samples its tokens. On a CPU in bfloat16, one thread; on a GPU in a CUDA graph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from bench.report import header, print_table, result_row, write
from bench.shapes import draft_config, target_config
from bench.timing import interleaved
from fastspec.draft import CompactLlamaForCausalLM, make_draft
from fastspec.model.vision import Prompt
from fastspec.sampling import SamplingParams
from fastspec.state import DecodeState
from fastspec.tree import DraftTree
from fastspec.verification import Rule

GAMMA, CONTEXT = 5, 64
KEPT = (16384, 8192, 4096)


def variants(name: str, device: str) -> dict[str, torch.nn.Module]:
    """The draft and its compact copies, random, by name."""
    torch.manual_seed(0)
    target = target_config("llava7b" if name == "115m" else "small")
    draft = LlamaForCausalLM(draft_config(name, target)).to(device, torch.bfloat16).eval()
    size = draft.config.vocab_size
    made = {"full": draft}
    for kept in [size, *(one for one in KEPT if one < size)]:
        for bits in (16, 8):
            if (kept, bits) != (size, 16):
                label = "/".join(
                    [*([] if kept == size else [f"vocabulary {kept}"]), *(["int8"] if bits == 8 else [])]
                )
                made[label] = CompactLlamaForCausalLM.of(draft, torch.arange(kept, device=device), bits)
    return made


def measure(models: dict[str, torch.nn.Module], device: str, temperature: float, quick: bool) -> list[dict]:
    """A row for each draft: microseconds of its share of a cycle, bytes of one of its passes."""
    tree, params = DraftTree.chain(GAMMA), SamplingParams(temperature=temperature)
    calls, sizes = {}, {}
    for name, model in models.items():
        draft, vocab_size = make_draft(model), model.config.vocab_size
        state = DecodeState(1, 2 * CONTEXT, tree, vocab_size, torch.device(device))
        draft.allocate(1, 2 * CONTEXT, tree, vocab_size, Rule.BLOCK, torch.device(device))
        ids = torch.randint(3, vocab_size // 2, (CONTEXT,), device=device)
        state.admit(0, ids, CONTEXT + GAMMA, params, params, 0, ())
        with torch.no_grad():
            draft.prefill(0, Prompt(ids))
        # Nothing new is committed, so that every call does the same work.
        state.num_new.zero_()
        calls[name] = torch.no_grad()(lambda draft=draft, state=state: draft.propose(state))
        sizes[name] = draft.num_bytes
    repeats, samples = (2, 3) if quick else (20, 40) if device == "cuda" else (3, 15)
    timings = interleaved(calls, repeats=repeats, samples=samples)
    return [
        result_row(
            f"temperature {temperature:g}/{name}",
            timing,
            num_bytes=sizes[name] * GAMMA,
            megabytes_per_pass=sizes[name] / 1e6,
            share_of_full=timing.median / timings["full"].median,
        )
        for name, timing in timings.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes ``<out or bench/results>/<gpu>/compact.json``."""
    parser = argparse.ArgumentParser(prog="python -m bench.compact", description=__doc__.partition("\n")[0])
    parser.add_argument("--draft", choices=["115m", "small"], default="115m")
    parser.add_argument("--out", type=Path, help="folder for results instead of bench/results")
    parser.add_argument("--commit", help="recorded in the header where git is not at hand")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    given = parser.parse_args(arguments)
    from bench.ceilings import read_bandwidth  # needs Triton, which measuring alone does not

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = variants(given.draft, device)
    rows = [row for heat in (0.0, 1.0) for row in measure(models, device, heat, given.quick)]
    print_table(rows)
    name = "compact" if given.draft == "115m" else f"compact-{given.draft}"
    print(f"written: {write(name, header(read_bandwidth(), given.commit), rows, given.out)}")


if __name__ == "__main__":
    main()
