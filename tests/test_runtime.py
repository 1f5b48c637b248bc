"""Cycles as a captured graph launched ahead of the host, and decoders that outlive a call of generate."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from models import (
    gpu_pair,
    noisy_clone,
    picture_inputs,
    requests_on,
    texts,
    texts_on_streams,
    tiny_llama,
    tiny_llava,
)

import fastspec
from fastspec import DraftTree, Rule, SpeculativeDecoder, generation
from fastspec.decoder import read_report
from fastspec.ops import Verifier
from fastspec.runtime import Reports, asked_memory
from fastspec.runtime.decoder_cache import DecoderCache
from fastspec.sampling import SamplingParams
from fastspec.state import FinishReason

TREE = DraftTree.from_children([[1, 2, 3], [4, 5], [6], [], [7], [], [], []])
SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.9)
gpu = pytest.mark.gpu


@pytest.fixture
def built(monkeypatch):
    """Every decoder that generate builds, with nothing kept from tests before."""
    generation._decoders.clear()
    decoders = []

    class Counted(SpeculativeDecoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            decoders.append(weakref.ref(self))

    monkeypatch.setattr(generation, "SpeculativeDecoder", Counted)
    yield decoders
    generation._decoders.clear()


def generate(target, draft, batch=1, **kwargs):
    kwargs = {"max_new_tokens": 12, "do_sample": False, "gamma": 3, **kwargs}
    inputs = {name: tensor.to(target.device) for name, tensor in picture_inputs(batch).items()}
    return fastspec.generate(target, draft=draft, **inputs, **kwargs)


def alive(references):
    gc.collect()
    return [reference for reference in references if reference() is not None]


@pytest.mark.parametrize("kind", ["text", "image", "ngram"])
def test_a_second_call_reuses_the_decoder_and_says_the_same(built, kind):
    target = tiny_llava()
    draft = {"text": tiny_llama(), "image": noisy_clone(target), "ngram": "ngram"}[kind]
    first = generate(target, draft)
    assert torch.equal(generate(target, draft), first)
    sampled = generate(target, draft, do_sample=True, temperature=2.0, seed=5)
    assert len(built) == 1
    generation._decoders.clear()
    assert torch.equal(generate(target, draft), first)
    assert torch.equal(generate(target, draft, do_sample=True, temperature=2.0, seed=5), sampled)


def test_what_a_decoder_was_built_for_decides_about_its_reuse(built):
    target, draft, other = tiny_llava(), tiny_llama(), tiny_llama(seed=7)
    generate(target, draft)
    generate(target, draft, gamma=2)
    generate(target, draft, batch=2)
    generate(target, other)
    assert len(built) == 4
    assert len(alive(built)) == 2  # the last ones


def test_one_that_became_too_small_makes_room(built):
    target, draft = tiny_llava(max_position_embeddings=512), tiny_llama(max_position_embeddings=512)
    short = generate(target, draft)
    generate(target, draft, max_new_tokens=300, min_new_tokens=300)
    assert len(built) == 2
    assert len(alive(built)) == 1
    assert torch.equal(generate(target, draft), short)
    assert len(built) == 2
    fastspec.clear_decoders()
    assert not alive(built)


def test_a_processor_of_one_call_is_not_in_the_next(built):
    target, draft = tiny_llava(), tiny_llama()
    plain = generate(target, draft)

    def only_nine(input_ids, scores):
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([9]), 0.0)

    assert (generate(target, draft, logits_processor=[only_nine])[0, -12:] == 9).all()
    assert torch.equal(generate(target, draft), plain)
    assert len(built) == 1


def test_weights_that_moved_are_found_again(built):
    target, draft = tiny_llava(), tiny_llama()
    before = generate(target, draft)
    with torch.no_grad():
        target.lm_head.weight.neg_()  # in place: the decoder sees it
        changed = generate(target, draft)
        target.lm_head.weight.data = target.lm_head.weight.neg()
    assert not torch.equal(changed, before)
    assert torch.equal(generate(target, draft), before)
    assert len(built) == 2


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("dies", ["target", "draft"])
def test_a_decoder_goes_with_either_of_its_models(built, dies, image):
    models = {"target": tiny_llava(), "draft": tiny_llava(seed=4) if image else tiny_llama()}
    generate(models["target"], models["draft"])
    assert len(alive(built)) == 1
    model = weakref.ref(models.pop(dies))
    assert not alive([model])
    assert not alive(built)


def test_a_decoder_in_use_does_not_come_back_when_another_goes():
    cache, target, draft, dying = DecoderCache(), tiny_llava(), tiny_llama(), tiny_llama()
    used, other = (SimpleNamespace(draft=None, logits_hook=None) for _ in range(2))
    cache.give_back(target, draft, "shape", used)
    cache.give_back(target, dying, "shape", other)
    taken = []

    class Contested(list):
        """Another thread takes the first entry as soon as this one has looked at all."""

        def __iter__(self):
            yield from super().__iter__()
            taken.append(self.pop(0).decoder)

    cache._entries[target] = kept = Contested(cache._entries[target])
    del dying
    gc.collect()
    assert taken == [used]
    assert kept[:] == []


def test_a_call_that_fails_leaves_a_usable_decoder(built):
    target, draft = tiny_llava(), tiny_llama()
    expected = generate(target, draft)

    class Broken:
        calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt

        def end(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        generate(target, draft, streamer=Broken())
    assert torch.equal(generate(target, draft), expected)
    assert len(built) == 1


def test_a_draft_of_the_users_own_is_not_shared(built):
    target = tiny_llava()
    draft = fastspec.draft.TextDraft(tiny_llama())
    expected = generate(target, draft)
    generate(target, draft, gamma=2)
    assert torch.equal(generate(target, draft), expected)
    assert len(built) == 3


def test_a_decoder_made_in_inference_mode_serves_outside_of_it(built):
    target, draft = tiny_llava(), tiny_llama()
    with torch.inference_mode():
        inside = generate(target, draft)
    assert torch.equal(generate(target, draft), inside)
    with torch.inference_mode():
        assert torch.equal(generate(target, draft), inside)
    assert len(built) == 1


def test_one_draft_serves_two_decoders():
    target, draft = tiny_llava(), fastspec.draft.TextDraft(tiny_llama())
    requests = requests_on(target, 1, SAMPLED)
    first = SpeculativeDecoder(target, draft, gamma=3)
    expected = texts(first, requests)
    other = SpeculativeDecoder(target, draft, gamma=2)
    stream, answer = first.stream(requests), []
    for commitment in stream:
        answer += commitment.tokens[0]
        other.prefill(requests)
        other.cycle()
    assert [answer] == expected


def test_a_stream_cannot_go_on_once_another_has_begun():
    target = tiny_llava()
    decoder = SpeculativeDecoder(target, tiny_llama(), gamma=3)
    requests = requests_on(target, 1, SAMPLED)
    expected = texts(decoder, requests)
    old, new = decoder.stream(requests_on(target, 1, SAMPLED, first_seed=9)), decoder.stream(requests)
    next(old)
    answer = next(new).tokens[0]
    with pytest.raises(RuntimeError, match="another generation has begun on this decoder"):
        next(old)
    for commitment in new:
        answer += commitment.tokens[0]
    assert [answer] == expected


def test_tables_of_a_tree_live_as_long_as_what_reads_them():
    tree = DraftTree.from_children([[1, 2], [3], [], []])
    verifier = Verifier(tree, 1, 8, Rule.RECURSIVE_REJECTION, "cpu")
    table = weakref.ref(tree.on("cpu").table)
    for gamma in range(1, 100):
        DraftTree.chain(gamma).on("cpu")
    gc.collect()
    assert table() is verifier._tables.table


@pytest.mark.parametrize("ahead", [0, 3])
def test_how_far_ahead_is_limited(ahead):
    decoder = SpeculativeDecoder(tiny_llava(), tiny_llama(), gamma=2)
    with pytest.raises(ValueError, match=f"ahead must be 1 to 2, got {ahead}"):
        next(decoder.stream(requests_on(tiny_llava(), 1, SAMPLED), ahead=ahead))


def test_what_a_replay_leaves_is_what_the_cycle_left():
    """Replaying must not leave the prefill's logits behind; a stand-in for the graph runs the cycle's captured work."""
    target = tiny_llava()
    decoder = SpeculativeDecoder(target, tiny_llama(), gamma=3)
    decoder.prefill(requests_on(target, 1, SAMPLED))
    decoder._cycle()
    results = decoder.last_logits, decoder.last_path
    decoder._graph, decoder._graph_results = type("Graph", (), {"replay": lambda self: None})(), results
    decoder.prefill(requests_on(target, 1, SAMPLED))
    assert decoder.last_logits.shape[1] == 1
    decoder.cycle()
    assert (decoder.last_logits, decoder.last_path) == results


def test_a_report_is_read():
    commitment = read_report([[2, 1, FinishReason.RUNNING, 7, 8, 0], [0, 0, FinishReason.EOS, 5, 5, 5]])
    assert commitment.tokens == [[7, 8], []]
    assert commitment.num_drafted == [1, 0]
    assert commitment.reasons == [FinishReason.RUNNING, FinishReason.EOS]


def test_reports_come_in_order():
    report = torch.zeros(1, 4, dtype=torch.int64)
    reports = Reports(report, 1)
    for value in range(3):
        report.fill_(value)
        reports.push()
        assert len(reports) == 1
        assert reports.pop() == [[value] * 4]
    assert len(reports) == 0


# On the GPU.


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tree", [DraftTree.chain(3), TREE])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_a_captured_cycle_says_what_the_cycle_says(batch, tree, params, dtype):
    target, draft = gpu_pair(dtype)
    decoder = SpeculativeDecoder(target, draft, tree=tree, batch_size=batch)
    assert decoder.capturable
    requests = requests_on(target, batch, params)
    captured = texts(decoder, requests)
    assert decoder._graph is not None
    for ahead in (1, 2):
        assert texts(decoder, requests, ahead=ahead) == captured
    decoder._graph = None
    decoder.capture = lambda: None
    assert texts(decoder, requests) == captured


@gpu
@pytest.mark.parametrize("tree", [DraftTree.chain(5), TREE])
def test_greedy_speculation_is_plain_decoding_bit_for_bit_in_bfloat16(tree):
    target, draft = gpu_pair(torch.bfloat16)
    for batch in (1, 8):
        requests = requests_on(target, batch, SamplingParams(temperature=0.0), 100)
        plain = texts(SpeculativeDecoder(target, None, batch_size=batch), requests)
        assert texts(SpeculativeDecoder(target, draft, tree=tree, batch_size=batch), requests) == plain
        itself = copy.deepcopy(target)
        assert texts(SpeculativeDecoder(target, itself, tree=tree, batch_size=batch), requests) == plain


@gpu
def test_logits_that_are_returned_are_those_of_each_token():
    target, draft = gpu_pair()
    wanted = {"return_dict_in_generate": True, "output_logits": True, "batch": 2}
    ours = generate(target, draft, **wanted)
    theirs = generate(target.cpu(), draft.cpu(), **wanted)
    assert torch.equal(ours.sequences.cpu(), theirs.sequences)
    for one, other in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)


@gpu
def test_one_graph_serves_other_prompts_lengths_and_ways_of_sampling():
    target, draft = gpu_pair()
    decoder = SpeculativeDecoder(target, draft, gamma=3, batch_size=2)
    graphs = set()
    for tokens, params in (
        (5, SamplingParams(temperature=0.0)),
        (30, SAMPLED),
        (17, SamplingParams(temperature=1.3, repetition_penalty=1.2, min_tokens=30)),
    ):
        for batch in (1, 2):
            requests = requests_on(target, batch, params, tokens, first_seed=tokens)
            fresh = SpeculativeDecoder(target, draft, gamma=3, batch_size=2)
            fresh.capture = lambda: None
            assert texts(decoder, requests) == texts(fresh, requests)
            graphs.add(id(decoder._graph))
    assert len(graphs) == 1


@gpu
def test_an_abandoned_stream_leaves_the_decoder_usable():
    target, draft = gpu_pair()
    decoder = SpeculativeDecoder(target, draft, gamma=3)
    requests = requests_on(target, 1, SAMPLED)
    expected = texts(decoder, requests)
    for commitments in range(1, 4):
        stream = decoder.stream(requests)
        for _ in range(commitments):
            next(stream)
        stream.close()
        assert texts(decoder, requests) == expected


@gpu
@pytest.mark.parametrize("launch", ["ahead", "loop"])
def test_a_default_device_of_the_users_own_changes_nothing(launch):
    target, draft = gpu_pair()
    requests = requests_on(target, 1, SAMPLED)
    expected = texts(SpeculativeDecoder(target, draft, gamma=3), requests)
    with torch.device("cuda"):  # as after torch.set_default_device("cuda")
        assert texts(SpeculativeDecoder(target, draft, gamma=3, launch=launch), requests) == expected


@gpu
def test_replays_allocate_nothing():
    target, draft = gpu_pair(torch.bfloat16)
    decoder = SpeculativeDecoder(target, draft, gamma=3)
    decoder.capture()
    decoder.prefill(requests_on(target, 1, SAMPLED))
    decoder.cycle()  # lets go of the prefill's logits
    gc.collect()  # what earlier tests left must not go meanwhile
    torch.cuda.synchronize()
    allocated, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    for _ in range(10_000):
        decoder.cycle()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert free - torch.cuda.mem_get_info()[0] < 2**21
    assert decoder.poll().reasons != [FinishReason.RUNNING]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_on_two_streams_leave_each_other_alone(dtype):
    pairs = [gpu_pair(dtype), (tiny_llava(seed=5).to("cuda"), tiny_llama(seed=6).to("cuda"))]
    decoders = [SpeculativeDecoder(*pair, gamma=3) for pair in pairs]
    requests = [requests_on(pair[0], 1, SAMPLED, 60) for pair in pairs]
    expected = [texts(decoder, one) for decoder, one in zip(decoders, requests, strict=True)]
    torch.cuda.synchronize()
    assert texts_on_streams(decoders, requests) == expected


@gpu
def test_memory_that_is_not_there_is_asked_for_and_given_back():
    target, draft = gpu_pair(torch.bfloat16)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with (
            pytest.raises(MemoryError, match=r"asked for .* GiB are free; a smaller capacity"),
            asked_memory(torch.device("cuda:0")),
        ):
            torch.empty(2**30, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_allocated() == before
    assert len(texts(SpeculativeDecoder(target, draft, gamma=2), requests_on(target, 1, SAMPLED))) == 1


@gpu
def test_a_processor_on_the_host_runs_uncaptured_and_says_so():
    target, draft = gpu_pair()
    expected = generate(target, draft)

    def keep(input_ids, scores):
        return scores.clone()

    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph"):
        assert torch.equal(generate(target, draft, logits_processor=[keep]), expected)


@gpu
def test_invalid_logits_end_one_sequence_and_leave_the_graph_to_the_other():
    target, draft = gpu_pair()
    expected = generate(target, draft, batch=2)
    broken = copy.deepcopy(target)
    with torch.no_grad():
        token = expected[0, -11]
        broken.model.language_model.embed_tokens.weight[token] = float("nan")
    if token in expected[1]:
        pytest.skip("both sequences say the broken token")
    with pytest.warns(UserWarning, match="sequence 0 ended early"):
        output = generate(broken, draft, batch=2, return_dict_in_generate=True)
    assert output.speculation.finish_reasons[0] == FinishReason.INVALID_LOGITS
    assert torch.equal(output.sequences[1], expected[1])
