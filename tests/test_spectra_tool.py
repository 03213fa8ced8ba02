"""Reading checkpoints matrix by matrix, and ``scripts/spectra.py`` as a user runs it."""

import json
import sys

import pandas as pd
import pytest
import spectra
import spectra_report
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_muon import MuonConfig
from hf_muon.analysis.spectra import spectrum
from hf_muon.integrations import stored
from hf_muon.integrations.stored import StoredModel

from . import tiny
from .distributed import scenarios
from .test_moonlight_layout import write_hub_checkpoint


@pytest.fixture
def hub(tmp_path):
    """Moonlight's architecture in two shards of bfloat16, an expert a tensor, and the model that transformers loads."""
    write_hub_checkpoint(tmp_path / "hub")
    return tmp_path / "hub", AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype="auto")


def test_the_hubs_layout_and_transformers_own_hold_the_same_matrices_and_they_are_the_models(hub, tmp_path):
    folder, model = hub
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    apart, fused = StoredModel(folder), StoredModel(tmp_path / "fused")
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    count = 0
    for one, other in zip(apart.matrices(), fused.matrices(), strict=True):
        assert one == other
        expected = one.of(model.get_parameter(one.parameter))
        assert torch.equal(apart.read(one), expected) and torch.equal(fused.read(other), expected)
        assert expected.shape == (one.rows, one.columns) and apart.read(one).dtype == torch.bfloat16
        count += 1
    assert count == 3 * 4 + 3 + 2 * (8 * 3 + 1 + 3)
    assert apart.ignored == fused.ignored == []


def test_renamed_weights_of_another_family_are_found(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, pad_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert any("block_sparse_moe.experts.0.w1" in name for name in load_file(tmp_path / "model.safetensors"))
    read = StoredModel(tmp_path)
    matrices = list(read.matrices())
    assert len(matrices) == 4 + 1 + 3 * 3
    assert all(torch.equal(read.read(m), m.of(model.get_parameter(m.parameter))) for m in matrices)


@pytest.mark.parametrize("fused", [True, False])
def test_no_more_is_read_at_a_time_than_one_matrix(hub, tmp_path, monkeypatch, fused):
    folder, model = hub
    if fused:
        folder = tmp_path / "fused"
        model.save_pretrained(folder, save_original_format=False)
    read = StoredModel(folder)
    asked = []

    class Counting:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, name):
            inner = self.opened.get_slice(name)

            class Slice:
                def __getitem__(self, key):
                    asked.append(inner[key].numel())
                    return inner[key]

            return Slice()

    monkeypatch.setattr(stored, "safe_open", Counting)
    for matrix in read.matrices():
        read.read(matrix)
        assert asked.pop() == matrix.rows * matrix.columns and not asked


def change(folder, tensors=None, **config):
    if tensors:
        weights = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            weights.pop(name)
            weights |= {name: tensor} if tensor is not None else {}
        save_file(weights, folder / "model.safetensors")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


QUERY = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({QUERY: None}, f"no weights for {QUERY}"),
        ({QUERY: torch.zeros(3, 32)}, rf"{QUERY} has shape \[48, 32\].*\(3, 32\)"),
        ({EXPERT: None}, "gate_up_proj has shape .8, 32, 32.*7 tensors"),
        ({EXPERT: torch.zeros(5, 32)}, r"gate_up_proj has shape .8, 32, 32.*\(5, 32\)"),
        ({QUERY: torch.zeros(48, 32, dtype=torch.float8_e4m3fn)}, f"{QUERY}.*F8_E4M3, quantized"),
    ],
    ids=["missing", "shape", "expert missing", "expert's shape", "quantized"],
)
def test_a_checkpoint_that_lacks_a_matrix_is_refused_by_its_name(hub, tmp_path, tensors, message):
    _, model = hub
    model.save_pretrained(tmp_path / "one")
    change(tmp_path / "one", tensors)
    with pytest.raises(ValueError, match=message):
        read = StoredModel(tmp_path / "one")
        for matrix in read.matrices():
            read.read(matrix)


def test_tensors_that_the_model_does_not_have_are_reported(hub, tmp_path):
    _, model = hub
    model.save_pretrained(tmp_path / "one")
    weights = load_file(tmp_path / "one" / "model.safetensors")
    save_file({**weights, "model.layers.61.extra.weight": torch.ones(2, 2)}, tmp_path / "one" / "model.safetensors")
    assert StoredModel(tmp_path / "one").ignored == ["model.layers.61.extra.weight"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_model.safetensors", "merge it"),
        ("pytorch_model.bin", "save it again"),
        ("pytorch_model_fsdp_0", "consolidate"),
        ("other.txt", "a folder that a model was saved in"),
    ],
)
def test_a_folder_without_safetensors_is_refused_with_the_remedy(tmp_path, file, message):
    tiny.config().save_pretrained(tmp_path)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=message):
        StoredModel(tmp_path)


def test_routing_options_reach_the_reader(tmp_path):
    tiny.qwen2().save_pretrained(tmp_path)
    names = {m.module for m in StoredModel(tmp_path, MuonConfig.from_optim_args("exclude=*mlp*")).matrices()}
    assert names == {f"self_attn.{x}_proj" for x in "qkvo"}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["spectra.py", *map(str, arguments)])
    return spectra.main()


def series(folder, seeds, scale=1.0):
    """Checkpoints as the Trainer names them, and the final model beside them."""
    for step, seed in enumerate(seeds, 1):
        model = scenarios.model("moe", "float32")
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape).sign() * torch.rand(p.shape).pow(scale))
        model.save_pretrained(folder / f"checkpoint-{10 * step}")
        state = {"global_step": 10 * step, "num_input_tokens_seen": 1000 * step, "log_history": []}
        (folder / f"checkpoint-{10 * step}" / "trainer_state.json").write_text(json.dumps(state))
    model.save_pretrained(folder)
    return model


def test_two_series_end_to_end(tmp_path, monkeypatch, capsys):
    final = series(tmp_path / "pretrain-muon", (1, 2))
    series(tmp_path / "pretrain-adamw", (3, 4), scale=4.0)
    out = tmp_path / "out"
    assert run(monkeypatch, tmp_path / "pretrain-muon", tmp_path / "pretrain-adamw", "--out", out) == 0
    table = pd.read_parquet(out / "spectra.parquet")
    plain = pd.read_csv(out / "spectra.csv", keep_default_na=False)
    assert len(table) == len(plain) == 2 * 2 * 2 * (4 + 1 + 3 * 3 + 3)
    assert set(table["run"]) == {"Muon", "AdamW"} and set(table["tokens"]) == {1000, 2000}
    assert set(table["group"]) == {"AttnQO", "AttnKV", "Router", "Experts", "SharedExperts"}
    row = table[
        (table["run"] == "Muon") & (table["step"] == 20) & (table["piece"] == "up") & (table["layer"] == 1)
    ].iloc[0]
    weight = final.model.layers[1].mlp.experts.gate_up_proj[row["expert"], 16:]
    expected = spectrum(weight)
    assert (row["A"], row["B"]) == tuple(weight.shape)
    for name in ("entropy", "stable_rank", "spectral_norm", "smallest", "condition", "rms"):
        assert row[name] == pytest.approx(getattr(expected, name).item(), rel=1e-9), name
    assert row["singular_values"] == pytest.approx(expected.singular_values.tolist(), rel=1e-6)
    # The averages and the share, once more without pandas.
    summary = json.loads((out / "summary.json").read_text())
    rows = [r for r in plain.to_dict("records") if r["run"] == "Muon" and r["step"] == 10 and r["group"] == "Experts"]
    layers = [[r["entropy"] for r in rows if str(r["layer"]) == layer] for layer in "01"]
    mean = sum(sum(layer) / len(layer) for layer in layers) / 2
    assert summary["mean_by_group"]["entropy"]["Muon"]["10"]["Experts"] == pytest.approx(mean)
    by_run = {"Muon": {}, "AdamW": {}}
    for r in plain.to_dict("records"):
        by_run[r["run"]][r["step"], r["parameter"], r["expert"], r["piece"]] = r["entropy"]
    assert by_run["Muon"].keys() == by_run["AdamW"].keys()
    higher = [by_run["Muon"][key] > by_run["AdamW"][key] for key in by_run["Muon"]]
    assert summary["compare"]["A"] == "Muon" and summary["compare"]["matrices"] == len(higher)
    assert summary["compare"]["share_higher"] == pytest.approx(sum(higher) / len(higher), abs=1e-4)
    assert 0.5 < summary["compare"]["share_higher"] < 1
    assert summary["peak_rss_mib"] > 0 and summary["checkpoints"]["Muon 10"]["matrices"] == 34
    figures = ["entropy", "stable_rank", "singular_values_attention", "singular_values_mlp"]
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in figures)
    assert "SVD entropy of Muon above that of AdamW" in capsys.readouterr().out

    # Started again, it measures nothing anew; with other options, it refuses.
    monkeypatch.setattr(spectra, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert run(monkeypatch, tmp_path / "pretrain-muon", "--out", out) == 0
    with pytest.raises(ValueError, match="'experts': 3.*use another --out"):
        run(monkeypatch, tmp_path / "pretrain-muon", "--out", out, "--experts", "0")
    (tmp_path / "pretrain-muon").rename(tmp_path / "elsewhere-muon")
    with pytest.raises(ValueError, match="Muon step 10 from .*use another --out"):
        run(monkeypatch, tmp_path / "elsewhere-muon", "--out", out)


def test_a_matrix_without_entropy_is_named_and_counts_nowhere(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        model = tiny.qwen2()
        if name == "b":
            model.model.layers[0].mlp.up_proj.weight.data.zero_()
            model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("nan")
        model.save_pretrained(tmp_path / name)
    assert run(monkeypatch, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out", "--compare", "a", "b") == 1
    err = capsys.readouterr().err
    assert "b step 0: model.layers.0.mlp.up_proj.weight mlp.up_proj is zero" in err
    assert "model.layers.1.self_attn.o_proj.weight self_attn.o_proj is not finite" in err
    assert err.count("NO ENTROPY") == 2
    compared = json.loads((tmp_path / "out" / "summary.json").read_text())["compare"]
    assert compared["matrices"] == 12 and compared["share_higher"] == 0, "equal is not higher"


def test_frames_are_red_where_as_entropy_is_the_lower(tmp_path, monkeypatch):
    tiny.qwen2().save_pretrained(tmp_path / "a")
    model = tiny.qwen2()
    lower = model.model.layers[1].mlp.down_proj.weight  # of b: so a's is the higher there, and lower at up_proj
    with torch.no_grad():
        lower.copy_(lower[:, :1] @ lower[:1] + 0.1 * lower)
        up = model.model.layers[0].mlp.up_proj.weight
        up.copy_(torch.linalg.qr(up).Q)
    model.save_pretrained(tmp_path / "b")
    red = []

    def keep(figure, file):
        for panel in figure.axes:
            edges = {spine.get_edgecolor() for spine in panel.spines.values()}
            if edges == {(1.0, 0.0, 0.0, 1.0)}:
                red.append((file.stem, panel.get_title()))
        return file

    monkeypatch.setattr(spectra_report, "_saved", keep)
    assert run(monkeypatch, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "o", "--compare", "a", "b") == 0
    assert red == [("singular_values_mlp", "up_proj")]


def test_checkpoints_are_named_by_run_and_step(tmp_path):
    for name in ("Moonlight_hf_step_2000", "Moonlight_adam_hf_step_2000", "Moonlight_hf_step_14000"):
        tiny.config().save_pretrained(tmp_path / name)
    tiny.config().save_pretrained(tmp_path / "sft-muon")
    found = spectra.find_checkpoints([str(tmp_path)])
    assert [(c.run, c.step) for c in found] == [("AdamW", 2000), ("Muon", 2000), ("Muon", 14000)]
    # The paper's ramp: batches of 2,048, and of 4,096 from 200B tokens on, which step 11,921 is the first behind.
    assert [c.tokens for c in found[:2]] == [2000 * 2048 * 8192] * 2
    assert found[2].tokens == (11921 * 2048 + (14000 - 11921) * 4096) * 8192
    found = spectra.find_checkpoints([f"mine={tmp_path}/sft-muon", f"{tmp_path}/sft-muon"], tokens_per_step=10)
    assert [(c.run, c.step, c.tokens) for c in found] == [("Muon", 0, 0), ("mine", 0, 0)]
    (hub,) = spectra.find_checkpoints(["moonshotai/some-repo/Moonlight_adam_hf_step_2000@main"])
    assert (hub.run, hub.step, hub.tokens) == ("AdamW", 2000, 2000 * 2048 * 8192)
    with pytest.raises(ValueError, match="both step 0 of run Muon: name runs"):
        spectra.find_checkpoints([str(tmp_path / "sft-muon"), f"Muon={tmp_path}/sft-muon"])
    with pytest.raises(ValueError, match="is no folder, and no hub repository"):
        spectra.find_checkpoints([str(tmp_path / "nowhere")])


def test_a_hub_repository_is_downloaded_without_other_formats(tmp_path, monkeypatch):
    asked = {}

    def download(repo, **options):
        asked.update(repo=repo, **options)
        return str(tmp_path)

    monkeypatch.setattr(spectra, "snapshot_download", download)
    folder = spectra.local_folder("owner/name/Moonlight_hf_step_2000@v1")
    assert folder == str(tmp_path / "Moonlight_hf_step_2000")
    assert asked == {
        "repo": "owner/name", "revision": "v1",
        "allow_patterns": ["Moonlight_hf_step_2000/*.json", "Moonlight_hf_step_2000/model*.safetensors"],
    }  # fmt: skip
    spectra.local_folder("owner/name")
    assert asked["allow_patterns"] == ["*.json", "model*.safetensors"] and asked["revision"] is None


def test_runs_that_cannot_be_compared_are_said_so():
    with pytest.raises(ValueError, match="no run 'x' among"):
        spectra_report.chosen_pair(["Muon", "AdamW"], ["x", "Muon"])
    assert spectra_report.chosen_pair(["AdamW", "moe-muon"], None) == ("moe-muon", "AdamW")
    assert spectra_report.chosen_pair(["a", "b", "c"], None) is None
