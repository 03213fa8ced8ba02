import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DeepSpeed compiles one operator for a minute, and takes a stale one of other versions for its own.
_versions = f"torch{version('torch')}-deepspeed{version('deepspeed')}"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(tempfile.gettempdir()) / f"hf_muon-{os.getuid()}-{_versions}"))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def data() -> Path:
    """The folder of reference numbers."""
    return Path(__file__).parent / "data"
