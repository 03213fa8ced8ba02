import math

import numpy as np
import pytest

from hf_muon.coefficients import NAMES, schedule


def _map(triples, s):
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return s


def test_moonlight_is_the_triple_of_the_paper():
    assert schedule("moonlight", 5) == ((3.4445, -4.7750, 2.0315),) * 5


def test_moonlight_ends_in_the_band_the_paper_relies_on():
    out = _map(schedule("moonlight", 5), np.linspace(0.02, 1, 10_000))
    assert out.min() > 0.67 and out.max() < 1.21


def test_taylor_converges_to_exactly_one():
    assert np.abs(_map(schedule("taylor", 30), np.linspace(1e-3, 1, 1000)) - 1).max() < 1e-12


def test_polar_express_reaches_one_within_its_design_interval():
    # Designed for singular values in [1e-3, 1]; the paper's figure 1 is flat at 1 after 8 steps.
    assert np.abs(_map(schedule("polar_express", 8), np.linspace(1e-3, 1, 20_000)) - 1).max() < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_more_steps_of_every_schedule_shrink_the_worst_case_or_are_refused(name):
    s = np.linspace(1e-2, 1, 5000)
    five = np.abs(_map(schedule(name, 5), s) - 1).max()
    assert five < 1.0, "no singular value above 1 % may be left behind entirely or overshoot 2"


def test_polar_express_repeats_its_last_triple():
    assert schedule("polar_express", 11)[8:] == ((1.875, -1.25, 0.375),) * 3


def test_user_schedules():
    assert schedule((1.5, -0.5, 0.0), 3) == ((1.5, -0.5, 0.0),) * 3
    assert schedule([(1.5, -0.5, 0), (2, -1, 0)], 2) == ((1.5, -0.5, 0.0), (2.0, -1.0, 0.0))


@pytest.mark.parametrize(
    ("coefficients", "steps", "message"),
    [
        ("nonsense", 5, "moonlight"),
        ("you", 6, "ns_steps must be 5"),
        ([(1, 2, 3)] * 4, 5, "ns_steps must be 4"),
        ([(1, 2)] * 5, 5, r"three coefficients"),
        ((1.0, math.nan, 0.0), 5, "finite"),
        ((1, 2, 3), 5, "diverge"),
        ("moonlight", 0, ">= 1"),
        ("moonlight", 2.0, ">= 1"),
        ("moonlight", True, ">= 1"),
    ],
)
def test_bad_schedules_are_errors_that_name_the_remedy(coefficients, steps, message):
    with pytest.raises(ValueError, match=message):
        schedule(coefficients, steps)
