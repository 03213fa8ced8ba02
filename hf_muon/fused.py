"""Where a fused weight is cut: which of its outputs the forward uses apart.

Nothing in a checkpoint says whether 3 x 4096 outputs are q, k, v one after the other or head by head, so one table
holds what transformers' forwards do, keyed by the class and attribute that own the weight. Sizes always come from the
module or its config, and must add up to the weight. What looks fused and is in no row is an error, never a guess.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from torch import nn

from .roles import peek


@dataclass(frozen=True)
class Cut:
    """``blocks`` repetitions of ``sizes`` along the outputs; ``heads`` per piece where they are known."""

    sizes: tuple[int, ...]
    blocks: int = 1
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Site:
    """A weight and the modules around it: ``owners[0]`` calls it ``attrs[0]``, ``owners[1]`` calls that ``attrs[1]``...

    The levels beyond the first are wrappers that hold this one matrix (a Linear with its norm, a PEFT layer), whose
    own name is the one that says what the matrix is.
    """

    outputs: int
    inputs: int
    owners: tuple[nn.Module, ...]
    attrs: tuple[str, ...]
    configs: tuple[Any, ...] = ()

    def get(self, *names: str) -> Any:
        """The first of ``names`` that an owner or a config knows, owners first, innermost first."""
        for place in (*self.owners, *self.configs):
            for name in names:
                value = peek(place, name)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    return int(value)
        return None

    @property
    def heads(self) -> Any:
        """Number of query heads."""
        return self.get("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")

    @property
    def kv_heads(self) -> Any:
        """Number of key-value heads."""
        return self.get("num_key_value_heads", "num_kv_heads", "kv_n_heads") or self.heads

    @property
    def head_dim(self) -> Any:
        """Width of a head."""
        known = self.get("head_dim", "attention_head_size", "head_size", "d_head", "dim_head")
        return known or (self.inputs // self.heads if self.heads else None)


Rule = Callable[[Site], Cut | None]


def _whole(site: Site) -> None:
    return None


def _equal(pieces: int, blocks: int = 1) -> Rule:
    return lambda site: Cut((site.outputs // (pieces * blocks),) * pieces, blocks)


def _sizes(*names: str, blocks: str = "") -> Rule:
    """Pieces whose lengths are attributes of the owner, repeated ``blocks`` (an attribute) times."""

    def rule(site: Site) -> Cut:
        return Cut(tuple(site.get(name) or 0 for name in names), site.get(blocks) if blocks else 1)

    return rule


def _qkv(site: Site) -> Cut:
    """q, k, v one after the other, or k, v where queries come from elsewhere (cross attention)."""
    heads, kv, dim = site.heads, site.kv_heads, site.head_dim
    if heads and dim and (heads + 2 * kv) * dim == site.outputs:
        return Cut((heads * dim, kv * dim, kv * dim), 1, (heads, kv, kv))
    # Without fewer key-value heads all are equally long; with them, unequal sizes that do not add up are an error.
    pieces = 2 if site.outputs == 2 * site.inputs else 3
    known = heads and heads == kv and site.outputs % (pieces * heads) == 0
    if known or site.outputs == pieces * site.inputs:
        return Cut((site.outputs // pieces,) * pieces, 1, (heads,) * pieces if known else ())
    return Cut((heads or 0, kv or 0, kv or 0), dim or 0)


def _qkv_by_head(site: Site) -> Cut:
    """q, k, v of one key-value head after another: [heads, 3, d] (GPT-NeoX, BLOOM), Falcon's [kv, q..., k, v, d]."""
    heads, kv, dim = site.heads or 1, site.kv_heads or 1, site.head_dim or 0
    return Cut((heads // kv * dim, dim, dim), kv, (heads, kv, kv))


def _bigcode(site: Site) -> Cut:
    return _qkv(site) if site.kv_heads == 1 or site.outputs == 2 * site.inputs else _qkv_by_head(site)


def _query(site: Site) -> Cut | None:
    """A query projection twice as wide as its heads carries an output gate, head by head (Qwen3-Next)."""
    heads, dim = site.heads, site.head_dim
    gated = heads and dim and site.outputs == 2 * heads * dim and site.get("qk_rope_head_dim") is None
    return Cut((dim, dim), heads, (heads, heads)) if gated else None


def _mamba2(site: Site) -> Cut:
    """Z | x | B | C | dt: the forward cuts z, xBC, dt, and xBC again behind its depthwise convolution."""
    inner, heads = site.get("intermediate_size"), site.get("num_heads")
    state = (site.get("n_groups") or 1) * (site.get("ssm_state_size") or 0)
    return Cut((inner, inner, state, state, heads))


def _in_proj(site: Site) -> Cut | None:
    return _mamba2(site) if site.get("n_groups") and site.get("ssm_state_size") else _equal(2)(site)


def _qkvz(site: Site) -> Cut:
    keys, values = site.get("num_k_heads"), site.get("num_v_heads")
    value = values // keys * site.get("head_v_dim")
    return Cut((site.get("head_k_dim"),) * 2 + (value,) * 2, keys)


def _levit(site: Site) -> Cut:
    key, heads = site.get("key_dim"), site.heads or 1
    value = site.get("attention_ratio") * key
    return Cut(((key,) * (site.outputs // heads // key - site.get("attention_ratio"))) + (value,), heads)


def _chunks(site: Site) -> Cut | None:
    """Shift, scale and gate of an adaptive norm, each as wide as its input unless the module counts them."""
    return _equal(site.get("num_chunks") or site.outputs // site.inputs)(site)


def _glu(site: Site) -> Cut | None:
    """A convolution before a gated linear unit; the same name without one keeps its width."""
    return _equal(2)(site) if site.outputs == 2 * site.inputs else None


# fmt: off
# (class and attribute, rule); the first match counts. The class is named only where one attribute has two layouts.
RULES: tuple[tuple[str, Rule], ...] = (
    # Attention. MLA projections stay whole, as in Moonlight's own training: latent | rope, nope | rope, k | v per head.
    ("*.kv_a_proj*", _whole), ("*.kv_b_proj", _whole), ("*.q_[ab]_proj", _whole), ("*.w[kq]*", _whole),
    ("CodeGenAttention.qkv_proj", _equal(3, blocks=4)),  # q, v, k within each of four TPU slices
    ("MiniMaxLightningAttention.qkv_proj", lambda s: _equal(3, s.heads)(s)),
    ("*DisentangledSelfAttention.in_proj", _qkv_by_head),
    ("*.query_key_value", _qkv_by_head), ("GPTBigCodeAttention.c_attn", _bigcode),
    ("MobileViTV2*.qkv_proj", lambda s: Cut((1, s.inputs, s.inputs))),
    ("*.qkv", _qkv), ("*.qkv_proj", _qkv), ("*.[Ww]qkv", _qkv), ("*.att_proj", _qkv), ("*.c_attn", _qkv),
    ("*.in_proj_weight", _equal(3)), ("*.queries_keys_values", _levit), ("*.keys_values", _levit),
    ("*.to_kv", _equal(2)), ("*.kv", _equal(2)), ("JetMoe*.kv_proj", _equal(2)),
    ("DeepseekV4*.kv_proj", lambda s: None if s.outputs == s.head_dim else _equal(2)(s)),
    ("DeepseekV4*Compressor.gate_proj", lambda s: None if s.outputs == s.head_dim else _equal(2)(s)),
    ("DeepseekV4Indexer.gate_proj", _equal(2)),
    ("*.q_gate_proj", _sizes("qk_head_dim", "v_head_dim", blocks="num_heads")), ("*Attention.q_proj", _query),
    ("*.index_qk_proj", lambda s: Cut((s.get("index_n_heads") * s.get("index_head_dim"),
                                       s.get("index_kv_heads") * s.get("index_head_dim")))),
    # State space and linear attention.
    ("ZambaMambaMixer.in_proj", lambda s: Cut((1, 1), s.outputs // 2)), ("*MambaMixer.in_proj", _in_proj),
    ("*Mamba*.in_proj", _in_proj), ("*Mixer.in_proj", _in_proj), ("*ShortConv.in_proj", _equal(3)),
    ("*MambaMixer.x_proj", _sizes("time_step_rank", "ssm_state_size", "ssm_state_size")),
    ("*.in_proj_qkv", _sizes("key_dim", "key_dim", "value_dim")), ("*.in_proj_qkvz", _qkvz),
    ("*.in_proj_ba", lambda s: _equal(2, s.get("num_k_heads"))(s)), ("*.ifgate_preact", _equal(2)),
    ("*.qkv_opreact", _sizes("qk_dim", "qk_dim", "v_dim", "v_dim")),
    # Gate and up, and other pairs that are multiplied.
    ("*.gate_up_proj", _equal(2)), ("*.proj_up_gate_z", _equal(2)), ("*.proj_up_gate", _whole),
    ("ClvpGatedLinearUnit.proj", _equal(2)),
    ("*Gate.gate", _equal(2)), ("*.linear_start", _equal(2)),
    ("*ConvModule.up_conv", _equal(2)), ("*.pointwise_lin1", _equal(2)),
    ("*.pointwise_conv1", _glu), ("*AdapterLayer.*conv", _glu), ("*Conv*Subsampler.conv_layers", _equal(2)),
    ("*.ext_pw_conv_1d", _glu), ("VitsPosteriorEncoder.conv_proj", _equal(2)),
    ("*RepNCSPELAN*.conv1", _equal(2)), ("Deimv2CSPRepLayer.conv1", _equal(2)), ("*C2FLayer.conv1", _equal(2)),
    ("Vits*Encoder.*project", _equal(2)),
    ("*GlobalPointer.dense", _equal(2)), ("*ISTFTHead.*", _equal(2)), ("*.gru_rel_pos_linear", _equal(2)),
    ("FocalNetModulation.projection_in", lambda s: Cut((s.inputs, s.inputs, s.get("focal_level") + 1))),
    ("*AdaLayerNorm*.linear", _chunks), ("*DiffusionHead*.linear_1", _chunks), ("*.adaln_proj", _chunks),
)
# fmt: on

# Attribute names that fused projections go by; with no row above, such a weight is refused.
_FUSED_NAME = re.compile(r"qkv|query_key_value|q_?k_?v|w_?pack|gate_?up|up_?gate|c_attn|in_proj_\w\w+", re.IGNORECASE)


def find_cut(site: Site) -> Cut | None:
    """How the outputs of a Linear or convolution are cut; ``None`` when it is one matrix.

    Raises:
        ValueError: the weight looks fused and no rule knows its layout, or a rule's sizes do not add up to it.
    """
    for owner, attr in zip(site.owners, site.attrs, strict=False):
        name = f"{type(owner).__name__}.{attr}"
        rule = _rule(name)
        if rule is not None:
            return _checked(site, rule(site), name)
    for owner, attr in zip(site.owners, site.attrs, strict=False):
        if _is_gated(site, owner, attr):
            return _checked(site, _equal(2)(site), attr)
        if isinstance(owner._modules.get(attr), (nn.ModuleList, nn.Sequential)):
            continue  # the name of a whole stack, not of this matrix
        if _FUSED_NAME.search(attr) or _splits_in_source(type(owner), attr):  # type: ignore[arg-type]
            raise ValueError(f"{type(owner).__name__}.{attr} splits its {site.outputs} outputs in a way unknown here")
    return None


@cache
def _rule(name: str) -> Rule | None:
    return next((rule for pattern, rule in RULES if fnmatchcase(name, pattern)), None)


def _checked(site: Site, cut: Cut | None, name: str) -> Cut | None:
    if cut is None or cut.blocks * sum(cut.sizes) == site.outputs:
        return cut
    raise ValueError(f"{name}: pieces {cut.sizes} x {cut.blocks} do not add up to its {site.outputs} outputs")


def _is_gated(site: Site, owner: nn.Module, attr: str) -> bool:
    """Two projections in a row, the second reading half of what the first writes: a gated unit lies between."""
    children = [
        (name, list(c.modules())) for name, c in owner.named_children() if any(p.ndim > 1 for p in c.parameters())
    ]
    if len(children) != 2 or children[0][0] != attr:
        return False
    linears = [m for m in children[1][1] if isinstance(m, nn.Linear)]
    matrices = sum(p.ndim > 1 for p in children[1][1][0].parameters())
    # With as many inputs as the first, the two may as well stand side by side.
    return len(linears) == matrices == 1 and 2 * linears[0].in_features == site.outputs != 2 * site.inputs


@cache
def _splits_in_source(owner: type, attr: str) -> bool:
    """Whether the class's code cuts the features of what ``self.attr(...)`` returns; catches unknown names."""
    source = _source(owner)
    verb = r"(?:chunk|split|tensor_split|unbind|glu)\(%s[^\n]*(?:dim=-1|dim=2|, -1)\)"
    for call in re.finditer(rf"^[^\n#]*self\.{re.escape(attr)}\([^\n]*", source, re.MULTILINE):
        if re.search(r"\)\." + verb % "", call.group()):
            return True
        result = re.match(r"\s*(\w+) = ", call.group())
        if result:
            x = result.group(1)
            rest = re.split(rf"^\s*{x} = |^    def ", source[call.end() :], flags=re.MULTILINE)[0]
            if re.search(rf"\b{x}\." + verb % "", rest) or re.search(verb % rf"\s*{x}\b", rest):
                return True
    return False


@cache
def _source(owner: type) -> str:
    """The class's own code; by hand, because ``inspect.getsource`` parses the whole file once for every class."""
    module = sys.modules.get(owner.__module__)
    try:
        text = "".join(linecache.getlines(module.__file__)) if module is not None and module.__file__ else ""
    except AttributeError:  # defined in an interactive session
        return ""
    found = re.search(rf"^class {owner.__name__}\b.*?(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    return found.group() if found else ""
