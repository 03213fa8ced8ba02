"""``scripts/report.py``: what the page says of runs, whole and odd ones, and that a browser shows it."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import report
import torch
from plot import BLUE
from report_figures import Line, _thinned, chart
from report_runs import Series, read_run

import hf_muon
from hf_muon import MuonConfig, param_groups
from hf_muon.plan import plan, table
from hf_muon.report import Report
from hf_muon.routing import route

from . import tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FAST = ["--engine", "zero1", "--dp", "2"]


class Page(HTMLParser):
    """Text, attributes of all tags, and figures by caption."""

    def __init__(self, html):
        super().__init__()
        self.html, self.tags, self.figures, self.alts, self._text, self._caption = html, [], {}, {}, [], ""
        self._mute = False
        self.feed(html)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self._mute = tag == "style"
        if tag == "figcaption":
            self._start = len(self._text)
        if tag == "img":
            title = self._text[self._start].strip()
            self.figures[title], self.alts[title] = attrs["src"], attrs["alt"]

    def handle_endtag(self, tag):
        self._mute = False

    def handle_data(self, data):
        if data.strip() and not self._mute:
            self._text.append(data)

    def headings(self):
        return re.findall(r"<h2>(.*?)</h2>", self.html)

    def svg(self, title):
        return ElementTree.fromstring(base64.b64decode(self.figures[title].partition("base64,")[2]))


def make_run(folder, rows, *, model=None, **state):
    """An output folder as the Trainer leaves it, with this log; ``rows`` may be text for a file that is none."""
    folder.mkdir(parents=True)
    last = max((r["step"] for r in rows if isinstance(r, dict) and isinstance(r.get("step"), int)), default=0)
    state = {"global_step": last, "max_steps": last, "log_history": rows, **state}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if model is not None:
        model.config.save_pretrained(folder)
    return folder


def make_page(tmp_path, *arguments):
    out = tmp_path / "out" / "report.html"
    assert report.main([*map(str, arguments), *FAST, "--out", str(out)]) == 0
    return Page(out.read_text())


def log(steps, **values):
    """Entries 10, 20, ...; a value may be a function of the step."""
    names = {name.replace("__", "/"): value for name, value in values.items()}
    return [{"step": s, **{k: v(s) if callable(v) else v for k, v in names.items()}} for s in range(10, steps + 1, 10)]


def full_log(steps, kinds=("attention", "mlp")):
    rows = log(
        steps, loss=lambda s: 8 - s / 100, learning_rate=1e-3, grad_norm=1.0, muon__lr=2e-3, muon__adamw_lr=1e-3,
        muon__skipped_steps=lambda s: s // 30, muon__skipped_matrices=7, spike__steps=2, output_rms=0.5,
        attention__max_logit=lambda s: 1.0 * s, attention__share_above_100=1e-4, moe__max_violation=0.3,
        moe__max_bias=0.01, spectra__step=10, spectra__entropy__AttnQO=0.9,
    )  # fmt: skip
    for row in rows:
        row |= {
            f"{name}/{kind}": 0.17 for name in ("muon/update_rms", "muon/weight_rms", "output_rms") for kind in kinds
        }
        row |= {f"attention/max_logit/{layer}": row["step"] / (layer + 1) for layer in range(12)}
        row |= {"muon/update_rms": 0.18, "muon/weight_rms": 0.1, "moe/max_violation/1": 0.3}
    return [*rows, {"step": steps, "eval_loss": 5.25}]


def test_two_full_runs_fill_every_section_with_the_numbers_of_their_logs(tmp_path):
    model = tiny.qwen2()
    runs = [make_run(tmp_path / name, full_log(60), model=model) for name in ("a-muon", "b")]
    page = make_page(tmp_path, *runs)
    assert page.headings() == [
        "Summary", "Losses", "Update RMS", "Weight RMS", "Output RMS", "Learning rates", "Gradient norm",
        "Skipped steps", "Spikes", "Attention logits", "Expert load balance", "Spectra of weights", "What Muon trains",
        "Communication plan", "Versions and command", "Not in this report",
    ]  # fmt: skip
    assert page.alts["Training loss"] == (
        "Training loss: Muon 7.9 at step 10, 7.4 at step 60; b 7.9 at step 10, 7.4 at step 60."
    )
    assert page.alts["Held-out loss"] == "Held-out loss: Muon 5.25 at step 60; b 5.25 at step 60."
    assert page.alts["Learning rate"].startswith(
        "Learning rate: Muon: Trainer's, AdamW's 0.001 at step 10, 0.001 at step 60; Muon: Muon's 0.002"
    )
    assert "Optimizer settings : Keep a checkpoint" in page.text
    assert page.alts["SVD entropy in training: b"].endswith("b: AttnQO 0.9 at step 10.")  # the measured step
    assert page.text.count("not recorded") == 4 and "training_args.bin is never unpickled" in page.text


def test_routing_and_plan_are_those_of_the_command_line(tmp_path):
    model = tiny.qwen2()
    page = make_page(tmp_path, make_run(tmp_path / "muon", full_log(20), model=model))
    found = Report(tuple(route(model, MuonConfig())))
    for row in found.rows:
        assert f"{row.algorithm} {row.kind} {row.tensors} {row.numel:,}" in page.text, row
        assert f"{row.reason} {row.example}" in page.text, row
    assert found.summary() in page.text
    assert " ".join(table([plan(param_groups(model, MuonConfig()), "zero1", 2)]).split()) in page.text.replace(
        "\xa0", " "
    )


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    run = read_run(make_run(tmp_path / "muon", full_log(20)), "x")
    assert run.keys("attention/max_logit/") == [f"attention/max_logit/{i}" for i in range(12)]


def test_every_kind_is_in_the_legend_and_many_layers_are_on_a_scale_of_colours(tmp_path):
    kinds = [f"kind{i}" for i in range(11)]
    page = make_page(tmp_path, make_run(tmp_path / "muon", full_log(20, kinds)))
    words = list(page.svg("Weight RMS: Muon").itertext())
    assert [word for word in words if word in kinds] == kinds
    assert (
        "Colours from dark to light" in page.html.partition("<figcaption>Largest logit: Muon")[2].partition("<img")[0]
    )
    assert page.html.count("Colours from dark to light") == 1


def test_one_entry_is_one_point_and_what_is_missing_says_how_to_log_it(tmp_path):
    page = make_page(tmp_path, make_run(tmp_path / "run", [{"step": 5, "loss": 3.0}]))
    assert list(page.figures) == ["Training loss"] and page.alts["Training loss"] == "Training loss: run 3 at step 5."
    assert len(page.svg("Training loss").findall(".//{*}use[@{http://www.w3.org/1999/xlink}href]")) > 0
    for title, hint in {
        "Update RMS": 'optim="muon"', "Output RMS": "OutputRMSCallback", "Spikes": "--detect_spikes",
        "Attention logits": "AttentionLogitsCallback", "Spectra of weights": "scripts/spectra.py",
        "Expert load balance": "ExpertBalanceCallback", "What Muon trains": "config.json",
        "Communication plan": "config.json", "Optimizer settings": "optimizer.pt",
    }.items():  # fmt: skip
        assert title not in page.headings()
        assert re.search(rf"{title} : [^:]*{re.escape(hint)}", page.text), title


def test_hints_name_options_that_exist(tmp_path):
    import pretrain

    known = {
        name for parser in (report.make_parser(), pretrain.make_parser()) for name in parser._option_string_actions
    }
    text = make_page(tmp_path, make_run(tmp_path / "run", [{"step": 5, "loss": 3.0}])).text
    named = set(re.findall(r"--\w+", text))
    assert {"--spectra", "--spectra_steps", "--expert_bias_rate"} <= named
    assert named - known == set()


def moves(page, title):
    """Pieces of the first run's line."""
    drawn = [
        path.get("d") for path in page.svg(title).findall(".//{*}path")
        if BLUE.lower() in (path.get("style") or "") and path.get("clip-path") and "fill: none" in path.get("style")
    ]  # fmt: skip
    assert len(drawn) == 1
    return drawn[0].count("M")


def test_values_that_are_not_finite_are_gaps_and_are_counted(tmp_path):
    odd = {100: float("nan"), 110: float("inf"), 120: "NaN", 130: 10**400}
    whole = make_run(tmp_path / "whole", log(400, loss=lambda s: 5.0 + s % 70))
    broken = make_run(tmp_path / "broken", log(400, loss=lambda s: odd.get(s, 5.0 + s % 70)))
    assert "NaN" in (broken / "trainer_state.json").read_text()
    assert moves(make_page(tmp_path, whole), "Training loss") == 1
    page = make_page(tmp_path, broken)
    assert moves(page, "Training loss") == 2
    assert "broken: 4 of 40 values are not finite: gaps (between steps 100 and 130)." in page.text


def test_a_long_line_keeps_its_spike_and_its_gap(tmp_path):
    odd = {3210: float("nan"), 7770: 1e6}
    rows = log(100_000, loss=lambda s: odd.get(s, 5.0 + s % 70))
    page = make_page(tmp_path, make_run(tmp_path / "run", rows))
    assert moves(page, "Training loss") == 2
    assert "Drawn: the smallest and the largest of every 25 values." in page.text
    assert len(page.figures["Training loss"]) < 100_000
    thin = _thinned(Series([r["step"] for r in rows], [r["loss"] for r in rows]))
    assert {3210, 7770} <= set(thin.steps) and thin.steps[0] < 250 and thin.steps[-1] > 99_750
    assert max(v for v in thin.values if v == v) == 1e6


def test_a_run_of_nothing_but_nan_has_no_figure_of_it(tmp_path):
    page = make_page(tmp_path, make_run(tmp_path / "run", log(50, loss=float("nan"), grad_norm=1.0)))
    assert list(page.figures) == ["Gradient norm"] and "training loss - (the last entry is not finite)" in page.text


def test_runs_of_different_lengths_are_compared_at_the_last_step_that_both_have(tmp_path):
    evals = {30: 4.0, 60: 3.0, 90: 2.0}
    rows = log(90, loss=1.0) + [{"step": s, "eval_loss": v} for s, v in evals.items()]
    short = make_run(tmp_path / "short", [r for r in rows if r["step"] <= 60])
    page = make_page(tmp_path, make_run(tmp_path / "long", rows), short)
    assert "held-out loss at step 60, the last that all have 3.0000 3.0000" in page.text
    assert "The logs end at different steps (long 90, short 60): compare at equal steps." in page.text


def test_counters_of_a_resumed_run_are_added_up(tmp_path):
    counted = [1, 2, 2, 0, 1, 3]
    rows = [{"step": i, "muon/skipped_steps": n, "muon/skipped_matrices": 0} for i, n in enumerate(counted)]
    assert read_run(make_run(tmp_path / "run", rows), "x").count("muon/skipped_steps") == 5


def test_the_longer_of_two_logs_is_read_and_named(tmp_path):
    run = make_run(tmp_path / "run", log(30, loss=3.0))
    make_run(run / "checkpoint-50", log(50, loss=2.0))
    make_run(run / "checkpoint-9", log(20, loss=9.0))
    page = make_page(tmp_path, run)
    assert "log checkpoint-50/trainer_state.json" in page.text and "training loss 2 at step 50" in page.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no trainer_state.json in .*run: is it the output_dir"),
        ('{"log_history": [', "trainer_state.json is no readable JSON"),
        ("[" * 100_000, "trainer_state.json is no readable JSON"),
        ("\xff\xfe", "trainer_state.json is no readable JSON"),
        ("[]", "holds no JSON object"),
        ('{"log_history": 3}', "has no list log_history"),
    ],
)
def test_what_is_no_run_is_an_error_that_names_the_file(tmp_path, content, message):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "trainer_state.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        make_page(tmp_path, tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_the_command_line_ends_without_a_traceback(tmp_path):
    script = Path(report.__file__)
    env = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "no"], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 1 and done.stderr.strip().endswith(f"report: {tmp_path / 'no'} is no folder")
    assert "Traceback" not in done.stderr


def test_odd_entries_are_left_out_and_counted(tmp_path):
    rows = [3, None, {"loss": 1.0}, {"step": "4", "loss": 1.0}, {"step": True}, {"step": 10**30, "loss": 1}]
    rows += [{"step": 1, "loss": None, "grad_norm": True}, {"step": 2, "loss": [1], "muon/lr": {"a": 1}}]
    page = make_page(
        tmp_path, make_run(tmp_path / "run", [*rows, {"step": 7, "loss": 2.5}], global_step="x", max_steps=[])
    )
    assert "run: 6 entries of the log have no step and were left out." in page.text
    assert page.alts == {"Training loss": "Training loss: run 2.5 at step 7."}


def test_a_config_that_transformers_cannot_build_leaves_the_rest_standing(tmp_path):
    run = make_run(tmp_path / "run", log(30, loss=1.0))
    for text in ("{", '{"model_type": "no such"}', '{"model_type": "qwen2", "hidden_size": "wide"}'):
        (run / "config.json").write_text(text)
        page = make_page(tmp_path, run)
        assert "Training loss" in page.figures and "run: not routed: " in page.text


def test_nothing_of_a_run_becomes_markup(tmp_path):
    bad = "<img src=x onerror=alert(1)>&$a^{$_{{ 7 * 7 }}\x01"
    rows = [{"step": s, "loss": 1.0, f"muon/update_rms/{bad}": 0.1, f"eval_{bad}_loss": 2.0} for s in (1, 2)]
    run = make_run(tmp_path / bad, rows, model=tiny.qwen2())
    (run / "README.md").write_text(f"## Optimizer\n\n| | |\n|---|---|\n| {bad[:-1]} | <script>x</script> |\n", "utf-8")
    config = json.loads((run / "config.json").read_text()) | {"transformers_version": bad}
    (run / "config.json").write_text(json.dumps(config))
    page = make_page(tmp_path, run, make_run(tmp_path / "_hidden", rows), "--labels", bad, "_hidden")
    assert "<script>x</script>" in page.text and "{{ 7 * 7 }}" in page.text  # as text
    names = {tag for tag, _ in page.tags}
    assert "script" not in names and "link" not in names
    assert all(not key.startswith("on") for _, attrs in page.tags for key in attrs)
    for title in page.figures:
        words = " ".join(page.svg(title).itertext())  # no parser error: what breaks XML is not in it
        assert "_hidden" in words or "Update RMS" in title
    assert_self_contained(page)


def assert_self_contained(page):
    for _tag, attrs in page.tags:
        for key in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert (attrs.get(key) or "#").startswith(("data:image/", "#")), attrs
    assert ("meta", {"http-equiv": "Content-Security-Policy"}.items()) <= ("meta", page.tags[3][1].items())
    assert "url(" not in page.html and "@import" not in page.html
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def save_optimizer(run, model, **options):
    optimizer = hf_muon.Muon(param_groups(model, MuonConfig(**options)), lr=3e-3, weight_decay=0.1)
    folder = run / "checkpoint-20"
    folder.mkdir()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def test_settings_and_routing_are_checked_by_the_checkpoint(tmp_path):
    model = tiny.qwen2()
    run = make_run(tmp_path / "muon", full_log(20), model=model)
    save_optimizer(run, model, ns_steps=7)
    page = make_page(tmp_path, run)
    assert "Muon: checkpoint-20/optimizer.pt" in page.text and "ns_steps 7 -" in page.text
    assert "lr 0.003 0.003" in page.text and "Muon: its optimizer.pt has the same parameters" in page.text
    assert "set to 0.2" in " ".join(page.svg("Update RMS: Muon").itertext())
    other = make_run(tmp_path / "other", full_log(20), model=model)
    save_optimizer(other, model, exclude=("*q_proj*",))
    text = make_page(tmp_path, other).text
    assert (
        "other was trained otherwise, as its optimizer.pt shows: 2 parameters, such as model.layers.0.self_attn.q"
        in text
    )


class Touch:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_pickle_of_a_run_is_executed(tmp_path):
    run = make_run(tmp_path / "run", log(20, loss=1.0))
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt"):
        torch.save({"param_groups": [Touch(tmp_path / "touched")]}, run / name)
    page = make_page(tmp_path, run)
    assert not (tmp_path / "touched").exists()
    assert "optimizer.pt was not read: " in page.text
    torch.load(run / "optimizer.pt", weights_only=False)
    assert (tmp_path / "touched").exists()  # it would have been seen


@pytest.mark.parametrize(
    "state",
    [
        3, {}, {"param_groups": 3}, {"param_groups": [3]}, {"param_groups": [{"params": [], "algorithm": [1]}]},
        {"param_groups": [{"params": 1}]}, {"param_groups": [{"params": [], "param_names": [[1]]}]},
    ],
)  # fmt: skip
def test_an_optimizer_file_of_another_kind_is_named_and_left_out(tmp_path, state):
    run = make_run(tmp_path / "run", log(20, loss=1.0))
    torch.save(state, run / "optimizer.pt")
    page = make_page(tmp_path, run)
    assert "Optimizer settings" not in page.headings() and "optimizer.pt was not read: " in page.text


def test_model_card_tables_are_shown(tmp_path):
    run = make_run(tmp_path / "run", log(20, loss=1.0))
    card = (
        "# Card\n| no | row |\n## Optimizer\n\n| | |\n|---|---|\n| algorithm | Muon (hf_muon 9.9) |\n| ns_steps | 5 |\n"
    )
    card += (
        "### Training hyperparameters\n- learning_rate: 0.004\n### Framework versions\n\n- TRL: 1.2.3\n- Pytorch: 4.5\n"
    )
    (run / "README.md").write_text(card)
    text = make_page(tmp_path, run).text
    assert "value algorithm Muon (hf_muon 9.9) ns_steps 5 run: model card, training hyperparameters" in text
    assert "learning_rate 0.004" in text and "TRL 1.2.3, Pytorch 4.5" in text and "no row" not in text


def spectra_folder(tmp_path):
    means = {"Muon": {"100": {"AttnQO": 0.9}, "20": {"AttnQO": 0.8, "Dense": 0.7}}, "else": {"20": {"AttnQO": 0.5}}}
    compare = {"A": "Muon", "B": "else", "share_higher": 0.5, "by_step": {"20": 0.25}}
    found = {
        "mean_by_group": {"entropy": means},
        "compare": compare,
        "figures": ["entropy.png", "../singular_values.png"],
    }
    folder = tmp_path / "spectra"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(found))
    (tmp_path / "singular_values.png").write_bytes(b"\x89PNG\r\n\x1a\n outside")
    return folder


def test_the_spectra_folder_is_drawn_in_order_and_nothing_outside_is_read(tmp_path):
    page = make_page(tmp_path, make_run(tmp_path / "muon", log(20, loss=1.0)), "--spectra", spectra_folder(tmp_path))
    assert page.alts["SVD entropy, AttnQO"] == (
        "SVD entropy, AttnQO: Muon 0.8 at step 20, 0.9 at step 100; else 0.5 at step 20."
    )
    assert "step 20 share 25%" in page.text
    assert (
        "singular_values.png is no PNG image" in page.text and base64.b64encode(b" outside").decode() not in page.html
    )


@pytest.mark.parametrize(
    "text", ["{}", "{", '{"mean_by_group": {"entropy": {"a": {"x": {"g": 1}}}}}', '{"mean_by_group": 3}']
)
def test_another_folder_as_spectra_is_an_error(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json is "):
        make_page(tmp_path, make_run(tmp_path / "muon", log(20, loss=1.0)), "--spectra", tmp_path)


def test_equal_names_are_told_apart():
    assert report.distinct(["a", "a", "b", "a"]) == ["a", "a (2)", "b", "a (3)"]
    assert report.distinct(["a (2)", "a", "a"]) == ["a (2)", "a", "a (3)"]


@pytest.mark.parametrize(
    "values", [[0, 0], [1e149, -1e149], [5e-324, 1.0], [-1, -1], [1e-149, 1e149], [7], [1e149, 1e149]]
)
def test_extreme_values_are_drawn(values):
    figure = chart("t", [Line("x", Series(list(range(len(values))), list(map(float, values))))], ylabel="y")
    text = " ".join(ElementTree.fromstring(base64.b64decode(figure.source.partition("base64,")[2])).itertext())
    assert "nan" not in text and "inf" not in text


MEASURE = """<!DOCTYPE html><iframe src="{name}" width="{width}" height="900" style="border:0"></iframe>
<pre id="found"></pre><script>onload = () => {{
  const inside = document.querySelector("iframe").contentWindow, page = inside.document;
  const images = [...page.images];
  document.getElementById("found").textContent = "FOUND" + JSON.stringify({{
    width: inside.innerWidth, content: page.documentElement.scrollWidth, headings: page.querySelectorAll("h2").length,
    images: images.length, decoded: images.filter(i => i.complete && i.naturalWidth > 0).length,
    requests: inside.performance.getEntriesByType("resource").map(e => e.name)}}) + "DNUOF"; }}</script>"""


def browse(page, profile, width=360):
    """Open the page in a frame of this width: sizes, images, requests, and what the console says."""
    frame = page.with_name("frame.html")
    frame.write_text(MEASURE.format(name=page.name, width=width))
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--allow-file-access-from-files", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom",
        frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    match = re.search("FOUND({.*?})DNUOF", done.stdout.partition("</script>")[0])
    assert match, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(match[1]), "console": console}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium): no browser looked")
def test_a_browser_shows_it_without_a_request_an_error_or_sideways_scrolling(tmp_path):
    model = tiny.qwen2()
    runs = [make_run(tmp_path / name, full_log(300), model=model) for name in ("muon", "a-name-that-" + "is-long-" * 8)]
    save_optimizer(runs[0], model)
    page = make_page(tmp_path, *runs, "--spectra", spectra_folder(tmp_path))
    file = tmp_path / "out" / "report.html"
    for width in (360, 1200):
        found = browse(file, tmp_path / "profile", width)
        assert found["width"] == width and found["content"] == width
        assert found["images"] == found["decoded"] == len(page.figures) > 15
        assert found["headings"] == len(page.headings())
        assert found["requests"] == [] and found["console"] == []
    # The same eyes see what they should not find above.
    bad = tmp_path / "out" / "bad.html"
    bad.write_text(
        '<h2>x</h2><div style="width:900px">x</div><img src="http://127.0.0.1:9/x.png"><script>no()</script>'
    )
    found = browse(bad, tmp_path / "profile")
    assert found["content"] > 360 and found["decoded"] == 0 and found["images"] == 1
    assert found["requests"] == ["http://127.0.0.1:9/x.png"] and len(found["console"]) > 0
