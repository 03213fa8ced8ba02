"""What trackers get through ``report_to``: every ``muon/...`` number that the Trainer logs."""

import struct

import pytest

from .test_trainer import make


def scalars(folder):
    """(tag, step) -> value of all event files: records of a length, its checksum, an Event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        raw, place = file.read_bytes(), 0
        while place < len(raw):
            (size,) = struct.unpack_from("<Q", raw, place)
            event = Event.FromString(raw[place + 12 : place + 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            place += 12 + size + 4
    return found


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_tensorboard_gets_every_number_of_the_log(tmp_path, optim):
    pytest.importorskip("tensorboardX")
    trainer = make(tmp_path, optim=optim, max_steps=2, report_to="tensorboard")
    trainer.train()
    found = scalars(tmp_path)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    expected = {(f"train/{k}", row["step"]): v for row in logged for k, v in row.items() if k not in ("step", "epoch")}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    ours = {tag for tag, _ in expected if tag.startswith("train/muon/")}
    kinds = {"", "/attention", "/mlp"} if optim == "muon" else set()
    assert {f"train/muon/update_rms{kind}" for kind in kinds} <= ours
    assert bool(ours) == (optim == "muon")
