"""A whole generation as one launch says what cycles launched one by one say, and can be read along and ended."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import gpu_pair, requests_on, texts, texts_on_streams, tiny_llama, tiny_llava

from fastspec import DraftTree, SpeculativeDecoder
from fastspec.runtime import loop
from fastspec.runtime.loop import Mailbox, loop_obstacle
from fastspec.sampling import SamplingParams
from fastspec.state import FinishReason

TREE = DraftTree.from_children([[1, 2, 3], [4, 5], [6], [], [7], [], [], []])
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.9)
gpu = pytest.mark.gpu


def read_number(mailbox):
    """What reads the device's count in a mailbox that is not pinned."""
    return lambda address: int(mailbox().published)


def mailbox(cycles=4, shape=(1, 2)):
    made = []
    made.append(Mailbox(cycles, shape, read_number(lambda: made[0]), pin_memory=False))
    return made[0]


class HostLoop:
    """Does what csrc/loop.cu does, a cycle whenever a report is asked for."""

    def __init__(self, decoder):
        self.decoder, self.launches, self.ends, self.running = decoder, [], 0, False
        self.mailbox = mailbox(decoder.capacity, tuple(decoder.state.report.shape))

    def launch(self, cycles):
        self.mailbox.open(cycles)
        self.launches.append(cycles)
        self.running = True

    def pop(self):
        if self.running:
            self._turn()
        return self.mailbox.pop(lambda: not self.running)

    def _turn(self):
        state, box = self.decoder.state, self.mailbox
        self.decoder._cycle()
        asked = (box.control[1:] != 0) & (state.reason == FinishReason.RUNNING)
        state.reason[asked] = int(FinishReason.STOPPED)
        turn = int(box.published)
        box.reports[turn] = state.report
        box.published += 1
        self.running = bool((state.reason == FinishReason.RUNNING).any()) and turn + 1 < int(box.control[0])

    def stop(self, row):
        self.mailbox.control[1 + row] = 1

    def end(self):
        self.mailbox.control[0] = 0
        self.running = False
        self.ends += 1


def looping(decoder):
    """The decoder with its loop on the host."""
    decoder.launch, decoder._loop = "loop", HostLoop(decoder)
    decoder._check_launch = lambda: None
    return decoder


@pytest.fixture
def pair():
    return tiny_llava(), tiny_llama()


def ragged(target, batch, params, tokens=20):
    requests = requests_on(target, batch, params, tokens)
    return [
        replace(request, max_new_tokens=max(1, request.max_new_tokens - 6 * row))
        for row, request in enumerate(requests)
    ]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_launch_makes_the_same_text(pair, batch, params):
    decoder = SpeculativeDecoder(*pair, gamma=3, batch_size=batch)
    requests = ragged(pair[0], batch, params)
    expected, record = texts(decoder, requests), decoder.record()
    looping(decoder)
    assert texts(decoder, requests) == expected
    assert decoder.record() == record
    assert decoder._loop.launches == [19]
    assert decoder._loop.ends == 2  # before the prefill and after the last token


def test_what_the_prefill_ends_needs_no_launch(pair):
    decoder = looping(SpeculativeDecoder(*pair, gamma=3))
    (request,) = requests_on(pair[0], 1, GREEDY, 1)
    assert len(texts(decoder, [request])[0]) == 1
    assert decoder._loop.launches == []


def test_abandoning_ends_the_loop(pair):
    decoder = looping(SpeculativeDecoder(*pair, gamma=3))
    requests = requests_on(pair[0], 1, SAMPLED)
    expected = texts(decoder, requests)
    for commitments in range(1, 4):
        stream = decoder.stream(requests)
        for _ in range(commitments):
            next(stream)
        stream.close()
        assert not decoder._loop.running
        assert texts(decoder, requests) == expected


def test_letting_go_of_an_older_stream_leaves_the_loop_alone(pair):
    decoder = looping(SpeculativeDecoder(*pair, gamma=3))
    requests = requests_on(pair[0], 1, SAMPLED)
    expected = texts(decoder, requests)
    old, new = decoder.stream(requests), decoder.stream(requests)
    answer = []
    for stream in (old, old, new, new):
        commitment = next(stream)
        answer += commitment.tokens[0] if stream is new else []
    old.close()
    assert decoder._loop.running
    for commitment in new:
        answer += commitment.tokens[0]
    assert [answer] == expected


def test_a_sequence_that_is_stopped_leaves_the_other_alone(pair):
    decoder = looping(SpeculativeDecoder(*pair, gamma=3, batch_size=2))
    requests = requests_on(pair[0], 2, SAMPLED, 40)
    expected = texts(decoder, requests)
    assert check_stopping(decoder, requests, expected) == [FinishReason.STOPPED, FinishReason.LENGTH]
    assert decoder._loop.mailbox.control[1:].tolist() == [1, 0], "a GPU would not hear of the stop in time"


def check_stopping(decoder, requests, expected):
    """Stops the first of two sequences after two cycles; returns the reasons for which they end."""
    answers = [[], []]
    for number, commitment in enumerate(decoder.stream(requests)):
        for answer, tokens in zip(answers, commitment.tokens, strict=True):
            answer += tokens
        if number == 2:
            decoder.stop(0)
    assert len(answers[0]) < len(expected[0])
    assert answers[0] == expected[0][: len(answers[0])]
    assert answers[1] == expected[1]
    return list(decoder.record().finish_reasons)


def test_reports_are_read_in_order_once_they_have_come():
    box = mailbox()
    box.open(3)
    waits = iter([1, 0, 2, 0, 0])

    def arriving():
        for _ in range(next(waits)):
            box.reports[int(box.published)] = int(box.published) + 7
            box.published += 1
        return False

    assert [box.pop(arriving) for _ in range(3)] == [[[7, 7]], [[8, 8]], [[9, 9]]]
    box.open(3)
    assert box.control.tolist() == [3, 0]
    assert int(box.published) == 0


def test_a_loop_that_ended_without_a_report_is_an_error():
    box = mailbox()
    box.open(2)

    def ended_after_one():
        box.published.fill_(1)
        return True

    assert box.pop(ended_after_one) == [[0, 0]]  # published between the look and the end
    with pytest.raises(RuntimeError, match="ended after 1 cycles"):
        box.pop(ended_after_one)


def test_a_device_that_failed_is_an_error():
    def failed():
        raise RuntimeError("an illegal memory access was encountered")

    box = mailbox()
    box.open(1)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        box.pop(failed)


def test_a_mailbox_is_in_host_memory_whatever_the_default_device():
    with torch.device("meta"):
        box = mailbox()
    assert {one.device.type for one in (box.reports, box.published, box.control)} == {"cpu"}


@pytest.mark.parametrize("cycles", [0, 5])
def test_a_launch_has_as_many_cycles_as_slots(cycles):
    with pytest.raises(ValueError, match=f"1 to 4 cycles, got {cycles}"):
        mailbox(4).open(cycles)


def test_an_unknown_way_to_launch(pair):
    with pytest.raises(ValueError, match="launch must be 'ahead' or 'loop', got 'once'"):
        SpeculativeDecoder(*pair, launch="once")


def test_without_a_gpu_there_is_no_loop(pair):
    with pytest.raises(ValueError, match="launch='loop' cannot run here: the target is on cpu, not on a GPU"):
        SpeculativeDecoder(*pair, launch="loop")


def test_a_loop_is_as_far_ahead_as_it_is(pair):
    decoder = looping(SpeculativeDecoder(*pair, gamma=2))
    with pytest.raises(ValueError, match="as far as it can, got ahead=1"):
        next(decoder.stream(requests_on(pair[0], 1, GREEDY), ahead=1))


@pytest.mark.parametrize(
    ("cuda", "driver", "reason"),
    [
        (13000, 13000, None),
        (12040, 12040, None),
        (12030, 13000, "the kernels were built with CUDA 12.3, and it takes 12.4"),
        (12080, 12020, "the driver knows CUDA 12.2, and it takes 12.4"),
    ],
)
def test_what_a_loop_takes(monkeypatch, cuda, driver, reason):
    module = SimpleNamespace(cuda_version=cuda, driver_version=lambda: driver)
    monkeypatch.setattr(loop, "extension", lambda: module)
    assert loop_obstacle() == reason


def test_a_loop_takes_the_kernels(monkeypatch):
    def missing():
        raise ImportError("left out by FASTSPEC_CUDA=0")

    monkeypatch.setattr(loop, "extension", missing)
    assert loop_obstacle() == "fastspec is installed without its CUDA kernels: left out by FASTSPEC_CUDA=0"


# On the GPU.


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tree", [DraftTree.chain(3), TREE])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_device_repeats_what_the_host_would_launch(batch, tree, params, dtype):
    target, draft = gpu_pair(dtype)
    ahead = SpeculativeDecoder(target, draft, tree=tree, batch_size=batch)
    repeated = SpeculativeDecoder(target, draft, tree=tree, batch_size=batch, launch="loop")
    for tokens in (1, 2, 60):
        requests = ragged(target, batch, params, tokens)
        expected = texts(ahead, requests)
        assert texts(repeated, requests) == expected
        assert texts(repeated, requests) == expected
        assert repeated.record() == ahead.record()
    assert repeated._loop is not None


@gpu
def test_plain_decoding_in_a_loop():
    target, _ = gpu_pair(torch.bfloat16)
    requests = requests_on(target, 1, SAMPLED, 80)
    expected = texts(SpeculativeDecoder(target, None), requests)
    assert texts(SpeculativeDecoder(target, None, launch="loop"), requests) == expected


@gpu
def test_an_end_of_sequence_ends_the_loop():
    target, draft = gpu_pair(torch.bfloat16)
    decoder = SpeculativeDecoder(target, draft, gamma=3, launch="loop")
    (request,) = requests_on(target, 1, SAMPLED, 100)
    (text,) = texts(decoder, [replace(request, eos_token_ids=())])
    eos = text[50]
    (cut,) = texts(decoder, [replace(request, eos_token_ids=(eos,))])
    assert cut == text[: text.index(eos) + 1]
    assert decoder.record().finish_reasons == (FinishReason.EOS,)
    assert int(decoder._loop._mailbox.published) == decoder.record().cycles[0]


@gpu
def test_an_abandoned_loop_ends_and_leaves_the_decoder_usable():
    target, draft = gpu_pair()
    decoder = SpeculativeDecoder(target, draft, gamma=3, launch="loop")
    requests = [replace(request, eos_token_ids=()) for request in requests_on(target, 1, SAMPLED, 220)]
    expected = texts(decoder, requests)
    needed = decoder.record().cycles[0]
    for commitments in range(1, 4):
        stream = decoder.stream(requests)
        for _ in range(commitments):
            next(stream)
        stream.close()
        assert decoder._loop._done.query()
        if commitments > 1:
            assert int(decoder._loop._mailbox.published) < needed, "the loop ran on to its end"
        assert texts(decoder, requests) == expected


@gpu
def test_a_loop_stops_one_sequence_of_two():
    target, draft = gpu_pair()
    decoder = SpeculativeDecoder(target, draft, gamma=3, batch_size=2, launch="loop")
    requests = [replace(request, eos_token_ids=()) for request in requests_on(target, 2, SAMPLED, 220)]
    expected = texts(decoder, requests)
    assert check_stopping(decoder, requests, expected) == [FinishReason.STOPPED, FinishReason.LENGTH]
    committed = decoder.record().committed
    assert committed[0] < committed[1], "the device did not hear of the stop"


@gpu
def test_a_loop_has_no_place_for_a_hook():
    target, draft = gpu_pair()
    decoder = SpeculativeDecoder(target, draft, gamma=3, launch="loop")
    decoder.logits_hook = lambda state, tree, logits: logits
    with pytest.raises(ValueError, match="a logits hook needs the host in every cycle"):
        next(decoder.stream(requests_on(target, 1, GREEDY)))


@gpu
def test_loops_leak_nothing():
    target, draft = gpu_pair(torch.bfloat16)
    decoder = SpeculativeDecoder(target, draft, gamma=3, launch="loop")
    requests = requests_on(target, 1, SAMPLED, 200)
    expected = texts(decoder, requests)
    torch.cuda.synchronize()
    allocated, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    for _ in range(100):
        assert texts(decoder, requests) == expected
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert free - torch.cuda.mem_get_info()[0] < 2**21


@gpu
def test_loops_on_two_streams_leave_each_other_alone():
    pairs = [gpu_pair(), gpu_pair(torch.bfloat16)]
    decoders = [SpeculativeDecoder(*pair, gamma=3, launch="loop") for pair in pairs]
    requests = [requests_on(pair[0], 1, SAMPLED, 100) for pair in pairs]
    expected = [texts(decoder, one) for decoder, one in zip(decoders, requests, strict=True)]
    torch.cuda.synchronize()
    assert texts_on_streams(decoders, requests) == expected
