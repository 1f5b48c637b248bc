"""The decoder's own promises: a cycle that a graph can hold, and sequences that do not disturb each other."""

import itertools

import pytest
import torch
from models import IMAGE_TOKEN_ID, noisy_clone, picture_inputs, texts, tiny_llama, tiny_llava
from torch.overrides import TorchFunctionMode

import fastspec
from fastspec import DraftTree, Rule, SpeculativeDecoder
from fastspec.decoder import Request
from fastspec.draft import NgramDraft
from fastspec.generation import make_prompts
from fastspec.model.vision import Prompt
from fastspec.sampling import SamplingParams
from fastspec.state import DecodeState, FinishReason

TARGET = tiny_llava()
CLONE = noisy_clone(TARGET)
TEXT = tiny_llama()
TREE = DraftTree.from_children([[1, 2, 3], [4, 5], [6], [], [7], [], [], []])
WARPED = SamplingParams(
    temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, min_tokens=16
)
CASES = [
    (draft, shape, rule)
    for draft in (TEXT, CLONE)
    for shape in (DraftTree.chain(3), TREE)
    for rule in Rule
    if shape.is_chain or rule not in (Rule.TOKEN_LEVEL, Rule.BLOCK)
]
CASES += [("ngram", DraftTree.chain(3), Rule.TARGET_ONLY), (None, None, None)]


def requests(batch, params=WARPED, eos_token_ids=(2,), **more):
    inputs = picture_inputs(batch)
    prompts = make_prompts(TARGET, inputs["input_ids"], [0] * batch, inputs)
    return [
        Request(prompt, 20, params, seed=row, eos_token_ids=eos_token_ids, **more)
        for row, prompt in enumerate(prompts)
    ]


class HostReads(TorchFunctionMode):
    """Records the calls that a CUDA graph cannot hold: values read by the host, sent by it, or of unknown number."""

    READS = ("item", "tolist", "numpy", "cpu", "equal", "__bool__", "__int__", "__float__", "__index__")
    CALLS = (*READS, "__contains__", "nonzero", "masked_select", "unique", "tensor", "as_tensor")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        indices = args[1] if name in ("__getitem__", "__setitem__") else ()
        indices = indices if isinstance(indices, tuple) else (indices,)
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        if name in self.CALLS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_detector_sees_host_reads():
    tensor = torch.arange(3)
    for read in (
        lambda: tensor[0].item(),
        lambda: tensor.tolist(),
        lambda: bool((tensor > 1).any()),
        lambda: tensor[tensor > 1],
        lambda: tensor.nonzero(),
        lambda: torch.tensor([1, 2]),
        lambda: int(tensor[0]),
        lambda: [0, 1, 2][tensor[0]],
        lambda: tensor.cpu(),
    ):
        with HostReads() as reads:
            read()
        assert len(reads.found) == 1
    with HostReads() as reads:
        torch.where(tensor > 1, tensor, 0)[tensor]
    assert not reads.found


def tensors(root):
    """All tensors that an object keeps, by path."""
    found, seen = {}, set()

    def visit(path, value):
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, (list, tuple)):
            for index, one in enumerate(value):
                visit(f"{path}[{index}]", one)
        elif type(value).__module__.startswith("fastspec") and hasattr(value, "__dict__"):
            for name, one in vars(value).items():
                visit(f"{path}.{name}", one)

    visit("decoder", root)
    return found


@pytest.mark.parametrize(
    ("draft", "tree", "rule"),
    CASES,
    ids=lambda value: getattr(value, "value", None) or getattr(value, "name_or_path", None),
)
def test_a_cycle_is_a_straight_line_on_fixed_buffers(draft, tree, rule):
    decoder = SpeculativeDecoder(TARGET, draft, tree=tree, rule=rule, batch_size=2, capacity=64)
    passing = ("decoder.last_logits", "decoder.last_path")  # results, not buffers
    before = {name: (one.data_ptr(), one.shape) for name, one in tensors(decoder).items()}
    for batch in (2, 1):
        decoder.prefill(requests(batch))
        with HostReads() as reads:
            for _ in range(3):
                decoder.cycle()
        assert not reads.found
    after = {
        name: (one.data_ptr(), one.shape) for name, one in tensors(decoder).items() if name not in passing
    }
    assert after == {name: before[name] for name in after}
    assert len(after) > 30


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize(
    ("draft", "tree"),
    [(TEXT, DraftTree.chain(3)), (CLONE, TREE), ("ngram", DraftTree.chain(3)), (None, None)],
    ids=["chain", "tree", "ngram", "plain"],
)
def test_a_cuda_graph_of_the_cycle_says_what_the_cycle_says(draft, tree, backend, monkeypatch):
    import copy

    monkeypatch.setenv("FASTSPEC_BACKEND", backend)
    target = copy.deepcopy(TARGET).cuda()
    draft = copy.deepcopy(draft).cuda() if isinstance(draft, torch.nn.Module) else draft
    inputs = {name: value.cuda() for name, value in picture_inputs(3).items()}
    prompts = make_prompts(target, inputs["input_ids"], [0] * 3, inputs)
    asked = [
        Request(prompt, 24, SamplingParams(temperature=0.9), seed=row) for row, prompt in enumerate(prompts)
    ]
    decoder = SpeculativeDecoder(target, draft, tree=tree, batch_size=3, capacity=64)

    def answers(cycle):
        decoder.prefill(asked)
        said = [decoder.poll().tokens]
        while (decoder.state.reason == FinishReason.RUNNING).any():
            cycle()
            said.append(decoder.poll().tokens)
        return said

    expected = answers(decoder.cycle)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        decoder.cycle()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.cycle()
    assert answers(graph.replay) == expected


def test_a_drafted_token_that_the_weights_turn_into_nan_is_only_rejected():
    """Plain decoding never looks at its embedding, so speculative decoding must not notice either."""
    inputs = picture_inputs(2)
    greedy = {"do_sample": False, "max_new_tokens": 16}
    target = noisy_clone(TARGET, noise=0.0)
    unsaid = next(
        token for token in range(10, 64) if not (target.generate(**inputs, **greedy) == token).any()
    )
    with torch.no_grad():
        target.model.language_model.embed_tokens.weight[unsaid] = float("nan")
    expected = target.generate(**inputs, **greedy)
    assert not (expected == unsaid).any()

    eager = tiny_llama()
    with torch.no_grad():
        eager.model.embed_tokens.weight[unsaid] = float("inf")
        eager.lm_head.weight[unsaid] = 1e3 * eager.lm_head.weight[20]
    for draft in (eager, CLONE):
        for kind in ({"gamma": 3}, {"tree": TREE}, {"tree": DraftTree.kary((63,)), "rule": "target_only"}):
            assert torch.equal(fastspec.generate(target, draft=draft, **inputs, **greedy, **kind), expected)


@pytest.mark.filterwarnings("ignore:sequence . ended early")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["embed_tokens", "layers.0.self_attn.v_proj", "layers.1.mlp.down_proj"])
def test_broken_weights_end_the_sequences_they_reach(where, value):
    """One row of the embedding reaches one sequence; a projection reaches all of them."""
    inputs = picture_inputs(3)
    inputs["input_ids"][:, 6:] = inputs["input_ids"][:, 6:].clamp(max=60)
    inputs["input_ids"][1, -1] = 63
    greedy = {"do_sample": False, "max_new_tokens": 12}
    target = noisy_clone(TARGET, noise=0.0)
    target.generation_config.suppress_tokens = None
    with torch.no_grad():
        target.lm_head.weight[63] = 0.0
        expected = target.generate(**inputs, **greedy)
        module = target.model.language_model.get_submodule(where)
        module.weight[63 if where == "embed_tokens" else 0, 0] = value
    reached = [1] if where == "embed_tokens" else [0, 1, 2]
    with pytest.warns(UserWarning, match="sequence 1 ended early: the target's logits were NaN or infinite"):
        output = fastspec.generate(
            target, draft=TEXT, gamma=4, **inputs, **greedy, return_dict_in_generate=True
        )
    for row, reason in enumerate(output.speculation.finish_reasons):
        assert (reason == FinishReason.INVALID_LOGITS) == (row in reached)
        if row in reached:
            assert (output.sequences[row, 13:] == 0).all()
        else:
            assert torch.equal(output.sequences[row], expected[row, : output.sequences.shape[1]])


@pytest.mark.parametrize("rule", [Rule.BLOCK, Rule.TARGET_ONLY, Rule.DRAFTER_INVARIANT])
def test_a_broken_sequence_leaves_the_others_bitwise_alone(rule):
    """NaN in the middle of one answer: what it had stays, and the logits of the others keep every bit."""

    def run(broken):
        decoder = SpeculativeDecoder(TARGET, CLONE, gamma=3, rule=rule, batch_size=3, capacity=64)
        tokens, logits = [[], [], []], []
        stream = decoder.stream(requests(3, eos_token_ids=()))
        for cycle, commitment in enumerate(stream):
            for row in range(3):
                tokens[row] += commitment.tokens[row]
            logits.append(decoder.last_logits[[0, 2]].clone())
            if broken and cycle == 2:
                decoder.cache.values[0, 1, :, :5] = float("nan")
        return tokens, logits, decoder.record().finish_reasons

    tokens, logits, reasons = run(broken=True)
    whole_tokens, whole_logits, _ = run(broken=False)
    assert reasons == (FinishReason.LENGTH, FinishReason.INVALID_LOGITS, FinishReason.LENGTH)
    assert (tokens[0], tokens[2]) == (whole_tokens[0], whole_tokens[2])
    assert 0 < len(tokens[1]) < 20
    assert tokens[1] == whole_tokens[1][: len(tokens[1])]
    for mine, whole in zip(logits, whole_logits, strict=False):
        assert torch.equal(mine, whole)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=9),
        SamplingParams(temperature=1.3, top_p=0.8, min_p=0.02, repetition_penalty=1.3, min_tokens=24),
    ],
    ids=["plain", "top-k", "everything"],
)
def test_drafter_invariant_text_is_that_of_plain_decoding(params):
    """The same seed, the same text: whatever the draft, its length, its tree or its sampling, or no draft at all."""

    def text(draft, **shape):
        decoder = SpeculativeDecoder(
            TARGET, draft, rule="drafter_invariant", batch_size=2, capacity=64, **shape
        )
        said = [[], []]
        for commitment in decoder.stream(requests(2, params=params)):
            for answer, tokens in zip(said, commitment.tokens, strict=True):
                answer += tokens
        return said

    expected = text(None)
    assert expected[0] != expected[1]
    for draft in (TEXT, CLONE, TARGET):
        for shape in ({"gamma": 1}, {"gamma": 6}, {"tree": TREE}, {"tree": DraftTree.kary((4,))}):
            assert text(draft, **shape) == expected
    assert text("ngram", gamma=3) == expected


def test_a_draft_with_the_targets_law_is_always_accepted_under_shared_noise():
    decoder = SpeculativeDecoder(TARGET, TARGET, rule="drafter_invariant", gamma=4, capacity=64)
    for _ in decoder.stream(requests(1, eos_token_ids=())):
        pass
    assert decoder.record().cycles == (4,)  # 1 token of the prefill, then 5, 5, 5 and the last 4


@pytest.mark.parametrize("draft", [TEXT, CLONE], ids=["text", "image"])
@pytest.mark.parametrize("tree", [DraftTree.chain(3), TREE], ids=["chain", "tree"])
@torch.no_grad()
def test_a_draft_reads_what_it_should_at_compact_positions(draft, tree):
    """q of every node is the draft's law, by transformers, after its own prefix.

    For a text draft that prefix is the prompt without its image tokens; an image draft sees the picture.
    """
    decoder = SpeculativeDecoder(TARGET, draft, tree=tree, batch_size=2, capacity=64)
    inputs = picture_inputs(2)
    params = SamplingParams(temperature=4.0)  # flat, so that even a stranger's tokens are accepted at times
    decoder.prefill(requests(2, params=params, eos_token_ids=()))
    state, kept = decoder.state, set()
    for _ in range(5):
        answers = [state.tokens[row, 13 : state.num_tokens[row]].tolist() for row in range(2)]
        decoder.cycle()
        kept |= set(state.num_new.tolist())
        for row, node in itertools.product(range(2), tree.inner):
            path = answers[row] + state.tree_tokens[row, list(tree.path(node)[1:])].tolist()
            if IMAGE_TOKEN_ID in path:
                continue  # transformers would look for a second picture
            prompt = inputs["input_ids"][row].tolist()
            picture = {"pixel_values": inputs["pixel_values"][row : row + 1]}
            if draft is TEXT:
                prompt, picture = [token for token in prompt if token != IMAGE_TOKEN_ID], {}
            law = draft(input_ids=torch.tensor([prompt + path]), **picture).logits[0, -1].div(4.0).softmax(-1)
            q = state.draft_logits[row, tree.inner_index[node]].softmax(-1)
            torch.testing.assert_close(q, law, rtol=1e-3, atol=1e-5)
    assert len(kept) > 1, "acceptance was never ragged"


def test_prompt_lookup_copies_no_placeholder_of_the_present_prompt():
    ids = torch.tensor([5, *[IMAGE_TOKEN_ID] * 4, 9, 5])
    with_image, placeholders = Prompt(ids, IMAGE_TOKEN_ID, (torch.zeros(4, 8),)), [IMAGE_TOKEN_ID] * 3
    expected = [[-1] * 3, placeholders, [-1] * 3]
    assert looked_up(NgramDraft(), with_image, Prompt(ids), with_image) == expected


def looked_up(draft, *prompts):
    """The chains of three that prompt lookup proposes after each of the prompts, on the same buffers."""
    tree = DraftTree.chain(3)
    state, found = DecodeState(1, 16, tree, 64, "cpu"), []
    draft.allocate(1, 16, tree, 64, Rule.TARGET_ONLY, torch.device("cpu"))
    for prompt in prompts:
        state.clear()
        state.admit(0, prompt.input_ids, 16, SamplingParams(), SamplingParams(), 0, ())
        draft.prefill(0, prompt)
        draft.propose(state)
        found.append(state.tree_tokens[0, 1:].tolist())
    return found


def test_prompt_lookup_goes_by_the_longest_match_and_then_the_latest():
    repeats = Prompt(torch.tensor([7, 8, 1, 9, 8, 2, 7, 8]))
    assert looked_up(NgramDraft(), repeats) == [[1, 9, 8]]
    assert looked_up(NgramDraft(max_ngram=1), repeats) == [[2, 7, 8]]
    short, none = Prompt(torch.tensor([4, 6, 4])), Prompt(torch.tensor([4, 5, 6]))
    # What the longer prompt left in the buffers is no match, and nothing follows the newest token.
    assert looked_up(NgramDraft(), repeats, short, none) == [[1, 9, 8], [6, 4, -1], [-1, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_of_the_users_own_changes_nothing(dtype):
    asked = requests(2)
    expected = texts(SpeculativeDecoder(TARGET, TEXT, gamma=3, batch_size=2), asked)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        decoder = SpeculativeDecoder(TARGET, TEXT, gamma=3, batch_size=2)
        assert decoder.state.draft_logits.dtype == torch.float32
        assert texts(decoder, asked) == expected
    finally:
        torch.set_default_dtype(before)


def test_the_draft_may_sample_another_way_than_the_target():
    """Request.draft_params changes what is proposed, never what is said."""
    for draft_params in (SamplingParams(temperature=0.0), SamplingParams(temperature=3.0), None):
        decoder = SpeculativeDecoder(TARGET, CLONE, rule="drafter_invariant", batch_size=2, capacity=64)
        said = [[], []]
        for commitment in decoder.stream(requests(2, draft_params=draft_params)):
            for answer, tokens in zip(said, commitment.tokens, strict=True):
                answer += tokens
        if draft_params == SamplingParams(temperature=0.0):
            expected = said
        assert said == expected


def test_vocabularies_are_compared_without_generate_too():
    with pytest.raises(ValueError, match="the draft's vocabulary has 1064 tokens and the target's 64"):
        SpeculativeDecoder(TARGET, tiny_llama(1064))
