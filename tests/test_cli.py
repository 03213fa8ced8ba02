"""``python -m hf_muon explain``: the routing of a model, without its weights."""

import pytest

from hf_muon.__main__ import main
from hf_muon.integrations.models import on_meta


def test_moonlight_from_its_config(data, capsys):
    assert main(["explain", str(data / "moonlight_config.json")]) == 0
    out = capsys.readouterr().out
    # 64 experts of gate, up and down in each of 26 layers, and the paper's 15.29B parameters besides the embeddings.
    assert "4,992" in out and "15,288," in out
    assert main(["explain", str(data / "moonlight_config.json"), "--summary"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_options_change_the_routing(data, capsys):
    source = str(data / "moonlight_config.json")
    assert main(["explain", source, "--optim-args", "exclude=*.experts.*"]) == 0
    assert "matched by exclude" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["./missing"], "no such config"),
        (["missing.json"], "no such config"),
        (["CONFIG", "--optim-args", "momentun=1"], "valid keys: momentum"),
        (["CONFIG", "--optim-args", "exclude=nothing.*"], "matches no trainable parameter"),
        (["CONFIG", "--architecture", "NoSuchModel"], "no class 'NoSuchModel'"),
        (["CONFIG", "--architecture", "LlamaConfig"], "no class 'LlamaConfig' that is a model"),
        (["CONFIG", "--architecture", "BertModel"], "built from a BertConfig, not a DeepseekV3Config"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(data, capsys, argv, message):
    argv = [str(data / "moonlight_config.json") if x == "CONFIG" else x for x in argv]
    assert main(["explain", *argv]) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_a_source_that_is_neither_folder_nor_reachable_says_both(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="runs/none is no folder here, and as a hub name"):
        on_meta("runs/none")
