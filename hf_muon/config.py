"""``MuonConfig``: every option in one frozen place, and the parsing of ``optim_args`` strings into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .coefficients import Coefficients, schedule

# Every name says what multiplies the orthogonalized update O of an [A, B] matrix; "match_rms_adamw" is PyTorch's word.
SCALES: tuple[str, ...] = ("sqrt_max_dims", "inverse_rms", "sqrt_hidden_size", "original")
SCALE_ALIASES: dict[str, str] = {"match_rms_adamw": "sqrt_max_dims"}
NS_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LORA_FACTORS: tuple[str, ...] = ("both", "B")
UPDATE_KEYS: tuple[str, ...] = (
    "momentum",
    "nesterov",
    "ns_steps",
    "ns_coefficients",
    "ns_dtype",
    "adjust_lr_fn",
    "update_rms",
    "momentum_dtype",
    "kahan_sum",
)
"""The fields of :class:`MuonConfig` that a Muon group carries; the others decide which groups there are."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Options of Muon in a Trainer run; the field names are the keys of ``optim_args``.

    ``lr``, ``weight_decay`` and AdamW's betas and eps are not here: they come from ``TrainingArguments``, as for any
    other optimizer.
    """

    momentum: float = 0.95
    """mu of equation (1), in [0, 1)."""
    nesterov: bool = True
    """Orthogonalize ``G + mu M`` instead of ``M`` (footnote 1 of the paper)."""
    ns_steps: int = 5
    """Newton-Schulz steps."""
    ns_coefficients: Coefficients = "moonlight"
    """A named schedule, one ``a/b/c``, or one per step: ``a/b/c;a/b/c;...``."""
    ns_dtype: str = "bfloat16"
    """Arithmetic of Newton-Schulz: ``bfloat16`` or ``float32``."""
    adjust_lr_fn: str = "sqrt_max_dims"
    """Update scale: ``sqrt_max_dims`` (0.2 sqrt(max(A, B)), the paper's), ``inverse_rms`` (0.2 / RMS(O)),
    ``sqrt_hidden_size`` (0.2 sqrt(H)), ``original`` (sqrt(max(1, A/B)), torch's default)."""
    update_rms: float = 0.2
    """Target RMS of the update in the first three scales (Table 8 of the paper)."""
    muon_lr: float | None = None
    """Learning rate of the Muon group; default: the Trainer's ``learning_rate``."""
    adamw_lr: float | None = None
    """Learning rate of the AdamW groups; default: the Trainer's ``learning_rate``."""
    decay_norms_and_biases: bool = True
    """Weight decay on norm gains and biases too (appendix D of the paper); false restores the Trainer's rule."""
    split_fused: bool = True
    """Orthogonalize the q, k, v or gate, up of a fused weight apart, as its forward uses them."""
    per_head: bool = False
    """Orthogonalize every attention head's rows of q, k, v (columns of o) on its own."""
    lora: str = "both"
    """Which LoRA factors Muon trains: ``both`` or ``B`` only (A goes to AdamW)."""
    include: tuple[str, ...] = ()
    """``fnmatch`` patterns of parameter names that Muon must train, whatever the router says; joined by ``;``."""
    exclude: tuple[str, ...] = ()
    """``fnmatch`` patterns of parameter names that AdamW must train; joined by ``;``."""

    qk_clip: float | None = None
    """tau of Kimi K2's QK-Clip (arXiv 2507.20534, there 100): heads whose largest attention logit passed it are scaled
    back to it after each step; default off."""
    momentum_dtype: str = "float32"
    """Of the momentum buffer: ``float32`` or ``bfloat16``, half the memory, which rounds away small gradients."""
    kahan_sum: bool = False
    """For bfloat16 weights without float32 masters: a bfloat16 buffer beside each weight keeps what rounding loses, so
    that small updates add up; AdamW's moments are float32 then."""
    share_newton_schulz: bool = True
    """Under DDP, orthogonalize each matrix on one rank and gather the updates; false repeats the work on every rank."""
    exchange_bytes: int = 2**27
    """Matrices of at most this many bytes are orthogonalized at a time on a rank; bounds a step's transient memory."""

    def __post_init__(self) -> None:
        _check_number("momentum", self.momentum, 0.0, 1.0, open_end=True)
        _check_number("update_rms", self.update_rms, 0.0, math.inf, open_start=True, open_end=True)
        for name in ("muon_lr", "adamw_lr"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 0.0, math.inf, open_end=True)
        if self.qk_clip is not None:
            _check_number("qk_clip", self.qk_clip, 0.0, math.inf, open_start=True, open_end=True)
        schedule(self.ns_coefficients, self.ns_steps)
        _check_choice("ns_dtype", self.ns_dtype, tuple(NS_DTYPES))
        _check_choice("momentum_dtype", self.momentum_dtype, tuple(NS_DTYPES))
        _check_choice("adjust_lr_fn", self.adjust_lr_fn, (*SCALES, *SCALE_ALIASES))
        _check_choice("lora", self.lora, LORA_FACTORS)
        if isinstance(self.exchange_bytes, bool) or not isinstance(self.exchange_bytes, int) or self.exchange_bytes < 1:
            raise ValueError(f"exchange_bytes must be a positive integer, got {self.exchange_bytes!r}")
        switches = "nesterov", "kahan_sum", "decay_norms_and_biases", "split_fused", "per_head", "share_newton_schulz"
        for name in switches:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("include", "exclude"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else value
            if not all(isinstance(pattern, str) for pattern in value):
                raise ValueError(f"{name} must be a sequence of name patterns, got {value!r}")
            object.__setattr__(self, name, tuple(value))

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """The valid ``optim_args`` keys."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def merged(cls, config: MuonConfig | None, overrides: Mapping[str, Any]) -> MuonConfig:
        """``config`` (or the defaults) with some fields overridden.

        Raises:
            TypeError: ``config`` is something else.
            ValueError: an unknown field, or a value that is refused.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(
                f"config must be a MuonConfig, got {config!r}; MuonConfig.from_optim_args reads a key=value string"
            )
        unknown = sorted(set(overrides) - set(cls.keys()))
        if unknown:
            raise ValueError(f"unknown Muon options {unknown}; valid: {', '.join(cls.keys())}")
        return replace(config or cls(), **overrides)

    @classmethod
    def from_strings(cls, values: Mapping[str, str]) -> MuonConfig:
        """A config from ``optim_args`` pairs, whose values are all strings.

        Raises:
            ValueError: an unknown key or a value of the wrong kind; the message names the valid ones.
        """
        parsed: dict[str, Any] = {}
        valid = cls.keys()
        for key, text in values.items():
            if key not in valid:
                raise ValueError(
                    f"unknown optim_args key {key!r}; valid keys: {', '.join(valid)} (learning rate, weight decay, "
                    "betas and eps are TrainingArguments' own)"
                )
            try:
                parsed[key] = _PARSERS.get(key, str)(text)
            except ValueError as error:
                raise ValueError(f"optim_args {key}={text!r}: {error}") from None
        return cls(**parsed)

    @classmethod
    def from_optim_args(cls, text: str | None) -> MuonConfig:
        """A config from a whole ``optim_args`` string, ``"momentum=0.95,ns_steps=5"``.

        Raises:
            ValueError: a pair without ``=``, a key given twice, and all that :meth:`from_strings` refuses.
        """
        if text is not None and not isinstance(text, str):
            raise ValueError(f'optim_args must be one string "key=value,...", got a {type(text).__name__}: {text!r}')
        pairs: dict[str, str] = {}
        for item in "".join((text or "").split()).split(","):
            key, equals, value = item.partition("=")
            if not item and not (text or "").strip():
                continue
            if not key or not equals or not value or "=" in value:
                raise ValueError(
                    f"malformed optim_args {text!r}: {item!r} is not key=value; valid keys: {', '.join(cls.keys())} "
                    "(inside a value, ';' joins patterns or steps and '/' the three coefficients of a step)"
                )
            if key in pairs:
                raise ValueError(f"optim_args gives {key!r} twice: {text!r}")
            pairs[key] = value
        return cls.from_strings(pairs)


def _check_number(
    name: str, value: Any, low: float, high: float, open_start: bool = False, open_end: bool = False
) -> None:
    """Refuse what is not a plain finite number in the interval; a tensor is refused by its type."""
    left, right = "(["[not open_start], ")]"[not open_end]
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    ok = ok and (low < value if open_start else low <= value) and (value < high if open_end else value <= high)
    if not ok:
        raise ValueError(f"{name} must be a number in {left}{low}, {high}{right}, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _bool(text: str) -> bool:
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise ValueError("expected true or false")
    return value


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(";") if part)


def _coefficients(text: str) -> Coefficients:
    """``name``, ``a/b/c`` or ``a/b/c;a/b/c``: the Trainer splits ``optim_args`` at commas, so there are none here."""
    if "/" not in text:
        return text
    rows = tuple(tuple(float(v) for v in row.split("/")) for row in _patterns(text))
    return rows[0] if len(rows) == 1 else rows


_PARSERS: dict[str, Any] = {
    "momentum": float,
    "nesterov": _bool,
    "ns_steps": int,
    "ns_coefficients": _coefficients,
    "update_rms": float,
    "muon_lr": float,
    "adamw_lr": float,
    "qk_clip": float,
    "decay_norms_and_biases": _bool,
    "kahan_sum": _bool,
    "split_fused": _bool,
    "per_head": _bool,
    "share_newton_schulz": _bool,
    "exchange_bytes": int,
    "include": _patterns,
    "exclude": _patterns,
}
