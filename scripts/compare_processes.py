"""One training by one process and by two (gloo, CPU): python scripts/compare_processes.py [--steps 60]. Prints how far apart they are.

Both draw the same samples of the same batches; only the order of sums differs. Exit status 0 if every loss agrees within 1 in 1000.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from tiny_base import build_base  # noqa: E402

TOLERANCE = 1e-3


def main() -> int:
    """Train twice and compare losses and weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = build_base(folder / "base")
        for count in (1, 2):
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
            places = [str(base), str(folder / f"run-{count}"), str(folder / f"result-{count}")]
            command = [sys.executable, *launcher, str(TESTS / "train_worker.py"), *places, "--steps", str(arguments.steps), "--batch", "4"]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        one, two = (np.array(json.loads((folder / f"result-{count}" / "losses.json").read_text())) for count in (1, 2))
        weights = [load_file(folder / f"result-{count}" / "weights.safetensors") for count in (1, 2)]
    apart = np.abs(one - two) / one
    largest = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    print(f"{len(one)} steps: losses differ by at most {apart.max():.1e} (relative; the last by {apart[-1]:.1e}), weights by {largest:.1e}")
    return 0 if apart.max() <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
