"""The README says what the code has."""

import re
from pathlib import Path

from hf_muon import MuonConfig
from hf_muon.coefficients import NAMES
from hf_muon.config import SCALES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_option_and_choice_is_documented():
    for name in (*MuonConfig.keys(), *NAMES, *SCALES):
        assert f"`{name}`" in README, name


def test_every_file_it_names_exists():
    names = re.findall(r"(?:scripts|recipes|docs|tests|hf_muon)/[\w./-]+\.(?:py|sh|md|yaml|png)\b", README)
    assert len(names) > 5
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_no_placeholder_is_left():
    assert not re.search(r"\b[A-Z]{4,}_[A-Z]{4,}\b", README)
