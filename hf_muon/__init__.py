"""Muon as a one-word change: ``import hf_muon``, then ``TrainingArguments(optim="muon")``."""

import importlib.util
import logging

from .config import MuonConfig
from .groups import param_groups
from .matrices import MatrixLayout
from .optimizer import Muon
from .orthogonalize import newton_schulz
from .routing import explain

__version__ = "0.1.0"
__all__ = ["MatrixLayout", "Muon", "MuonConfig", "explain", "newton_schulz", "param_groups"]

# As transformers does for its own logger: the routing summary of a run must be seen without any set-up.
_logger = logging.getLogger("hf_muon")
if not _logger.handlers:
    _logger.addHandler(logging.StreamHandler())
    _logger.propagate = False
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)

# The optimizer works on torch alone; with transformers installed, importing the package registers optim="muon".
if importlib.util.find_spec("transformers") is not None:
    try:
        from .integrations.registry import register, unregister
        from .integrations.spectra import SpectraCallback
        from .integrations.trainer import MuonFactory, create_optimizer
    except ImportError as error:
        _logger.warning(
            "optim='muon' is not registered: the installed transformers or accelerate does not fit hf_muon %s (%s); "
            "install transformers>=5.23. hf_muon.Muon itself works.",
            __version__,
            error,
        )
    else:
        register()
        __all__ += ["MuonFactory", "SpectraCallback", "create_optimizer", "register", "unregister"]
