"""How processes that inspect or train are started: with what is slow to import already imported, where the system can."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from multiprocessing.context import ForkServerContext, SpawnContext

PRELOADED = ["gladad.detector.glad", "gladad.models.feature_diffusion.model", "scipy.ndimage", "skimage.measure"]


def process_context() -> ForkServerContext | SpawnContext:
    """Starts processes that have nothing of what this one has in memory, neither its threads nor its use of a GPU.

    On Linux they are forked from a server process that has imported PyTorch and the detector once, as importing takes seconds.
    It has this program's environment as it was when the first of them was started, and ends with this program.
    """
    if sys.platform != "linux":  # forks are unsafe in macOS, and unknown in Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def end_with_parent() -> None:
    """Have this process end, at once, when the one that started it has: nobody would read what it tells."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
