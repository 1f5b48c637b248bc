"""Block efficiency, acceptance by position and memory-bound speed-up, against values worked out by hand."""

import math

import pytest
from models import picture_inputs, tiny_llama, tiny_llava

import fastspec
from fastspec.metrics import SpeculationRecord, memory_bound_speedup
from fastspec.state import FinishReason


def record(accepted, committed=None, cost_ratio=0.0, draft_passes=None):
    """Sequences that committed 0, 1, ... drafted tokens in so many cycles, and one of the target's in each."""
    depth = len(accepted[0]) - 1
    cycles = tuple(sum(row) for row in accepted)
    drafted = (sum(count * times for count, times in enumerate(row)) for row in accepted)
    return SpeculationRecord(
        num_nodes=depth + 1,
        draft_passes=depth if draft_passes is None else draft_passes,
        cycles=cycles,
        committed=committed or tuple(map(sum, zip(drafted, cycles, strict=True))),
        accepted=tuple(map(tuple, accepted)),
        finish_reasons=(FinishReason.EOS,) * len(accepted),
        cost_ratio=cost_ratio,
    )


def test_one_sequence():
    # Ten cycles: four kept no drafted token, three kept one, one kept two, two kept all three.
    one = record([[4, 3, 1, 2]])
    assert one.target_passes == 10
    assert one.mean_accepted == pytest.approx((3 * 1 + 1 * 2 + 2 * 3) / 10)
    assert one.block_efficiency == pytest.approx(1 + 1.1)
    assert one.acceptance_by_position == pytest.approx((0.6, 0.3, 0.2))
    assert sum(one.acceptance_by_position) == pytest.approx(one.mean_accepted)


def test_sequences_are_weighed_by_their_passes():
    both = record([[0, 0, 6], [2, 0, 0]])
    assert both.target_passes == 8
    assert both.mean_accepted == pytest.approx(12 / 8)
    assert both.block_efficiency == pytest.approx((6 * 3 + 2 * 1) / 8)
    assert both.acceptance_by_position == pytest.approx((6 / 8, 6 / 8))


def test_block_efficiency_counts_what_was_committed():
    # The last cycle accepted two tokens and ended there: no token of the target's own came after them.
    cut = record([[1, 0, 1]], committed=(1 + 2,))
    assert cut.block_efficiency == pytest.approx(1.5)
    assert cut.mean_accepted == pytest.approx(1.0)


def test_plain_decoding_is_one_token_per_pass():
    plain = record([[9]])
    assert plain.block_efficiency == 1.0
    assert plain.acceptance_by_position == ()
    assert plain.mbsu == 1.0


def test_nothing_decoded_has_no_rates():
    none = record([[0, 0, 0]])
    assert math.isnan(none.block_efficiency)
    assert math.isnan(none.mean_accepted)
    assert math.isnan(none.mbsu)
    assert none.acceptance_by_position == ()


def test_memory_bound_speedup():
    assert memory_bound_speedup(2.4, 0.02, 5) == pytest.approx(2.4 / 1.1)
    assert memory_bound_speedup(3.0, 0.0, 5) == 3.0  # a draft that reads nothing
    assert memory_bound_speedup(1.0, 0.1, 5) == pytest.approx(2 / 3)  # a useless draft costs its passes
    assert record([[4, 3, 1, 2]], cost_ratio=0.05).mbsu == pytest.approx(2.1 / 1.15)
    assert record([[4, 3, 1, 2]], cost_ratio=0.05, draft_passes=2).mbsu == pytest.approx(2.1 / 1.1)


def test_a_generation_is_counted_right():
    target, gamma = tiny_llava(), 3
    inputs = picture_inputs(batch=2)
    output = fastspec.generate(
        target,
        draft=tiny_llama(),
        gamma=gamma,
        **inputs,
        max_new_tokens=24,
        return_dict_in_generate=True,
        do_sample=False,
    )
    speculation = output.speculation
    for row, drafted in enumerate(speculation.drafted):
        # The prefill gives the first token; cycles give the others.
        assert speculation.committed[row] == len(drafted) - 1
        assert sum(drafted) == sum(count * times for count, times in enumerate(speculation.accepted[row]))
        assert speculation.cycles[row] == sum(speculation.accepted[row])
    assert speculation.block_efficiency == sum(speculation.committed) / sum(speculation.cycles)
    assert len(speculation.acceptance_by_position) == gamma

    def weights(layers, head):
        return sum(one.numel() for one in layers.parameters()) + head.weight.numel()

    draft = tiny_llama()
    expected = weights(draft.model.layers, draft.lm_head) / weights(
        target.model.language_model.layers, target.lm_head
    )
    assert speculation.cost_ratio == pytest.approx(expected, rel=0.02)
    assert speculation.mbsu == pytest.approx(
        speculation.block_efficiency / (speculation.cost_ratio * gamma + 1)
    )
