"""Tensors out of other people's checkpoint files, without running anything that is in them.

PyTorch's own format is a pickle, and a pickle is a program. Files are therefore read by ``torch.load(weights_only=True)``, which builds
tensors and plain containers only; a file that asks for anything else is refused as a whole. That promise holds from torch 2.10 on: before,
a crafted file could overwrite memory (CVE-2026-24747).
"""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from gladad.core.errors import ModelFormatError
from gladad.core.tensors import load_tensors

WRAPPERS = ("state_dict", "model", "teacher", "student")
"""Entries that hold the weights where they are not at the top. The first that is there is taken: of DINO's two networks the teacher."""
SAFE_TORCH = "2.10"
"""First version of torch whose ``weights_only`` can be relied on."""
RESCUE = (
    "import torch; d = torch.load('FILE', map_location='cpu', weights_only=False); "
    f"d = next((d[k] for k in {WRAPPERS} if k in d), d); "
    "torch.save({k: v for k, v in d.items() if torch.is_tensor(v)}, 'TENSORS.pt')"
)
"""Python that writes the tensors alone of FILE to TENSORS.pt. It runs whatever FILE holds."""
_LFS = b"version https://git-lfs"


def read_state_dict(path: Path, *, torch_version: str = torch.__version__) -> dict[str, Tensor]:
    """Read the weights of a file that nobody vouches for: name -> tensor, on the CPU, as stored.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote (both its zip format and the one before 1.6). The weights are the file's
            dictionary itself, or one of `WRAPPERS` in it; what is beside them is left out.
        torch_version: That of torch.

    Raises:
        ModelFormatError: The file is missing, damaged, of another format or without tensors, or holds anything but tensors and plain
            containers; then nothing of it was executed.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ModelFormatError(f"{path}: is a Git LFS pointer, not the file itself; run 'git lfs pull', or download it")
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read ({error.strerror or error}); give the file that holds the weights") from error
    content: Any = load_tensors(path) if path.suffix == ".safetensors" else _load(path, torch_version)
    if not isinstance(content, dict):
        raise ModelFormatError(f"{path}: holds a {type(content).__name__}, not a dictionary of named tensors")
    for weights in (*(content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content):
        if tensors := {name: value.detach() for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}:
            return tensors
    found = f" (but {', '.join(shown(key) for key in list(content)[:6])})" if content else ""
    raise ModelFormatError(f"{path}: holds no named tensors{found}; give the file with the network's weights")


def shown(name: object) -> str:
    """A name out of a foreign file, fit for a message: printable, on one line, not long."""
    text = str(name).encode("unicode_escape").decode("ascii")
    return text if len(text) <= 80 else f"{text[:77]}..."


def _load(path: Path, torch_version: str) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain containers throughout."""
    if TorchVersion(torch_version) < SAFE_TORCH:
        raise ModelFormatError(f"{path}: is read safely by torch {SAFE_TORCH} or newer only, this is {torch_version}; upgrade torch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's hints on the format; what matters becomes an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f"other things than tensors ({wanted[1]})" if wanted else "other things than tensors, is damaged, or is no checkpoint at all"
        raise ModelFormatError(
            f"{path}: refused, and nothing in it was executed: it holds {held}; if you trust its source, copy its tensors to a plain file "
            f'on an isolated machine, python -c "{RESCUE}", and give that file instead'
        ) from None  # torch's own text advises to read the file unsafely
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise ModelFormatError(
            f"{path}: refused, and not executed: it is damaged, incomplete or a program ({type(error).__name__}: {shown(error)}); download "
            "the file with the network's weights again"
        ) from None
