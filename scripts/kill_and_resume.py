"""Kill a training at random moments and let it go on, again and again: the weights must be those of a training left in peace.

python scripts/kill_and_resume.py [--kills 20] [--steps 60] [--seed 0]. Exit status 0 if they are, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from tiny_base import build_base  # noqa: E402


def start(base: Path, folder: Path, output: Path, steps: int) -> subprocess.Popen[str]:
    """A worker of `train_worker`, on one thread."""
    command = [sys.executable, str(TESTS / "train_worker.py"), str(base), str(folder), str(output), "--steps", str(steps)]
    source = str(TESTS.parent / "src")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([source, str(TESTS)])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def wait_for_a_step(worker: subprocess.Popen[str]) -> int:
    """The number of the first step that a worker tells of."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("step"):
            return int(line.split()[1])
    return 0


def digest(output: Path) -> str:
    """What a training's result is known again by: weights and losses."""
    return hashlib.sha256((output / "weights.safetensors").read_bytes() + (output / "losses.json").read_bytes()).hexdigest()


def main() -> int:
    """Run the comparison and print a line per kill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = build_base(folder / "base")
        worker = start(base, folder / "run-whole", folder / "whole", arguments.steps)
        wait_for_a_step(worker)
        begun = time.monotonic()
        worker.communicate()
        assert worker.returncode == 0, "the uninterrupted training failed"
        seconds = time.monotonic() - begun
        kills = 0
        while kills < arguments.kills:
            # A new training whenever one has come to its end, so that kills fall on all of its moments.
            worker = start(base, folder / "run-killed", folder / "killed", arguments.steps)
            first = wait_for_a_step(worker)
            time.sleep(chance.uniform(0, 0.5 * seconds))
            if worker.poll() is None:
                worker.send_signal(signal.SIGKILL)
                worker.communicate()
                kills += 1
                print(f"kill {kills}: it had gone on at step {first}", flush=True)
                continue
            worker.communicate()
            assert worker.returncode == 0, "a resumed training failed"
            if not same(folder):
                return 1
            subprocess.run(["rm", "-rf", str(folder / "run-killed"), str(folder / "killed")], check=True)
        worker = start(base, folder / "run-killed", folder / "killed", arguments.steps)
        worker.communicate()
        assert worker.returncode == 0, "a resumed training failed"
        return 0 if same(folder) else 1


def same(folder: Path) -> bool:
    """Compare the two results and say how they compare."""
    equal = digest(folder / "whole") == digest(folder / "killed")
    print("finished: weights and losses are", "identical, bit for bit" if equal else "DIFFERENT", flush=True)
    return equal


if __name__ == "__main__":
    sys.exit(main())
