"""Every model family that transformers can build: routed whole, and cut where its forward cuts.

The oracle for cuts is ``column_trace``: it watches a forward on the meta device and reports which rows of each weight
are used together. It knows nothing of the router's rules.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.auto import modeling_auto

from hf_muon import MuonConfig
from hf_muon.matrices import MatrixLayout
from hf_muon.report import Report
from hf_muon.routing import Route, route

from .column_trace import ColumnTrace

# Weights whose forward uses parts of them apart, and which stay whole on purpose; everything else must match exactly.
# Shares of every head (rotary or not, rope or nope) need no entry: see ``within_heads``.
WHOLE = {
    "*.kv_a_proj_with_mqa": "MLA's latent and its rope part: one matrix in Moonlight's own training",
    "*.kv_b_proj": "MLA's keys and values, head by head: one matrix there too",
    "DiffLlamaAttention.v_proj": "two halves of the heads, as heads are",
    "InklingMoE.gate": "scores of routed and of shared experts: one router",
    "ZambaMambaMixer.*": "two Mamba heads, as heads are",
}
DIMS = (
    "head_dim",
    "qk_head_dim",
    "index_head_dim",
    "indexer_head_dim",
    "head_size",
    "attention_head_size",
    "v_head_dim",
)


@dataclass
class Survey:
    """What one pass over all families found; the tests below only look."""

    built: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    causal: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)
    wrong_cuts: list[str] = field(default_factory=list)
    traced: dict[str, int] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    cuts_seen: int = 0


@pytest.fixture(scope="module")
def survey():
    found = Survey(causal={f for f in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if f in families.families()})
    for family in families.families():
        try:
            model = families.build(family)
        except families.CannotBuild as error:
            found.missing[family] = str(error)
            continue
        try:
            routes = route(model)
        except ValueError as error:
            found.problems[family] = str(error)
            continue
        found.built[family] = len(routes)
        problem = check(model, routes)
        if problem:
            found.problems[family] = problem
        if family in found.causal:
            trace_family(family, model, routes, found)
    return found


def check(model: nn.Module, routes: list[Route]) -> str:
    """Coverage, embeddings and heads, shapes; an empty string when all is well."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    if [r.name for r in routes] != names:
        return f"routes {len(routes)} parameters of {len(names)}, or in another order"
    muon = {id(r.parameter): r.name for r in routes if r.algorithm == "muon"}
    for module in model.modules():
        tables = [module] if isinstance(module, nn.Embedding) else []
        for method in ("get_input_embeddings", "get_output_embeddings"):
            if hasattr(type(module), "base_model_prefix"):
                try:
                    tables.append(getattr(module, method)())
                except Exception:  # many models cannot say
                    continue
        for table in tables:
            if isinstance(table, (nn.Embedding, nn.Linear)) and id(table.weight) in muon:
                return f"{muon[id(table.weight)]} is an embedding or head under Muon"
    for r in routes:
        if r.layout is not None and r.layout.shape != tuple(r.parameter.shape):
            return f"{r.name}: layout of {r.layout.shape}"
        if r.algorithm == "muon" and min(min(a, b) for _, a, b in r.layout.matrices()) < 1:
            return f"{r.name}: an empty matrix"
    return ""


def trace_family(family: str, model: nn.Module, routes: list[Route], found: Survey) -> None:
    """Compare the cuts of one family with what its forward does."""
    modules = dict(model.named_modules())
    watched, seen = {}, set()
    for r in routes:
        parts = r.name.split(".")
        key = (type(modules[".".join(parts[:-2])]).__name__, *parts[-2:], r.layout)
        if r.algorithm == "muon" and key not in seen:  # one weight of each sort is enough
            seen.add(key)
            watched[r.name] = r
    thin(model, watched)
    trace, error = run(model, watched)
    read = 0
    for name, r in watched.items():
        components = trace.components(name)
        read += bool(components)
        found.cuts_seen += bool(components) and len(r.layout.sizes) > 1
        parts = name.split(".")
        owner = modules[".".join(parts[:-2])]
        if components and not agrees(r.layout, components, parts[-2], owner):
            found.wrong_cuts.append(
                f"{family}: {type(owner).__name__}.{parts[-2]} {r.layout.shape} "
                f"cut {r.layout.blocks} x {r.layout.sizes}; "
                f"its forward uses together {[len(c) for c in components][:8]}"
            )
    found.traced[family] = read
    if read < len(watched):
        found.untraced[family] = f"{read} of {len(watched)} read; {error}"


def thin(model: nn.Module, keep: dict[str, Route]) -> None:
    """Drop the layers of a stack that hold none of the watched weights; they only cost time."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ModuleList) and len(module) > 4:
            used = [c for i, c in enumerate(module) if any(n.startswith(f"{name}.{i}.") for n in keep)]
            if used and all(type(c) is type(used[0]) for c in module):
                module._modules = {str(i): c for i, c in enumerate(used)}


def run(model: nn.Module, watched: dict[str, Route]) -> tuple[ColumnTrace, str]:
    """A forward on meta tensors, and what stopped it; how far it gets is how much is traced."""
    model.eval().to(torch.bfloat16)  # grouped products of experts exist in bfloat16 only
    trace = ColumnTrace({n: r.parameter for n, r in watched.items()})
    inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}
    accepted = inspect.signature(model.forward).parameters
    inputs |= {"use_cache": False} if "use_cache" in accepted else {}
    try:
        with torch.no_grad(), trace:
            model(**inputs)
    except Exception as error:  # the rest of the forward is lost, not the test
        return trace, f"{type(error).__name__}: {str(error)[:100]}"
    return trace, ""


def coordinates(layout: MatrixLayout, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrix of the batch, piece, and place within that piece, from element offsets; not by MatrixLayout's own code."""
    index = np.unravel_index(offsets, layout.shape)
    matrix = np.zeros_like(offsets)
    for i in range(layout.batch):
        matrix = matrix * layout.shape[i] + index[i]
    rows = layout.shape[layout.batch] // layout.groups
    matrix, row = matrix * layout.groups + index[layout.batch] // rows, index[layout.batch] % rows
    column = np.ravel_multi_index(index[layout.batch + 1 :], layout.shape[layout.batch + 1 :])
    place = column if layout.dim or layout.transposed else row
    sizes = np.array(layout.sizes or (place.max() + 1,))
    block, within = place // sizes.sum(), place % sizes.sum()
    piece = np.searchsorted(np.cumsum(sizes), within, side="right")
    return matrix, piece, block * sizes[piece] + within - (np.cumsum(sizes) - sizes)[piece]


def agrees(layout: MatrixLayout, components: list[np.ndarray], attr: str, owner: nn.Module) -> bool:
    """Every component lies in one piece, and every piece is one component (or one share of every head)."""
    by_piece: dict[tuple[int, int], list[np.ndarray]] = {}
    for rows in components:
        matrix, piece, within = coordinates(layout, rows)
        if len(np.unique(piece)) > 1:
            return False
        for m in np.unique(matrix):  # a batched product reads all experts at once; they are no less separate
            by_piece.setdefault((int(m), int(piece[0])), []).append(within[matrix == m])
    shared = [parts for parts in by_piece.values() if len(parts) > 1]
    name = f"{type(owner).__name__}.{attr}"
    whole = any(fnmatchcase(name, pattern) for pattern in WHOLE)
    return not shared or whole or all(within_heads(parts, owner) for parts in shared)


def within_heads(parts: list[np.ndarray], owner: nn.Module) -> bool:
    """Whether the parts take the same share of every head (rotary or not, nope or rope): still one matrix of q or k."""
    configs = (owner, getattr(owner, "config", None))
    for dim in {d for place in configs for name in DIMS if isinstance(d := safe(place, name), int) and d > 1}:
        shares = [set((p % dim).tolist()) for p in parts]
        if sum(map(len, shares)) == len(set().union(*shares)):
            return True
    return False


def safe(place: object, name: str) -> object:
    try:
        return getattr(place, name, None)
    except Exception:  # configs whose layers differ refuse to give one value
        return None


def test_every_family_is_routed_whole_without_embeddings_or_heads(survey):
    assert not survey.problems
    assert len(survey.built) >= 600


def test_causal_language_models_are_built_without_exception(survey):
    assert survey.causal <= set(survey.built), {f: survey.missing[f] for f in survey.causal - set(survey.built)}


def test_what_cannot_be_built_is_known(survey):
    broken = {f: why for f, why in survey.missing.items() if not why.startswith("part of another family")}
    wants = ("timm", "detectron2", "natten", "scipy", "torchaudio")
    unexplained = {f for f, why in broken.items() if "ImportError" not in why or not any(w in why for w in wants)}
    assert len(unexplained) <= 12, unexplained


def test_every_weight_is_cut_as_its_forward_uses_it(survey):
    assert not survey.wrong_cuts, "\n".join(survey.wrong_cuts)


def test_the_trace_saw_almost_every_language_model(survey):
    assert survey.cuts_seen > 100
    complete = survey.causal - set(survey.untraced)
    assert len(complete) >= 0.8 * len(survey.causal), survey.untraced


class TestTheOracleCanFail:
    def traced(self, family: str, ending: str):
        model = families.build(family)
        name, r = next((r.name, r) for r in route(model) if r.name.endswith(ending))
        trace, _ = run(model, {name: r})
        owner = dict(model.named_modules())[name.rsplit(".", 2)[0]]
        return r.layout, trace.components(name), ending.split(".")[-2 if ending.endswith("weight") else -1], owner

    @pytest.mark.parametrize(
        ("family", "ending", "broken"),
        [
            ("gpt_neox", "query_key_value.weight", dict(blocks=1, sizes=(6144, 6144, 6144))),
            ("gpt_neox", "query_key_value.weight", dict(blocks=1, sizes=())),
            ("phi3", "gate_up_proj.weight", dict(blocks=8192, sizes=(1, 1))),
            ("phi3", "gate_up_proj.weight", dict(sizes=())),
            ("gpt_oss", "experts.gate_up_proj", dict(blocks=1, sizes=(2880, 2880))),
            ("mamba2", "in_proj.weight", dict(sizes=(8192, 8192, 1024, 1152))),
            ("codegen", "qkv_proj.weight", dict(blocks=1, sizes=(4096, 4096, 4096))),
        ],
    )
    def test_a_wrong_cut_is_seen(self, family, ending, broken):
        layout, components, attr, owner = self.traced(family, ending)
        assert components and agrees(layout, components, attr, owner)
        wrong = MatrixLayout(
            **{**{k: getattr(layout, k) for k in ("shape", "batch", "dim", "blocks", "sizes", "transposed")}, **broken}
        )
        assert not agrees(wrong, components, attr, owner)


# Falcon picks its heads with index tensors, whose values meta tensors do not have; so on real, small models.
@pytest.mark.parametrize(
    "variant",
    [dict(multi_query=True), dict(multi_query=False), dict(new_decoder_architecture=True, num_kv_heads=2)],
)  # fmt: skip
def test_falcon_is_cut_as_its_forward_uses_it(variant):
    torch.manual_seed(0)
    variant = {"new_decoder_architecture": False, **variant}
    model = hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **variant)
    )
    name, r = next((r.name, r) for r in route(model) if "query_key_value" in r.name)
    trace = ColumnTrace({name: r.parameter})
    with torch.no_grad(), trace:
        model(input_ids=torch.arange(5)[None])
    owner = model.transformer.h[0].self_attention
    assert len(trace.components(name)) >= 3
    assert agrees(r.layout, trace.components(name), "query_key_value", owner)


def share(model: nn.Module) -> tuple[Report, int]:
    report = Report(tuple(route(model, MuonConfig())))
    outside = sum(r.parameter.numel() for r in report.routes if r.kind in ("embedding", "head"))
    return report, report.numel() - outside


def test_moonlight_is_95_percent_muon_per_expert():
    values = json.loads((Path(__file__).parent / "data" / "moonlight_config.json").read_text())
    config = hf.DeepseekV3Config(
        **{k: v for k, v in values.items() if k not in ("auto_map", "architectures", "quantization_config")}
    )
    with torch.device("meta"):
        model = hf.DeepseekV3ForCausalLM(config)
    report, hidden = share(model)
    assert hidden == pytest.approx(15.29e9, rel=1e-3)
    assert report.numel("muon") >= 0.95 * hidden
    experts = [r for r in report.routes if r.kind == "experts"]
    assert {r.layout.count for r in experts} == {64}
    # Per layer 64 gates, 64 ups, 64 downs; gate and up of [1408, 2048] each.
    assert sum(r.layout.total() for r in experts) == 26 * 64 * 3
    assert {m[1:] for r in experts for m in r.layout.matrices()} == {(1408, 2048), (2048, 1408)}
    assert sum(r.kind == "router" for r in report.routes) == 26


def test_qwen25_7b():
    config = hf.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.Qwen2ForCausalLM(config)
    report, hidden = share(model)
    assert report.numel() == 7_615_616_512
    assert report.numel("muon") == hidden - sum(
        r.parameter.numel() for r in report.routes if r.kind in ("norm", "bias")
    )
    assert sum(r.layout.total() for r in report.routes if r.layout) == 28 * 7
