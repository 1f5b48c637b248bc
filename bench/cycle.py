"""How long does a whole cycle take, where does its time go, and what does speculation gain at any acceptance?"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from bench.baselines import transformers_cycle
from bench.report import result_row
from bench.setup import Setup, kv_bytes
from bench.timing import Timing, elapsed, interleaved, summary, time_graph
from fastspec.decoder import Request, SpeculativeDecoder
from fastspec.metrics import memory_bound_speedup
from fastspec.model.vision import text_stack
from fastspec.runtime import loop_obstacle
from fastspec.sampling import SamplingParams

GAMMA = 5
AGREEMENTS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
#: The acceptance at which a cycle and its parts are timed.
TYPICAL = 0.75
SAMPLING = {"greedy": SamplingParams(temperature=0.0), "temperature": SamplingParams(temperature=1.0)}
#: Cycles launched ahead between two events, and before them.
CYCLES, WARM_UP = 12, 3


def measure(setup: Setup) -> list[dict]:
    """Rows ``cycle/``, ``loop/``, ``host/``, ``parts/``, ``plain/`` and ``speedup/``; see the functions below."""
    rows = []
    for batch_size in (1,) if setup.quick else (1, 8):
        rows += _cycle_rows(setup, batch_size)
    return rows + _speedup_rows(setup)


def _cycle_rows(setup: Setup, batch_size: int) -> list[dict]:
    """A cycle beside its floor, the same repeated by the device, the host's share, and its parts one by one.

    What the parts do not explain is ``parts/.../gaps``. Beside one sequence stand the passes of transformers' modules
    in a graph, without anything between them.
    """
    shape = f"batch{batch_size}/ctx{setup.context}"
    decoder = _decoder(setup, TYPICAL, batch_size)
    plain = _decoder(setup, None, batch_size)
    cycle, host = _time_cycles(setup, decoder)
    token, _ = _time_cycles(setup, plain)

    pass_bytes = decoder.target.num_bytes + batch_size * kv_bytes(decoder.target, setup.context)
    drafter = decoder.draft.transformer
    text = setup.context - setup.target_model.config.image_seq_length
    draft_bytes = drafter.num_bytes + batch_size * kv_bytes(drafter, text)
    num_bytes = {"draft": GAMMA * draft_bytes, "pass": pass_bytes}

    name = f"{setup.pair}/chain{GAMMA}/{shape}"
    total = sum(num_bytes.values())
    others, rows = {"plain_token": token}, []
    if batch_size == 1:
        others["transformers_graph"] = _transformers_cycle(setup, text)
        rows.append(result_row(f"baseline/cycle/{name}", others["transformers_graph"], unit="ms"))
    if _loops(setup):
        repeated, _ = _time_cycles(setup, _decoder(setup, TYPICAL, batch_size, "loop"))
        rows.append(result_row(f"loop/{name}", repeated, others={"ahead": cycle}, unit="ms"))
    rows += [
        result_row(f"cycle/{name}", cycle, setup.floor(total), others, unit="ms", num_bytes=total),
        result_row(f"host/{name}", host),
        result_row(
            f"plain/{setup.target}/{shape}", token, setup.floor(pass_bytes), unit="ms", num_bytes=pass_bytes
        ),
    ]
    with torch.no_grad():
        parts = interleaved(_parts(decoder), repeats=2, samples=setup.samples)
    for part, timing in parts.items():
        size = num_bytes.get(part)
        floor = None if size is None else setup.floor(size)
        rows.append(result_row(f"parts/{name}/{part}", timing, floor, num_bytes=size))
    gaps = cycle.median - sum(timing.median for timing in parts.values())
    return [*rows, result_row(f"parts/{name}/gaps", Timing(gaps, gaps, gaps))]


def _speedup_rows(setup: Setup) -> list[dict]:
    """Wall-clock time per token, by acceptance and kind of sampling, beside plain decoding and the MBSU.

    Rows ``loop/`` are the same generations as one launch each, beside cycles launched ahead.
    """
    sampling = {"greedy": SAMPLING["greedy"]} if setup.quick else SAMPLING
    plain_decoder = _decoder(setup, None)
    plain = {kind: _time_tokens(setup, plain_decoder, params)[0] for kind, params in sampling.items()}
    transformers = {"transformers_generate": _transformers_token(setup)}
    rows = [
        result_row(
            f"speedup/{setup.pair}/plain/{kind}",
            timing,
            others=transformers if kind == "greedy" else None,
            unit="ms",
        )
        for kind, timing in plain.items()
    ]
    looped = _decoder(setup, TYPICAL, launch="loop") if _loops(setup) else None
    for agreement in (0.0, TYPICAL, 1.0) if setup.quick else AGREEMENTS:
        decoder = _decoder(setup, agreement)
        for kind, params in sampling.items():
            timing, tau = _time_tokens(setup, decoder, params)
            name = f"{setup.pair}/chain{GAMMA}/agreement{agreement:g}/{kind}"
            mbsu = memory_bound_speedup(tau, decoder.draft.num_bytes / decoder.target.num_bytes, GAMMA)
            rows.append(
                result_row(
                    f"speedup/{name}",
                    timing,
                    others={"plain": plain[kind], **(transformers if kind == "greedy" else {})},
                    unit="ms",
                    tau=tau,
                    mbsu=mbsu,
                    share_of_mbsu=plain[kind].median / timing.median / mbsu,
                )
            )
            if looped is not None and agreement == TYPICAL:
                one_launch, _ = _time_tokens(setup, looped, params)
                rows.append(result_row(f"loop/{name}", one_launch, others={"ahead": timing}, unit="ms"))
    return rows


def _new_tokens(setup: Setup) -> int:
    return 1 + (GAMMA + 1) * (CYCLES + WARM_UP) if setup.quick else 256 if setup.target == "llava7b" else 128


def _loops(setup: Setup) -> bool:
    return setup.device.type == "cuda" and loop_obstacle() is None


def _decoder(
    setup: Setup, agreement: float | None, batch_size: int = 1, launch: str = "ahead"
) -> SpeculativeDecoder:
    """A decoder with a draft that agrees so much, or plain."""
    return SpeculativeDecoder(
        setup.target_model,
        None if agreement is None else setup.draft_model(agreement),
        gamma=None if agreement is None else GAMMA,
        batch_size=batch_size,
        capacity=setup.context + _new_tokens(setup),
        launch=launch,
    )


def _requests(setup: Setup, count: int, params: SamplingParams, seed: int = 0) -> list[Request]:
    return [
        Request(setup.prompt(setup.context, seed + row), _new_tokens(setup), params, seed=seed + row)
        for row in range(count)
    ]


def _time_cycles(setup: Setup, decoder: SpeculativeDecoder) -> tuple[Timing, Timing]:
    """Microseconds per cycle, launched ahead of the device or in a loop, and of the host's work for one.

    Decoding is greedy and starts anew from the same prompt for every sample, so the context stays what it says.
    """
    requests = _requests(setup, decoder.batch_size, SAMPLING["greedy"])
    cycles, host = [], []

    def several() -> None:
        begin = time.perf_counter()
        if decoder.launch == "loop":
            decoder._loop.launch(CYCLES)
        else:
            for _ in range(CYCLES):
                decoder.cycle()
        host.append((time.perf_counter() - begin) / CYCLES * 1e6)

    decoder.capture()
    for _ in range(3 if setup.quick else 12):
        decoder.prefill(requests)
        for _ in range(WARM_UP):
            decoder.cycle()
        cycles.append(elapsed(several) / CYCLES)
    return summary(cycles), summary(host)


def _transformers_cycle(setup: Setup, text: int) -> Timing:
    """Microseconds of a cycle's passes by transformers' modules; the draft's context is the text alone."""
    stacks = text_stack(setup.draft_model(TYPICAL)), text_stack(setup.target_model)
    call = transformers_cycle(*stacks, GAMMA, text, setup.context, setup.text_ids(GAMMA + 1)[None])
    with torch.no_grad():
        return time_graph(call, 2, setup.samples)


def _parts(decoder: SpeculativeDecoder) -> dict[str, Callable]:
    """The steps of a cycle, each to be repeated any number of times: the state is put back."""
    state = decoder.state
    committed = state.num_tokens.clone()

    # Once the draft has caught up, proposing again reads the same rows and moves nothing.
    decoder.draft.propose(state)
    state.num_new.zero_()
    logits = decoder._pass(state.tree_tokens, committed - 1).clone()

    def verify():
        sampling, positions = state.sampling, state.num_tokens
        return decoder._verifier(logits, state.tree_tokens, sampling, positions, state.draft_logits)

    verdict = verify()

    def commit() -> None:
        decoder._commit(verdict)
        state.num_tokens.copy_(committed)
        state.num_new.zero_()

    return {
        "draft": lambda: decoder.draft.propose(state),
        "pass": lambda: decoder._pass(state.tree_tokens, state.num_tokens - 1),
        "verify": verify,
        "commit": commit,
    }


def _time_tokens(setup: Setup, decoder: SpeculativeDecoder, params: SamplingParams) -> tuple[Timing, float]:
    """Wall-clock microseconds per token after the prefill, read by the host as they come; and τ."""
    times, committed, cycles = [], 0, 0
    for sample in range(3 if setup.quick else 6):
        stream = decoder.stream(_requests(setup, 1, params, seed=sample))
        next(stream)
        _wait()
        begin = time.perf_counter()
        deque(stream, maxlen=0)
        _wait()
        seconds = time.perf_counter() - begin
        record = decoder.record(1)
        if sample > 0:  # the first warms up
            times.append(seconds * 1e6 / record.committed[0])
            committed, cycles = committed + record.committed[0], cycles + record.cycles[0]
    return summary(times), committed / cycles


def _transformers_token(setup: Setup) -> Timing:
    """Microseconds per token of transformers' own ``generate``, its prefill taken off."""
    ids = setup.text_ids(setup.context)[None]
    count = 8 if setup.quick else 32

    def generate(new_tokens: int) -> float:
        return elapsed(
            lambda: setup.target_model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
            )
        )

    generate(count)
    return summary([(generate(1 + count) - generate(1)) / count for _ in range(3)])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
