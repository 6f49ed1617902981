"""Tensors out of other people's checkpoint files, without running anything that is in them.

PyTorch's own format is a pickle, and a pickle is a program. Files are therefore read by ``torch.load(weights_only=True)``, which builds
tensors and plain containers only; a file that asks for anything else is refused as a whole. That promise holds from torch 2.10 on: before,
a crafted file could overwrite memory (CVE-2026-24747).
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gladad.core.errors import ModelFormatError
from gladad.core.storage import load_tensors

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
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_TAR, _TAR_OFFSET = b"ustar", 257


@dataclass(frozen=True)
class StateDict:
    """The weights in a file.

    Attributes:
        path: The file.
        tensors: Name -> tensor, on the CPU, as stored.
        others: Entries beside the weights that hold tensors too, such as ``optimizer_states``, and how many.
    """

    path: Path
    tensors: dict[str, Tensor]
    others: dict[str, int] = field(default_factory=dict)


def read_state_dict(path: Path) -> StateDict:
    """Read the weights of a file that nobody vouches for.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote (both its zip format and the one before 1.6). The weights are the file's
            dictionary itself, or one of `WRAPPERS` in it.

    Raises:
        ModelFormatError: The file is missing, damaged, of another format or without tensors, or holds anything but tensors and plain
            containers; then nothing of it was executed.
    """
    head = _head(path)
    if head.startswith(_LFS):
        raise ModelFormatError(f"{path}: is a Git LFS pointer, not the file itself; run 'git lfs pull' where it lies, or download it")
    content: Any = load_tensors(path) if path.suffix == ".safetensors" else _load(path, head)
    if not isinstance(content, dict):
        raise ModelFormatError(f"{path}: holds a {type(content).__name__}, not a dictionary of named tensors")
    nested = (name for name in WRAPPERS if isinstance(content.get(name), dict) and _named_tensors(content[name]))
    wrapper = next(nested, None)
    weights: Mapping[Any, Any] = content if wrapper is None else content[wrapper]
    tensors = _named_tensors(weights)
    if not tensors:
        found = f" (but {', '.join(shown(key) for key in list(content)[:6])})" if content else ""
        raise ModelFormatError(f"{path}: holds no named tensors{found}; give the file with the network's weights")
    beside = {key: value for key, value in weights.items() if key not in tensors}
    if wrapper is not None:
        beside |= {key: value for key, value in content.items() if key != wrapper}
    counts = {shown(key): count_tensors(value) for key, value in beside.items()}
    return StateDict(path, tensors, {name: count for name, count in counts.items() if count})


def count_tensors(value: Any) -> int:
    """Tensors inside nested containers. Each container is entered once, for a pickle may hold one that holds itself."""
    count, seen, todo = 0, set(), [value]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            count += 1
        elif isinstance(value, dict | list | tuple | set | frozenset) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value
    return count


def shown(name: object) -> str:
    """A name out of a foreign file, fit for a message: printable, on one line, not long."""
    text = str(name).encode("unicode_escape").decode("ascii")
    return text if len(text) <= 80 else f"{text[:77]}..."


def _named_tensors(weights: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError as error:
        raise ModelFormatError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ModelFormatError(f"{path}: is a folder; give the file in it that holds the weights") from error
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read ({error.strerror or error})") from error


def _load(path: Path, head: bytes) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain containers throughout."""
    if head[_TAR_OFFSET:].startswith(_TAR):
        raise _refusal(path, "it is in the tar format of the first PyTorch, which cannot be read without running it")
    if not head.startswith((_ZIP, _PICKLE)):
        raise ModelFormatError(f"{path}: is no checkpoint of PyTorch (nor named .safetensors); check what was downloaded")
    if torch.__version__ < SAFE_TORCH:
        raise ModelFormatError(f"{path}: is read safely by torch {SAFE_TORCH} or newer only, this is {torch.__version__}; upgrade torch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's hints on the format; what matters becomes an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds other things than tensors ({wanted[1]})" if wanted else "it holds other things than tensors, or is damaged"
        raise _refusal(path, reason) from None  # torch's own text advises to read the file unsafely
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged file can make the reader fail in any way
        if "TorchScript" in str(error):
            raise ModelFormatError(f"{path}: refused, and not executed: it is a TorchScript program; give the network's weights") from None
        raise ModelFormatError(f"{path}: is damaged or incomplete ({type(error).__name__}: {shown(error)}); download it again") from error


def _refusal(path: Path, reason: str) -> ModelFormatError:
    return ModelFormatError(
        f"{path}: refused, and nothing in it was executed: {reason}; if you trust its source, copy its tensors to a plain file on an "
        f'isolated machine, python -c "{RESCUE}", and give that file instead'
    )
