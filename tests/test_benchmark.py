"""Benchmarks: the plan, cells that survive, and tables; on a generated product, with next to no training."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import draw_part, write_category
from filelock import FileLock
from PIL import Image

from gladad.benchmark import tables as benchmark_tables
from gladad.benchmark.cell import run_cell
from gladad.benchmark.config import BenchmarkConfig, Configuration, DatasetEntry, ShiftEntry, read_config, shipped_names
from gladad.benchmark.identity import DECIDING, SOURCE
from gladad.benchmark.plan import Cell, finished, plan, run, runnable, select
from gladad.benchmark.tables import to_csv, to_markdown, write_tables
from gladad.benchmark.workers import KILLED, Workers
from gladad.cli.main import main
from gladad.core.errors import ConfigError, DataError, MissingExtraError
from gladad.core.settings import to_json, with_values
from gladad.core.storage import WriteError
from gladad.models.settings import FitSettings

BANK = Configuration(name="bank", base="memory-bank", settings={"image_size": 64})
LOOSE = replace(BANK, name="loose", settings={"image_size": 64, "false_reject_rate": 0.5})
SMALL = {
    "image_size": 64, "training": {"steps": 3, "batch_size": 4, "pool": 16, "decoder_steps": 2},
    "latent.dimensions": 8, "widths": [32, 32],
}  # fmt: skip
LITE = Configuration(name="lite", settings=SMALL)
TOML = """
title = "Widgets"
seeds = [0, 1]
[[dataset]]
name = "Widgets"
path = "widgets"
[[configuration]]
name = "bank"
base = "memory-bank"
settings = { image_size = 64 }
"""
TOML_LOOSE = (
    TOML
    + """
[[configuration]]
name = "loose"
base = "memory-bank"
settings = { image_size = 64, false_reject_rate = 0.5 }
"""
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories, the second without masks."""
    root = tmp_path_factory.mktemp("data")
    write_category(root / "widgets/gear", train=26)
    write_category(root / "widgets/lever", train=26)
    for mask in (root / "widgets/lever/ground_truth/hole").iterdir():
        mask.unlink()
    return root


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "widgets.toml"
    path.write_text(TOML)
    return path


def config(*configurations: Configuration, **changes: object) -> BenchmarkConfig:
    entry = DatasetEntry(name="Widgets", path="widgets")
    return replace(BenchmarkConfig(title="Widgets", dataset=(entry,), configuration=configurations or (BANK,)), **changes)  # type: ignore[arg-type]


def planned(*configurations: Configuration, data: Path, category: str = "gear", **changes: object) -> list[Cell]:
    """The cells of one category, without shifts."""
    return select(plan(config(*configurations, **changes), data)[0], category=[category])


# ---------------------------------------------------------------------------------------------------- configuration


def test_a_file_is_read(config_file):
    assert read_config(config_file) == config(seeds=(0, 1), source=str(config_file))


def test_a_category_fills_its_place_at_any_depth_but_not_in_one_model_for_all():
    settings = {"preset": "visa/{category}", "training": {"note": "of {category}"}}
    assert Configuration(name="p", settings=settings).values('a"b') == {"preset": 'visa/a"b', "training": {"note": 'of a"b'}}
    assert Configuration(name="p", settings=settings, multi_class=True).values("a") == settings


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_files_hold_settings_that_exist(name, tmp_path):
    read = read_config(name)
    for entry in read.dataset:
        for category in entry.categories or ("bottle",):
            if not (tmp_path / entry.path / category).exists():
                write_category(tmp_path / entry.path / category, train=1, test=1)
    cells, notes = plan(read, tmp_path)
    assert {cell.configuration for cell in cells} == {configuration.name for configuration in read.configuration} and not notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds", "speeds"), "speeds: unknown setting; near are seeds"),
        (("[0, 1]", '"all"'), "seeds: .*valid array"),
        (("[0, 1]", "[0, -1]"), "seeds.1: .*greater than or equal to 0, not -1"),
        (("[0, 1]", "[]"), "seeds: .*at least 1 item"),
        (("[[dataset]]", "[[datum]]"), "dataset: is missing|datum: unknown setting"),
        (("[[dataset]]", "[dataset]"), "dataset: .*valid array"),
        (('base = "memory-bank"', "bass = 1"), "configuration.0.bass: unknown setting; near are base"),
        (("seeds = [0, 1]", "seeds ="), "not TOML"),
        (('"Widgets"', "2001-01-01T00:00:00\nsize = 1"), "size: unknown setting"),
        (("[[configuration]]", '[[configuration]]\nname = "bank"\n[[configuration]]'), "two \\[\\[configuration\\]\\] are called 'bank'"),
        (("seeds = [0, 1]", "seeds = [0]\n[shift]\nseverities = [7]"), "shift.severities.0: .*less than or equal to 5, not 7"),
        (("seeds = [0, 1]", "seeds = [0]\n[shift]\ncontamination = [1.0]"), "shift.contamination.0: .*less than or equal to 0.5, not 1.0"),
        (("seeds = [0, 1]", 'seeds = [0]\n[shift]\nseverities = ["x"]'), "shift.severities.0: .*valid integer, not 'x'"),
        (("seeds = [0, 1]", 'seeds = [0]\n[shift]\nconfigurations = ["tank"]'), "names 'tank'"),
    ],
)
def test_mistakes_in_a_file_are_named(config_file, change, message):
    config_file.write_text(TOML.replace(*change))
    with pytest.raises(ConfigError, match=rf"widgets\.toml.*({message})"):
        read_config(config_file)


def test_a_name_that_is_not_shipped():
    with pytest.raises(ConfigError, match="four_products"):
        read_config("four_product")


# ------------------------------------------------------------------------------------------------------------- plan


def test_the_plan_goes_seed_by_seed(data):
    other = Configuration(name="other", base="memory-bank")
    cells, notes = plan(config(BANK, other, seeds=(0, 1)), data, seeds=(7, 1))
    assert [(c.settings.seed, c.category, c.configuration) for c in cells[:4]] == [
        (0, "gear", "bank"), (0, "gear", "other"), (0, "lever", "bank"), (0, "lever", "other"),
    ]  # fmt: skip
    assert len(cells) == len({cell.key for cell in cells}) == 12 and not notes
    few = select(cells, configuration=["other"], category=["lever"], seed=[7])
    assert [(c.settings.seed, c.category, c.configuration) for c in few] == [(7, "lever", "other")]


def test_what_is_not_there_is_left_out_and_said(data):
    absent = DatasetEntry(name="Absent", path="nowhere")
    half = DatasetEntry(name="Half", path="widgets", categories=("gear", "wheel"))
    cells, notes = plan(config(BANK, Configuration(name="theirs", base="anomalib-padim"), dataset=(absent, half)), data)
    assert [(c.dataset, c.category, c.configuration) for c in cells] == [("Half", "gear", "bank"), ("Half", "gear", "theirs")]
    assert len(notes) == 2 and "nowhere" in notes[0] and "wheel" in notes[1]
    possible, missing = runnable(cells, installed=lambda name: None)
    assert possible == cells[:1] and len(missing) == 1 and "theirs" in missing[0] and "gladad[anomalib]" in missing[0]
    assert runnable(cells, installed=lambda name: name == "anomalib") == (cells, [])
    with pytest.raises(DataError, match="nowhere is not there"):
        plan(config(dataset=(absent,)), data)


def test_mistakes_are_named_before_anything_is_run(data):
    cells = plan(config(), data)[0]
    with pytest.raises(DataError, match=r"no configuration 'tank'.*bank"):
        select(cells, configuration=["tank"])
    with pytest.raises(DataError, match=r"no category 'wheel'.*gear, lever"):
        select(cells, category=["gear", "wheel"])
    with pytest.raises(ConfigError, match="leave --shift out"):
        select(cells, shift=True)
    wrong = {"stepz": 1}, {"training": {"stepz": 1}}, {"reconstruction.timesteps": [500, "x"]}
    for settings, message in zip(wrong, ("stepz: unknown", r"training\.stepz: unknown", r"reconstruction\.timesteps"), strict=True):
        with pytest.raises(ConfigError, match=rf"mine\.toml: configuration 'wrong': {message}"):
            plan(config(Configuration(name="wrong", settings=settings), source="mine.toml"), data)
    for preset in ("visa/zzz", "visa/{category}"):
        with pytest.raises(ConfigError, match=r"mine\.toml: configuration 'wrong': unknown preset"):
            published = Configuration(name="wrong", base="some/base", multi_class=True, settings={"preset": preset})
            plan(config(published, source="mine.toml"), data)
    with pytest.raises(ConfigError, match="no denoiser that several products"):
        plan(config(replace(BANK, multi_class=True)), data)
    with pytest.raises(ConfigError, match="unknown corruption 'fire'"):
        plan(config(shift=ShiftEntry(corruptions=("fire",))), data)


def test_a_data_set_without_a_split_is_refused(tmp_path):
    for name in ("good/1.png", "good/2.png", "bad/3.png"):
        path = tmp_path / "widgets/nut" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_part(0)[0].save(path)
    with pytest.raises(DataError, match=r"1\.png: is both for training and for testing \(nut\)"):
        plan(config(), tmp_path)


def test_one_model_for_all_is_for_all_whatever_is_chosen(data):
    together = Configuration(name="together", multi_class=True)
    shift = ShiftEntry(corruptions=("brightness",), contamination=(0.1,))
    everything, notes = plan(config(together, shift=shift), data)
    assert select(everything, category=["lever"]) == [everything[2]] and everything[2].together == ("gear", "lever")
    assert [cell.kind for cell in everything] == ["plain", "corruption"] * 2 and "one category only" in notes[0]
    assert not plan(config(together, BANK, shift=replace(shift, configurations=("bank",))), data)[1]


def test_shifts_are_cells_of_their_own(data):
    shift = ShiftEntry(corruptions=("brightness", "rotation"), severities=(1, 3), contamination=(0.0, 0.1))
    everything = plan(config(shift=shift), data)[0]
    assert [cell.kind for cell in select(everything)] == ["plain", "plain"]
    cells = select(everything, shift=True, category=["gear"])
    assert [(c.kind, c.corruption, c.severities, c.shares) for c in cells] == [
        ("plain", "", (), ()), ("corruption", "brightness", (1, 3), ()), ("corruption", "rotation", (1, 3), ()),
        ("contamination", "", (), (0.0, 0.1)),
    ]  # fmt: skip


def test_a_key_names_what_the_result_depends_on(data):
    cell = planned(data=data)[0]
    assert cell.key == replace(cell, root="elsewhere", dataset="Another", configuration="another name").key
    others = [
        *(replace(cell, **{field: "x"}) for field in ("images", "trained", "code", "category")), replace(cell, together=("gear",)),
        replace(cell, kind="contamination", shares=(0.1,)), *planned(replace(BANK, settings={"image_size": 96}), data=data),
        *planned(LOOSE, seeds=(0, 1), data=data),
    ]  # fmt: skip
    assert len({cell.key, *(other.key for other in others)}) == 1 + len(others)
    assert planned(replace(BANK, settings=BANK.settings | {"calibration": "auto"}), data=data)[0].key == cell.key
    loose = planned(LOOSE, data=data)[0]
    assert cell.model_key() == loose.model_key() and cell.model_key(whole=True) != loose.model_key(whole=True)


@pytest.mark.parametrize("base", ["lite", "memory-bank", "anomalib-padim", "sd14"])
def test_a_key_follows_every_default(data, base):
    (cell,) = planned(Configuration(name="defaults", base=base), data=data)
    others = set()
    for name, value in leaves_of(to_json(cell.settings)):
        with contextlib.suppress(ConfigError):  # a value that this setting cannot have
            others.add(with_values(cell.settings, {name: another(value)}))
    others.discard(cell.settings)
    assert len(others) > len(to_json(cell.settings)) // 2
    assert len({cell.key, *(replace(cell, settings=other).key for other in others)}) == 1 + len(others)


def leaves_of(tree: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        yield from leaves_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def another(value: object) -> object:
    """Something else of the same type."""
    if value is None:
        return 7  # most settings that may be left open are numbers
    if isinstance(value, bool):
        return not value
    return value / 2 if isinstance(value, float) else value + 1 if isinstance(value, int) else [*value[:-1], 1] if value else value


def test_every_package_is_one_whose_code_counts_or_not():
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages - set(DECIDING) == {"report", "benchmark", "cluster", "interop", "service", "cli"}


@pytest.mark.parametrize("part", DECIDING)
def test_a_key_follows_the_code(data, tmp_path, part):
    shutil.copytree(SOURCE, tmp_path / "gladad", ignore=shutil.ignore_patterns("__pycache__"))
    (before,), (same,) = ([plan(config(), data, source=source)[0][0]] for source in (SOURCE, tmp_path / "gladad"))
    place = tmp_path / "gladad" / part
    changed = max([place, *place.rglob("*.py")])
    changed.write_text(changed.read_text() + "\n")
    after = plan(config(), data, source=tmp_path / "gladad")[0][0]
    assert before.key == same.key != after.key and before.model_key() != after.model_key()
    (tmp_path / "gladad/benchmark/tables.py").write_text("")
    assert plan(config(), data, source=tmp_path / "gladad")[0][0].key == after.key


@pytest.mark.parametrize("name", ["train/good/000", "test/good/000", "test/hole/000", "ground_truth/hole/000_mask"])
def test_a_key_follows_one_pixel_but_not_the_place(tmp_path, name):
    root = write_category(tmp_path / "here/widgets/gear", train=6, test=2)
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))  # the size of such a file says nothing of what is in it
        path.unlink()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (before,), (elsewhere,) = (planned(data=tmp_path / place) for place in ("here", "there"))
    path = (root / name).with_suffix(".bmp")
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)
    (after,) = planned(data=tmp_path / "here")
    assert before.key == elsewhere.key != after.key
    assert (before.model_key() == after.model_key()) == (not name.startswith("train"))


def test_a_key_follows_the_textures(data, tmp_path):
    configuration = replace(LITE, settings=SMALL | {"textures": str(tmp_path)})
    keys = []
    for seed in (0, 1):
        draw_part(seed)[0].save(tmp_path / "texture.bmp")
        keys.append(planned(configuration, data=data)[0].model_key())
    assert keys[0] != keys[1]


@pytest.mark.parametrize("change", ["mask", "label", "split", "image"])
def test_a_key_follows_the_labels(tmp_path, change):
    write_category(tmp_path / "parts", train=6, test=2)
    rows = [("parts/test/hole/000.png", 1, "parts/ground_truth/hole/000_mask.png", "test"), ("parts/test/good/000.png", 0, "", "test"),
            ("parts/train/good/000.png", 0, "", "train"), ("parts/train/good/001.png", 0, "", "train")]  # fmt: skip
    other = list(rows)
    if change == "mask":
        other[0] = (*rows[0][:2], "", "test")
    elif change == "label":
        other[1] = (rows[1][0], 1, "", "test")
    elif change == "split":
        other[1], other[3] = (*rows[1][:3], "train"), (*rows[3][:3], "test")
    else:
        other.append(("parts/train/good/002.png", 0, "", "train"))
    keys = []
    for lines in (rows, other):
        text = "".join(f"{image},{label},{mask},{split}\n" for image, label, mask, split in lines)
        (tmp_path / "widgets.csv").write_text("image,label,mask,split\n" + text)
        keys.append(plan(config(dataset=(DatasetEntry(name="M", path="widgets.csv"),)), tmp_path)[0][0].key)
    assert keys[0] != keys[1]


# ---------------------------------------------------------------------------------------------------------- running


def test_cells_are_run_once_and_survive_a_failure(data, tmp_path):
    none = replace(BANK, name="none", settings=BANK.settings | {"features": str(tmp_path / "nowhere")})
    cells = planned(BANK, none, replace(BANK, name="again"), data=data, category="lever")
    lines: list[str] = []
    failed = run(cells, tmp_path, jobs=2, tell=lines.append)
    assert [(cell.configuration, "neither a folder" in problem) for cell, problem in failed] == [("none", True)]
    assert sum("FAILED" in line for line in lines) == 1 and sum("image AUROC" in line for line in lines) == 1
    first = cells[0].file(tmp_path)
    before = first.stat().st_mtime_ns
    lines.clear()
    assert len(run(cells, tmp_path, tell=lines.append)) == 1
    assert first.stat().st_mtime_ns == before and lines[0] == "1 of 2 cells were finished before"
    record, again = finished(cells, tmp_path)
    assert again == record | {"cell": record["cell"] | {"configuration": "again"}}  # one result under two headings
    (result,) = record["results"]
    assert result["fitted"] and result["fit_seconds"] > 0 and 0.05 < record["peak_memory_gib"] < 8
    assert "image_auroc" in result["metrics"] and "pixel_auroc" not in result["metrics"]


def test_inspection_variants_share_a_training_and_shifts_share_the_model(data, tmp_path):
    fixed = replace(LITE, name="fixed", settings=SMALL | {"reconstruction": {"timesteps": [600, 400]}})
    shift = ShiftEntry(corruptions=("gaussian_noise",), severities=(1, 5), contamination=(0.0, 0.05), configurations=("lite",))
    cells = select(plan(config(LITE, fixed, shift=shift), data)[0], shift=True, category=["gear"])
    for cell in cells:
        run_cell(cell, tmp_path)
    plain, noise, mixed, other = finished(cells, tmp_path)
    assert [r["results"][0]["fitted"] for r in (plain, noise, mixed, other)] == [True, False, False, False]
    assert plain["threads"] == plain["results"][0]["fit_threads"] >= 1
    assert len(list((tmp_path / "models").iterdir())) == 2  # the shared one, and the one with a defective image in it
    assert [result["severity"] for result in noise["results"]] == [1, 5]
    assert all("pixel_auroc" not in result["metrics"] for result in noise["results"])
    assert noise["results"][1]["metrics"]["image_auroc"] <= plain["results"][0]["metrics"]["image_auroc"]
    assert [(r["share"], r["defective"]) for r in mixed["results"]] == [(0.0, 0), (0.05, 1)]
    assert {r["counts"]["anomalous"] for r in mixed["results"]} == {3}  # all are judged without those that were mixed in

    # An adjusted model is that of a fit with these settings.
    run_cell(other_cell := cells[-1], tmp_path / "alone")
    alone = finished([other_cell], tmp_path / "alone")[0]["results"][0]
    assert alone["fitted"] and alone["metrics"]["threshold"] == other["results"][0]["metrics"]["threshold"]
    assert alone["metrics"]["pixel_auroc"] == other["results"][0]["metrics"]["pixel_auroc"]


def test_one_model_for_all_categories_is_trained_once(data, tmp_path):
    cells = plan(config(replace(LITE, multi_class=True)), data)[0]
    assert [cell.together for cell in cells] == [("gear", "lever")] * 2 and cells[0].key != cells[1].key
    for cell in cells:
        run_cell(cell, tmp_path)
    gear, lever = finished(cells, tmp_path)
    assert [r["results"][0]["fitted"] for r in (gear, lever)] == [True, False]
    assert gear["results"][0]["fit_seconds"] == lever["results"][0]["fit_seconds"]
    assert {r["results"][0]["counts"]["normal"] for r in (gear, lever)} == {4}


def test_shares_that_take_too_many_defective_images_are_left_out(data, tmp_path):
    cell = replace(planned(data=data)[0], kind="contamination", shares=(0.05, 0.2))
    run_cell(cell, tmp_path)
    (record,) = finished([cell], tmp_path)
    assert [result["share"] for result in record["results"]] == [0.05] and "gear: 20% contamination left out" in record["notes"][0]
    with pytest.raises(DataError, match="it takes 6 defective images, over half of the 4 there are"):
        run_cell(replace(cell, shares=(0.2,)), tmp_path)


@pytest.mark.parametrize("shots", [None, 4])
def test_another_rate_of_a_baseline_shares_its_model(data, tmp_path, shots):
    few = {} if shots is None else {"shots": shots}
    cells = planned(*(replace(one, settings=one.settings | few) for one in (BANK, LOOSE)), data=data)
    for cell in cells:
        run_cell(cell, tmp_path)
    strict, loose = (record["results"][0] for record in finished(cells, tmp_path))
    assert (strict["fitted"], loose["fitted"]) == (True, False)
    assert loose["metrics"]["threshold"] < strict["metrics"]["threshold"]


def test_changed_images_are_learnt_from_anew(data, tmp_path):
    shutil.copytree(data / "widgets", tmp_path / "widgets")
    for _ in range(2):
        (cell,) = planned(data=tmp_path)
        run_cell(cell, tmp_path)
        assert finished([cell], tmp_path)[0]["results"][0]["fitted"]
        image = next((tmp_path / "widgets/gear/train/good").iterdir())
        image.write_bytes(image.read_bytes()[:-1] + b"!")  # of the same name and size
    assert len(list((tmp_path / "cells").iterdir())) == len(list((tmp_path / "models").iterdir())) == 2


@pytest.mark.parametrize(
    ("how", "text", "configurations"),
    [(signal.SIGINT, TOML, ["bank"]), (signal.SIGTERM, TOML, ["bank"]), (signal.SIGKILL, TOML_LOOSE, ["bank", "loose"])],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_a_benchmark_that_is_stopped_goes_on_where_it_was(data, config_file, tmp_path, how, text, configurations):
    out = tmp_path / "out"
    config_file.write_text(text)
    expected = [(category, configuration) for category in ("gear", "lever") for configuration in configurations]
    command = [sys.executable, "-m", "gladad", "benchmark", str(config_file), "--data", str(data), "-o", str(out), "--seed", "0"]

    def disposition() -> None:  # a shell in the background may have had Ctrl-C ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL if how == signal.SIGINT else signal.SIG_IGN)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=disposition) as process:
        wait_for(lambda: list(out.glob("cells/*.json")), process)
        wait_for(lambda: children(process.pid), process)
        workers = children(process.pid)
        if how == signal.SIGKILL:
            process.kill()
        elif how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(signal.SIGINT)  # ignored, as with nohup
            process.send_signal(how)
        message = process.communicate(timeout=60)[1]
        assert process.returncode in {130, -signal.SIGKILL}
    if how != signal.SIGKILL:
        assert "finished cells are kept" in message and "nothing was written" not in message
        assert "FAILED" not in message and "Traceback" not in message
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):  # a worker does not outlive the program
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}
    assert 1 <= len(before) < len(expected)
    (out / "cells/.half.json.x.partial").write_text("half")
    assert main([*command[3:], "--jobs", "2", "--quiet"]) == 0
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert len(list(out.glob("cells/*.json"))) == len(expected) and not list(out.rglob("*.partial"))
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [(row["category"], row["configuration"]) for row in rows] == expected


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def children(parent: int) -> list[int]:
    """The workers of a benchmark: they are forked off a server process that it starts first."""
    with contextlib.suppress(psutil.NoSuchProcess):  # gone by now
        below = psutil.Process(parent).children(recursive=True)
        return [process.pid for process in below if process.ppid() != parent]
    return []


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_one_benchmark_at_a_time_in_a_folder(data, tmp_path):
    cells = plan(config(), data)[0]
    with FileLock(tmp_path / ".lock"), pytest.raises(WriteError, match="another benchmark"):
        run(cells, tmp_path)


def explode(what: str) -> None:
    """A job that goes wrong."""
    if what == "exit":
        os._exit(3)
    if what == "known":
        raise MissingExtraError("this", "'gladad[that]'")
    raise UnicodeDecodeError("ascii", b"x", 0, 1, "odd")  # one whose constructor takes more than a sentence


@pytest.mark.parametrize(("what", "said"), [("exit", KILLED), ("known", r"gladad\[that\]"), ("odd", "UnicodeDecodeError: .*odd")])
def test_what_goes_wrong_in_a_worker_is_said(what, said):
    with ThreadPoolExecutor(1) as executor:
        assert re.search(said, executor.submit(partial(Workers().run, explode, what, threads=1)).result())


MASKS = """
import signal, threading
from gladad.benchmark.workers import Workers

def run():
    print(Workers().run(exec, "import signal; raise ValueError(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))", threads=1))

for _ in range(2):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
"""


def test_a_worker_does_not_see_ctrl_c() -> None:
    done = subprocess.run([sys.executable, "-c", MASKS], capture_output=True, text=True, check=True)
    assert done.stdout == "ValueError: True\n" * 2  # the first one, too


# ----------------------------------------------------------------------------------------------------------- tables


def record(category: str, configuration: str, seed: int, kind: str = "plain", **facts: object) -> dict[str, object]:
    metrics = {name: facts.pop(name) for name in ("image_auroc", "false_reject_rate", "pixel_auroc") if name in facts}
    result = {"metrics": metrics | {"seconds_per_image": 0.02}, "fit_seconds": 30.0, "fitted": True} | facts
    return {
        "notes": [], "version": "1", "threads": 1,
        "cell": {"dataset": "D", "category": category, "configuration": configuration, "seed": seed},
        "kind": kind, "corruption": facts.get("corruption", ""), "results": [result], "peak_memory_gib": 1.5,
    }  # fmt: skip


RECORDS = [
    record("a", "one", 0, image_auroc=0.9, false_reject_rate=0.04, pixel_auroc=0.7),
    record("a", "one", 1, image_auroc=0.8, false_reject_rate=0.02, pixel_auroc=0.7),
    record("a", "two", 0, image_auroc=0.7, false_reject_rate=0.0),
    record("b", "one", 0, image_auroc=0.5, false_reject_rate=0.0),
    record("b", "one", 1, image_auroc=0.7, false_reject_rate=0.0),
    record("a", "one", 0, "corruption", corruption="motion_blur", severity=3, image_auroc=0.6, false_reject_rate=0.5),
    record("a", "one", 0, "contamination", share=0.05, image_auroc=0.75),
]


def test_tables_in_the_fields_format():
    text = to_markdown("T", RECORDS, notes=["PaDiM: left out"])
    lines = text.splitlines()
    assert "* PaDiM: left out" in lines
    assert "Not all have the same number of seeds: one 2, two 1." in lines
    # mean ± sample standard deviation over the seeds; the mean of all categories per seed first
    assert lines[lines.index("### Image AUROC") + 2 :][:5] == [
        "| category | one | two |",
        "|---|---|---|",
        "| a | **85.0 ± 7.1** | 70.0 |",
        f"| b | 60.0 ± 14.1 | {benchmark_tables.DASH} |",
        f"| **mean** | 72.5 ± 3.5 | {benchmark_tables.DASH} |",
    ]
    assert "| a | 3.0 ± 1.4 | **0.0** |" in lines  # fewer false rejects are better
    assert f"| a | 70.0 ± 0.0 | {benchmark_tables.DASH} |" in lines
    assert "### Pixel AP" not in lines
    assert "| one | 30 | 20 | 1.5 | 4 |" in lines
    assert "| motion blur 3 | 60.0 |" in lines and "| none | 90.0 |" in lines  # of the same categories and seeds
    assert "| 5% defective | 75.0 |" in lines


def test_tables_of_failures_and_of_nothing():
    places = dict.fromkeys(("base", "root", "layout", "code", "trained", "images"), "")
    cell = Cell(dataset="D", category="a", configuration="bank", settings=FitSettings(), **places)
    assert "* FAILED: D a: bank, seed 0: no memory" in to_markdown("T", [], [(cell, "no memory")])
    assert to_csv([]).startswith("dataset,category,configuration,seed,kind")


def test_files_of_tables(tmp_path):
    page = write_tables(tmp_path, "T", RECORDS, [], [])
    assert page.read_text().startswith("# T\n")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert len(rows) == len(RECORDS) and rows[5]["severity"] == "3" and rows[6]["share"] == "0.05"
    assert float(rows[0]["image_auroc"]) == 0.9 and rows[0]["pixel_ap"] == ""
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == len(RECORDS)


# ---------------------------------------------------------------------------------------------------------- command


def test_the_command_lists_and_refuses(capfd, tmp_path, config_file, data):
    assert main(["benchmark", "--list"]) == 0
    assert "four_products: Four products" in capfd.readouterr().out
    assert main(["benchmark"]) == 1 and "--list" in capfd.readouterr().err
    assert main(["benchmark", str(config_file), "--data", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "none of the benchmark's data sets" in capfd.readouterr().err
    arguments = ["benchmark", str(config_file), "--data", str(data), "-o", str(tmp_path / "out"), "--tables"]
    assert main(arguments) == 0
    assert "0 of 4 cells finished" in capfd.readouterr().out and (tmp_path / "out/results.md").is_file()


def test_tables_are_of_everything_that_is_finished(data, tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(TOML_LOOSE)
    run_cell(planned(data=data)[0], tmp_path / "out")
    arguments = ["benchmark", str(path), "--data", str(data), "-o", str(tmp_path / "out"), "--category", "gear", "--seed", "0", "-q"]
    assert main([*arguments, "--configuration", "loose"]) == 0
    assert "| category | bank | loose |" in (tmp_path / "out/results.md").read_text()
