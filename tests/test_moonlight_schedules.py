"""Moonlight's schedule, ramp and gate scale against the paper's numbers."""

import math

import pytest

from hf_muon.moonlight.gating import gate_scaling_factor
from hf_muon.moonlight.schedules import BatchRamp, Run, Schedule, Stage, moonlight, parse_tokens

B, T = 10**9, 10**12


def test_stages_end_where_section_3_3_says():
    schedule = moonlight()
    # Warm-up is 2k steps of 2048 x 8192 tokens, which the paper rounds down to 33B.
    assert schedule.bounds == (0, 2000 * 2048 * 8192, 5_200 * B, schedule.ramp.tokens_before(161_033), 5_700 * B)
    assert schedule.bounds[1] == 33_554_432_000
    assert [schedule.ramp.steps_until(bound) for bound in schedule.bounds] == [0, 2000, 160_933, 161_033, 175_834]
    assert schedule.steps == 175_834


def test_rates_at_the_papers_landmarks():
    schedule = moonlight()
    rate = {step: schedule.rate(schedule.ramp.tokens_before(step)) for step in (0, 1, 1000, 2000, 161_033, 175_833)}
    assert rate[0] == 0
    assert rate[1] == pytest.approx(4.2e-4 / 2000, rel=1e-12)
    assert rate[1000] == pytest.approx(2.1e-4, rel=1e-12)
    assert rate[2000] == 4.2e-4
    assert rate[161_033] == 1e-4
    middle = (schedule.bounds[1] + schedule.bounds[2]) // 2
    assert schedule.rate(middle) == pytest.approx((4.2e-4 + 4.2e-5) / 2, rel=1e-9)
    assert schedule.rate(5_200 * B - 1) == pytest.approx(4.2e-5, rel=1e-9)
    assert schedule.rate(5_200 * B) == 4.2e-5
    assert 0 < rate[175_833] < 1e-8
    assert schedule.rate(5_700 * B) == schedule.rate(6 * T) == 0


def test_steps_of_the_checkpoint_note_agree_with_tokens_as_far_as_they_do():
    ramp = moonlight().ramp
    # The ramp at exactly 200B comes 79 steps before the note's "12K".
    assert ramp.steps_until(200 * B) == 11_921
    assert [ramp.sequences(step) for step in (0, 11_920, 11_921, 175_000)] == [2048, 2048, 4096, 4096]
    assert 12_000 * 2048 * 8192 == 201_326_592_000
    # 42K steps, the last public checkpoint, are the 1.2T of Table 4, not the end of the cosine at 5.2T.
    assert ramp.tokens_before(42_000) == pytest.approx(1.2 * T, rel=0.01)
    assert ramp.tokens_before(42_000) / (5.2 * T) < 0.24
    # "33B" is rounded: at exactly that, warm-up would be 1,967 steps.
    assert ramp.steps_until(33 * B) == 1967


def test_ramp_equals_counting_step_by_step():
    ramp = BatchRamp.parse(["3", "5 from 20", "11 from 100"], sequence_length=4)
    seen = 0
    for step in range(60):
        expected = 3 if seen < 20 else 5 if seen < 100 else 11
        assert ramp.tokens_before(step) == seen
        assert ramp.sequences(step) == expected
        for tokens in range(seen + 1, seen + expected * 4 + 1):
            assert ramp.steps_until(tokens) == step + 1
        seen += expected * 4


def test_a_run_cut_in_follows_the_whole_schedule_from_there():
    schedule = moonlight()
    run = Run(schedule=schedule, start_step=11_920)
    assert run.steps == schedule.steps - 11_920
    assert [run.batch(step) for step in (0, 1)] == [2048, 4096]
    assert run.sequences_before(3) == 2048 + 2 * 4096
    for step in (0, 1, 5000):
        assert run.rate(step) == schedule.rate(schedule.ramp.tokens_before(11_920 + step))


def test_rewarming_multiplies_by_a_line():
    schedule = moonlight()
    warm, plain = (Run(schedule=schedule, start_step=42_000, rewarm_steps=k) for k in (100, 0))
    assert [warm.rate(k) / plain.rate(k) for k in (0, 25, 50, 100, 500)] == pytest.approx([0, 0.25, 0.5, 1, 1])


def test_shapes_against_their_formulas():
    cosine = Stage.parse("cosine 4 to 2 over 8 tokens")
    assert [cosine.rate(x) for x in (0, 0.25, 1)] == pytest.approx([4, 3 + math.cos(math.pi / 4), 2])
    assert Stage.parse("linear 4 to 2 over 8 tokens").rate(0.25) == 3.5
    assert Stage.parse("constant 4 over 8 tokens").rate(0.7) == 4


def test_stages_of_each_length_meet():
    ramp = BatchRamp.parse([2], sequence_length=10)
    stages = ("linear 0 to 1 over 3 steps", "constant 1 over 50 tokens", "linear 1 to 0 until 200")
    schedule = Schedule(stages=tuple(Stage.parse(s) for s in stages), ramp=ramp)
    assert schedule.bounds == (0, 60, 110, 200)
    assert schedule.steps == 10
    # Steps begin at 0, 20, 40, ... tokens; the second stage ends between two of them.
    expected = [0, 1 / 3, 2 / 3, 1, 1, 1, 1 - 10 / 90, 1 - 30 / 90, 1 - 50 / 90, 1 - 70 / 90]
    assert [schedule.rate(ramp.tokens_before(step)) for step in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "tokens"), [("5.2T", 5_200 * B), ("33B tokens", 33 * B), (4096, 4096), ("1.5K", 1500), ("0", 0)]
)
def test_token_counts_are_exact(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["5.2", "1.0001K", "3 G", "", "-4", "4e9", "5.2t"])
def test_token_counts_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="no number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["linear 0 to 1"], "no stage"),
        (["linear 0 to 1 over 3 sequences"], "no stage"),
        (["wavy 0 to 1 over 3 steps"], "shape must be"),
        (["constant 1 to 2 over 3 steps"], "one rate"),
        (["linear 0 to 1 over 0 steps"], "positive number"),
        (["linear 0 to 1 over 9 steps", "linear 1 to 0 until 20"], "ends at 20"),
        ([], "at least one stage"),
    ],
)
def test_schedules_that_cannot_be_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        Schedule(stages=tuple(Stage.parse(s) for s in stages), ramp=BatchRamp.parse([2], 10))


@pytest.mark.parametrize(
    ("entries", "message"),
    [(["2 from 10"], "starts at 0"), (["2", "4 from 0"], "rise"), (["0"], "at least one"), (["two"], "no entry")],
)
def test_ramps_that_cannot_be_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        BatchRamp.parse(entries, 10)


def test_a_run_behind_the_end_is_refused():
    with pytest.raises(ValueError, match="no step 175,834"):
        Run(schedule=moonlight(), start_step=175_834)


def test_gate_scale_of_64_experts_and_top_6_is_moonlights_2446():
    # Three decimals: sqrt(6) = 2.449, the scale of equal gates, is within 1 % too.
    assert gate_scaling_factor(64, 6) == pytest.approx(2.446, abs=5e-4)


def test_gate_scale_equals_a_loop_over_trials():
    import torch

    logits = torch.randn(2000, 16, generator=torch.Generator().manual_seed(3))
    factors = []
    for row in logits.tolist():
        p = sorted((1 / (1 + math.exp(-x)) for x in row), reverse=True)[:3]
        factors.append(1 / math.sqrt(sum((x / sum(p)) ** 2 for x in p)))
    assert gate_scaling_factor(16, 3, trials=2000, seed=3) == pytest.approx(sum(factors) / 2000, rel=1e-6)
    assert gate_scaling_factor(16, 1) == pytest.approx(1)
    with pytest.raises(ValueError, match="top_k"):
        gate_scaling_factor(4, 5)
