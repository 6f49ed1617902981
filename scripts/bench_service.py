"""Measure the inspection service on this machine: the same scores by every way, throughput against ``gladad predict``, overload, and kills.

    python scripts/bench_service.py MODEL IMAGES [--images 200] [--seconds 120] [--kills 20] [--only same,throughput,load,kills]

MODEL is a folder that ``gladad fit`` or ``gladad export`` wrote, IMAGES a folder. Everything runs on loopback in a temporary station; the
tables go to standard output. `docs/service.md` says what they should show.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import psutil
from sqlalchemy import select

from gladad.client import Client
from gladad.core.images import list_images
from gladad.detector.glad import Glad
from gladad.service.audit import verify
from gladad.service.station import Station
from gladad.service.tables import decisions

PRODUCT = "part"
INSPECT = f"/v1/products/{PRODUCT}/inspections"
GLADAD = [sys.executable, "-m", "gladad"]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", metavar="images", type=Path)
    parser.add_argument("--images", type=int, help="of the folder, evenly spread; all, if it is left out")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the overload")
    parser.add_argument("--kills", type=int, default=20, help="of the server, and as many of the worker")
    parser.add_argument("--only", default="same,throughput,load,kills")
    chosen = parser.parse_args()
    paths = list_images(chosen.folder)
    if chosen.images is not None:
        paths = [paths[number * len(paths) // chosen.images] for number in range(min(chosen.images, len(paths)))]
    with tempfile.TemporaryDirectory(prefix="gladad-bench-") as name:
        bench = Bench(Path(name), chosen.model, paths)
        for part in chosen.only.split(","):
            {
                "same": bench.same,
                "throughput": bench.throughput,
                "load": lambda: bench.load(chosen.seconds),
                "kills": lambda: bench.kills(chosen.kills),
            }[part]()


class Bench:
    """A model, images, and a place for stations."""

    def __init__(self, folder: Path, model: Path, paths: list[Path]):
        self.folder, self.model, self.paths = folder, model, paths
        self.contents = [path.read_bytes() for path in paths]

    def same(self) -> None:
        """Scores and decisions of every image by five ways; they must be equal to the last bit."""
        inbox, out = self.folder / "inbox", self.folder / "same-predicted"
        inbox.mkdir()
        names = [f"{number:04}{path.suffix}" for number, path in enumerate(self.paths)]
        for path, name in zip(self.paths, names, strict=True):
            shutil.copyfile(path, inbox / name)
        copies = [inbox / name for name in names]
        found: dict[str, list[tuple[float, str]]] = {}
        detector = Glad.from_pretrained(self.model)
        predictions = detector.predict(copies, reconstruct=False)
        found["Python"] = [(each.pred_score, "reject" if each.pred_label else "accept") for each in predictions]
        subprocess.run([*GLADAD, "predict", self.model, inbox, "-o", out, "--no-pictures", "-q"], check=True)
        records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        found["gladad predict"] = [(each["pred_score"], "reject" if each["pred_label"] else "accept") for each in records]
        with self.server("same") as url:
            with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(4) as pool:
                answers = [answer.json() for answer in pool.map(lambda path: http.post(INSPECT, content=path.read_bytes()), copies)]
            found["HTTP"] = [(answer["score"], answer["decision"]) for answer in answers]
            with Client(url) as client:
                made = [client.inspect(PRODUCT, path) for path in copies]
            found["gladad.client"] = [(each.score, each.decision) for each in made]
        watched = [*GLADAD, "watch", inbox, "--station", self.folder / "same", "--product", PRODUCT, "--once", "--settle", "0"]
        subprocess.run(watched, check=True, stdout=subprocess.DEVNULL)
        with self.station("same").record.read() as connection:
            query = select(decisions.c.image_name, decisions.c.score, decisions.c.decision).where(decisions.c.source == "watch")
            kept = {name: (score, decision) for name, score, decision in connection.execute(query)}
        found["gladad watch"] = [kept[name] for name in names]
        rejected = sum(decision == "reject" for _, decision in found["Python"])
        rows = [
            (way, str(len(own)), str(sum(one == other for one, other in zip(own, found["Python"], strict=True))))
            for way, own in found.items()
        ]
        table(f"the same scores ({len(set(found['Python']))} different ones, {rejected} rejected)", ("way", "images", "equal"), rows)

    def throughput(self, rounds: int = 3) -> None:
        """Images per second of the server and of the command, in turn, on the same images; without start-up."""
        rates: dict[str, list[float]] = {"serve": [], "predict": [], "predict, no pictures": []}
        for number in range(rounds):
            with self.server(f"throughput{number}") as url, httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda content: http.post(INSPECT, content=content), self.contents[:8]))
                began = time.perf_counter()
                statuses = Counter(pool.map(lambda content: http.post(INSPECT, content=content).status_code, self.contents))
                rates["serve"].append(len(self.contents) / (time.perf_counter() - began))
                assert set(statuses) == {200}, statuses
            for name, option in (("predict", "--pictures"), ("predict, no pictures", "--no-pictures")):
                rates[name].append(self.predicted(f"out{number}{option}", option))
        rows = [(name, f"{median(found):.1f}", f"{min(found):.1f} - {max(found):.1f}") for name, found in rates.items()]
        table("images per second", ("way", "median", "range"), rows)
        ratio = {name: median(a / b for a, b in zip(rates["serve"], rates[name], strict=True)) for name in list(rates)[1:]}
        print(*(f"serve / {name}: {value:.2f}" for name, value in ratio.items()), sep="\n")

    def predicted(self, name: str, option: str) -> float:
        """Images per second of ``gladad predict``, by the difference of many and few images."""
        few = self.paths[:8]
        seconds = []
        for paths in (few, self.paths):
            out = self.folder / f"{name}-{len(paths)}"
            began = time.perf_counter()
            subprocess.run([*GLADAD, "predict", self.model, *paths, "-o", out, option, "-q"], check=True)
            seconds.append(time.perf_counter() - began)
            shutil.rmtree(out)
        return (len(self.paths) - len(few)) / (seconds[1] - seconds[0])

    def load(self, seconds: float) -> None:
        """Four times the sustainable rate: what is accepted, how long it takes, and the memory."""
        with self.server("load") as url, ThreadPoolExecutor(200) as pool, httpx.Client(base_url=url, timeout=60, limits=MANY) as http:
            rate = self.sustainable(http)
            answers: list[tuple[float, int, float]] = []
            memory: list[int] = []
            server = self.process
            began = time.monotonic()

            def ask(number: int) -> None:
                start = time.perf_counter()
                status = http.post(INSPECT, content=self.contents[number % len(self.contents)]).status_code
                answers.append((time.monotonic() - began, status, time.perf_counter() - start))

            sent = 0
            while (present := time.monotonic() - began) < seconds:
                for _ in range(int(4 * rate * present) - sent):
                    pool.submit(ask, sent)
                    sent += 1
                if len(memory) < int(present):
                    family = [server, *server.children(recursive=True)]
                    memory.append(sum(each.memory_info().rss for each in family))
                time.sleep(0.005)
            pool.shutdown(wait=True)
        taken = sorted(latency for _, status, latency in answers if status == 200)
        statuses = Counter(status for _, status, _ in answers)
        with self.station("load").record.read() as connection:
            kept = len(connection.execute(select(decisions.c.id)).all()) - self.before
        quarter = max(1, len(memory) // 4)
        first, last = (median(part) / 2**20 for part in (memory[:quarter], memory[-quarter:]))
        rows = [
            ("sustainable rate", f"{rate:.1f} images/s"),
            ("offered", f"{sent / seconds:.1f} images/s for {seconds:.0f} s"),
            ("answers", ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))),
            ("in the record", str(kept)),
            ("accepted, median and p99", f"{median(taken):.2f} s, {taken[int(0.99 * (len(taken) - 1))]:.2f} s"),
            ("memory, first and last quarter", f"{first:.0f} MiB, {last:.0f} MiB ({last / first - 1:+.1%})"),
        ]
        table("overload", ("what", "measured"), rows)

    def sustainable(self, http: httpx.Client) -> float:
        """Images per second with the queue never empty and never full."""
        with ThreadPoolExecutor(8) as pool:
            began, count = time.perf_counter(), 200
            statuses = list(
                pool.map(lambda number: http.post(INSPECT, content=self.contents[number % len(self.contents)]).status_code, range(count))
            )
        assert set(statuses) == {200}
        self.before = count
        return count / (time.perf_counter() - began)

    def kills(self, count: int) -> None:
        """Kill -9 under load: of the server, then of the worker."""
        rows = []
        for victim in ("server", "worker"):
            acknowledged: set[str] = set()
            statuses: Counter[str] = Counter()
            stop = threading.Event()
            port = free_port()
            name = f"kills-{victim}"
            self.add(name)
            self.start(name, port)
            threads = [threading.Thread(target=self.ask_on, args=(port, acknowledged, statuses, stop)) for _ in range(6)]
            for thread in threads:
                thread.start()
            for _ in range(count):
                time.sleep(random.uniform(1.0, 4.0))
                if victim == "server":
                    self.process.kill()
                    self.process.wait()
                    self.start(name, port)
                else:
                    self.kill_worker(port)
            stop.set()
            for thread in threads:
                thread.join()
            self.stop()
            station = self.station(name)
            with station.record.read() as connection:
                kept = set(connection.execute(select(decisions.c.id)).scalars())
            head = verify(station.record)
            told = ", ".join(f"{number} x {status}" for status, number in sorted(statuses.items()))
            rows.append((victim, str(count), str(len(acknowledged)), str(len(acknowledged - kept)), f"verifies ({head.sequence})", told))
        table("kill -9 under load", ("victim", "kills", "acknowledged", "missing", "audit log", "answers"), rows)

    def ask_on(self, port: int, acknowledged: set[str], statuses: Counter[str], stop: threading.Event) -> None:
        """Send images until told to stop."""
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            while not stop.is_set():
                try:
                    answer = http.post(INSPECT, content=random.choice(self.contents))
                    statuses[str(answer.status_code)] += 1
                    if answer.status_code == 200:
                        acknowledged.add(answer.json()["id"])
                        continue
                except httpx.HTTPError:
                    statuses["no connection"] += 1
                time.sleep(0.05)

    def kill_worker(self, port: int) -> None:
        """Kill the inspection process, and wait until another one inspects."""
        before = worker_pid(port)
        psutil.Process(before).kill()
        while worker_pid(port) == before:
            time.sleep(0.1)
        wait_until_ready(port)

    # -- servers ------------------------------------------------------------------------------------------------

    def station(self, name: str) -> Station:
        """The station of a name."""
        return Station(self.folder / name)

    def add(self, name: str) -> None:
        """Make a station with the model."""
        subprocess.run([*GLADAD, "station", "add", self.folder / name, PRODUCT, self.model], check=True, stdout=subprocess.DEVNULL)

    def start(self, name: str, port: int) -> None:
        """Start a server, and wait until it is ready."""
        command = [*GLADAD, "serve", "--station", str(self.folder / name), "--port", str(port)]
        self.process = psutil.Popen(command, stderr=subprocess.DEVNULL)
        wait_until_ready(port)

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    @contextmanager
    def server(self, name: str) -> Iterator[str]:
        """A server of a fresh station."""
        port = free_port()
        self.add(name)
        self.start(name, port)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            self.stop()


MANY = httpx.Limits(max_connections=400, max_keepalive_connections=400)


def wait_until_ready(port: int) -> None:
    """Until all products inspect."""
    for _ in range(3000):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=60).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not get ready")


def worker_pid(port: int) -> int:
    """Process number of the inspection process, as the server tells it."""
    found = re.search(r"\ngladad_worker_pid ([\d.e+]+)", httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text)
    assert found is not None
    return int(float(found[1]))


def free_port() -> int:
    """That nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print as Markdown."""
    print(
        f"\n{title}\n\n| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        sep="\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
