"""The matrices in one hidden parameter, read from the module that owns it: Linears, convolutions and raw parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .fused import Cut, Site, find_cut
from .matrices import MatrixLayout
from .roles import is_convolution, peek


@dataclass(frozen=True)
class Place:
    """One parameter and the modules above it, from the model down to the module that holds it."""

    name: str
    shape: tuple[int, ...]
    path: tuple[nn.Module, ...] = field(repr=False)

    @property
    def parts(self) -> list[str]:
        """The components of the name."""
        return self.name.split(".")

    @property
    def attr(self) -> str:
        """What the owning module calls the parameter."""
        return self.parts[-1]

    @property
    def module(self) -> nn.Module:
        """The owning module."""
        return self.path[-1]

    @property
    def configs(self) -> tuple[Any, ...]:
        """Configs of the modules above, the nearest first."""
        return tuple(c for c in (getattr(m, "config", None) for m in reversed(self.path)) if c is not None)

    def up(self, levels: int) -> Place:
        """The module ``levels`` above as if it were the parameter: its name, and the modules above it."""
        # A model that is one bare layer has nothing above it.
        return Place(".".join(self.parts[:-levels]), self.shape, self.path[:-levels] or self.path[:1])

    def site(self, outputs: int, inputs: int) -> Site:
        """The owners of this place, through wrappers that hold no other matrix, for the rules of fused weights."""
        owners, attrs = [self.path[-1]], [self.attr]
        for owner, attr in zip(reversed(self.path[:-1]), reversed(self.parts[:-1]), strict=False):
            inner = owners[-1]
            wrapper = hasattr(inner, "base_layer") or isinstance(inner, (nn.ModuleList, nn.Sequential))
            if not wrapper and sum(len(shape_of(p)) > 1 for p in inner.parameters()) > 1 or len(owners) == 4:
                break
            owners.append(owner)
            attrs.append(attr)
        return Site(outputs, inputs, tuple(owners), tuple(attrs), self.configs)


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole parameter; under DeepSpeed's ``zero.Init`` the tensor itself is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Options:
    """The two choices of MuonConfig that change layouts."""

    split: bool = True
    per_head: bool = False


def module_layout(place: Place, options: Options) -> MatrixLayout | None:
    """The layout of the ``weight`` of a Linear, a convolution or the like; ``None`` for any other parameter."""
    module, shape = place.module, place.shape
    if place.attr != "weight" or len(shape) < 2:
        return None
    if is_convolution(module):
        return _convolution(place, options)
    if isinstance(module, nn.Bilinear):
        return MatrixLayout(shape, batch=1)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' transposed Linear (GPT-2)
        return cut_layout(place.up(1), options, outputs=1)
    if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
        groups = getattr(module, "n_groups", 1)  # block-diagonal: as many Linears as groups, one after the other
        return MatrixLayout(shape, groups=groups) if groups > 1 else cut_layout(place.up(1), options)
    return None


def cut_layout(place: Place, options: Options, outputs: int = 0) -> MatrixLayout:
    """A 2-D weight whose dimension ``outputs`` holds the outputs, cut as the forward at ``place`` does."""
    shape = place.shape
    site = place.site(shape[outputs], shape[1 - outputs])
    cut = find_cut(site) if options.split else None
    heads = _heads(site, cut) if options.per_head else ()
    if heads == (0,):  # an output projection: its inputs are the heads
        return MatrixLayout(
            shape, dim=1 - outputs, sizes=(site.inputs,), heads=(site.heads or 1,), transposed=outputs == 1
        )
    sizes = cut.sizes if cut else ((site.outputs,) if heads else ())
    return MatrixLayout(
        shape,
        dim=outputs if sizes else 0,
        blocks=cut.blocks if cut else 1,
        sizes=sizes,
        heads=heads,
        transposed=outputs == 1,
    )


# What attention projections are called; only per_head asks.
_QUERY = re.compile(r"^(to_|linear_|project_|w)?q(uery|uer)?(_proj|_lin|_b_proj|_attn|_head)?$", re.IGNORECASE)
_KEY_VALUE = re.compile(r"^(to_|linear_|project_|w)?(k|v|key|value|kv_b)(_proj|_lin|_head)?$", re.IGNORECASE)
_OUTPUT = re.compile(r"^((to_|linear_|w)?o(ut)?(_proj|_lin)?|out_proj|o_proj|c_proj|dense|wo)$", re.IGNORECASE)


def _heads(site: Site, cut: Cut | None) -> tuple[int, ...]:
    """Heads per piece, ``(0,)`` for an output projection, ``()`` where there are none."""
    if not any("attention" in type(o).__name__.lower() or "attn" in type(o).__name__.lower() for o in site.owners):
        return ()
    if cut and cut.heads:
        return cut.heads
    for attr in site.attrs:
        for pattern, heads, length in (
            (_QUERY, site.heads, site.outputs),
            (_KEY_VALUE, site.kv_heads, site.outputs),
            (_OUTPUT, site.heads, site.inputs),
        ):  # fmt: skip
            if pattern.match(attr):
                if not heads or length % heads:
                    raise ValueError(f"per_head: the heads of attention weight {attr} ({heads}) do not divide {length}")
                return (0,) if pattern is _OUTPUT else (heads,)
    return ()


def _convolution(place: Place, options: Options) -> MatrixLayout:
    """Output channels by input channels times window, per group; transposed convolutions store inputs first."""
    module, shape = place.module, place.shape
    transposed = getattr(module, "transposed", False)
    cut = None
    if options.split and not transposed and module.groups == 1:
        cut = find_cut(place.up(1).site(shape[0], shape[1]))
    return MatrixLayout(
        shape,
        groups=peek(module, "groups"),
        blocks=cut.blocks if cut else 1,
        sizes=cut.sizes if cut else (),
        transposed=transposed,
    )


# Raw parameters that are matrices, by class and attribute: how many leading dimensions count matrices, whether stored
# [in, out], and the attributes that cut the rows.
RAW: tuple[tuple[str, int, bool, tuple[str, ...]], ...] = (
    ("XLNetRelativeAttention.[qkvr]", 0, True, ()), ("XLNetRelativeAttention.o", 0, False, ()),
    ("FunnelRelMultiheadAttention.r_kernel", 0, True, ()), ("RecurrentGemmaRglru.*_gate_weight", 1, True, ()),
    ("ZambaMambaMixer.x_proj_weight", 1, False, ("time_step_rank", "ssm_state_size", "ssm_state_size")),
    ("ZambaMambaMixer.dt_proj_weight", 1, False, ()), ("*.mm_input_projection_weight", 0, True, ()),
)  # fmt: skip
# Attribute names of learned constants: they are looked up or added, never multiplied with hidden states.
_TABLE = re.compile(
    r"pos(ition)?_|pos$|rel_|embed|emb_|emb$|token|quer(y|ies)|latent|prompt|bias|scale|codevector|mask|pad_|A_log|probe|prototype"
)


def raw_layout(place: Place, options: Options) -> tuple[str, MatrixLayout] | None:
    """Kind and layout of a parameter that no Linear or convolution owns; ``None`` if it is no matrix.

    Raises:
        ValueError: it looks like a stack of matrices, and nothing says how to read it.
    """
    module, attr, shape = place.module, place.attr, place.shape
    if len(shape) < 2 or attr.endswith("bias"):
        return None
    if isinstance(module, nn.MultiheadAttention) and attr.endswith("weight"):
        pieces = 3 if attr == "in_proj_weight" and options.split else 1
        heads = (module.num_heads,) * pieces if options.per_head else ()
        sizes = (shape[0] // pieces,) * pieces if pieces > 1 or heads else ()
        return "attention", MatrixLayout(shape, sizes=sizes, heads=heads)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        gates = shape[0] // module.hidden_size if options.split else 1
        return "recurrent", MatrixLayout(shape, sizes=(module.hidden_size,) * gates if gates > 1 else ())
    for pattern, batch, transposed, names in RAW:
        if fnmatchcase(f"{type(module).__name__}.{attr}", pattern):
            sizes = tuple(getattr(module, n) for n in names) if options.split else ()
            return "projection", MatrixLayout(shape, batch=batch, sizes=sizes, transposed=transposed)
    if len(shape) == 2 and attr == "weight" and shape[0] in _expert_counts(place):
        return "router", MatrixLayout(shape)
    experts = _experts(place, options)
    if experts is not None:
        return "experts", experts
    stack = len(shape) > 2 and min(shape[-2:]) > 1 and shape[-3] > 1
    if stack and not _TABLE.search(attr) and not is_convolution(module) and "parametrizations" not in place.parts:
        raise ValueError(
            f"raw parameter of {type(module).__name__} looks like a stack of matrices of an unknown layout"
        )
    return None


_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts", "num_experts_total")


def _expert_counts(place: Place) -> set[int]:
    """Numbers of experts that the module, or the experts beside it, give."""
    counts = {getattr(place.module, name, None) for name in _COUNTS}
    beside = []
    for sibling in place.path[-2].children() if len(place.path) > 1 else ():
        if "experts" in type(sibling).__name__.lower():
            beside.append(
                max((shape_of(p)[0] for p in sibling.parameters(recurse=False) if len(shape_of(p)) > 2), default=0)
            )
        elif isinstance(sibling, nn.ModuleList):
            beside.append(len(sibling))
    # Shared experts may be routed too: the router then scores both kinds.
    return {c for c in (*counts, *beside, sum(beside)) if isinstance(c, int) and c > 1}


def _experts(place: Place, options: Options) -> MatrixLayout | None:
    """One matrix per expert; gate and up apart where the matrix is twice as wide as what ``down`` reads."""
    module, shape = place.module, place.shape
    if not ("expert" in type(module).__name__.lower() or hasattr(module, "has_gate") or hasattr(module, "num_experts")):
        return None
    if len(shape) == 2 and getattr(module, "moe_num_experts", 0) > 1:  # DBRX: all experts' rows in one 2-D weight
        return MatrixLayout(shape, groups=peek(module, "moe_num_experts"), transposed=place.attr == "w2")
    if len(shape) != 3:
        return None
    others = [shape_of(p) for m in _with_sibling_experts(place) for p in m.parameters(recurse=False)]
    # gate_up [E, 2I, H] beside down [E, H, I]; stored transposed [E, H, 2I] beside [E, I, H]
    dim = next((d for s in others if len(s) == 3 for d in (0, 1) if _is_gate_up(shape, s, d)), None)
    if dim is None:
        if "gate_up" in place.attr or "gate_and_up" in place.attr:
            raise ValueError(f"fused gate and up of {type(module).__name__} {list(shape)} match no down projection")
        transposed = any(_is_gate_up(s, shape, 1) for s in others if len(s) == 3)
        return MatrixLayout(shape, batch=1, transposed=transposed or getattr(module, "is_transposed", False))
    sizes, blocks = (shape[1 + dim] // 2,) * 2, 1
    if getattr(module, "is_concatenated", True) is False:
        sizes, blocks = (1, 1), sizes[0]
    if not options.split:
        return MatrixLayout(shape, batch=1, transposed=dim == 1)
    return MatrixLayout(shape, batch=1, dim=dim, blocks=blocks, sizes=sizes, transposed=dim == 1)


def _is_gate_up(up: tuple[int, ...], down: tuple[int, ...], dim: int) -> bool:
    return (up[1 + dim], up[2 - dim]) == (2 * down[2 - dim], down[1 + dim])


def _with_sibling_experts(place: Place) -> list[nn.Module]:
    """The module itself, and modules of its class beside it (JetMoE keeps its two experts' weights in two)."""
    siblings = place.path[-2].children() if len(place.path) > 1 else ()
    return [place.module, *(m for m in siblings if type(m) is type(place.module))]
