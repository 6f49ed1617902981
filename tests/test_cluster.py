"""Many images and many products: manifests, parts, what an actor does, and all of it over a Ray that is started once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import dataset, parquet

from gladad.cli.main import main
from gladad.cluster.fits import fit_product, plan_fits, run_fits
from gladad.cluster.inspection import TRIES, Inspector, Job, _begun, inspect_manifest
from gladad.cluster.manifest import BLOCK, adopt, blocks, read_block
from gladad.cluster.parts import finished, map_writer, part_file, schema, write_part
from gladad.core.errors import ConfigError, DataError, GladError
from gladad.core.storage import WriteError
from gladad.models.registry import make_settings

BANK = {"image_size": 64, "false_reject_rate": 0.2}


def write_table(path: Path, ids: object, paths: object = None, **more: object) -> Path:
    names = [f"{number}.png" for number in range(len(ids))] if paths is None else paths
    parquet.write_table(pa.table({"id": ids, "path": names, **more}), path, row_group_size=100)
    return path


# -------------------------------------------------------------------------------------------------------- manifest


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_manifest_is_cut_into_blocks_in_its_order(tmp_path, suffix):
    ids, names = list(range(3000, 0, -3)), [f"a b/{number}.png" for number in range(1000)]
    manifest = tmp_path / f"images{suffix}"
    if suffix == ".csv":
        manifest.write_text("more,path,id\n" + "".join(f"x,{name},{number}\n" for number, name in zip(ids, names, strict=True)))
    else:
        write_table(manifest, pa.array(ids, pa.int32()), names, more=["x"] * 1000)
    copy = tmp_path / "copy.parquet"
    assert adopt(manifest, copy) == 1000
    assert blocks(1000) == 4
    found = [read_block(copy, block) for block in range(4)]
    assert [len(rows) for rows in found] == [BLOCK, BLOCK, BLOCK, 1000 - 3 * BLOCK]
    assert [row for rows in found for row in rows] == list(zip(ids, names, strict=True))


@pytest.mark.parametrize("rows", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
@pytest.mark.parametrize("piece", [100, BLOCK, 10_000])
def test_blocks_do_not_depend_on_how_the_manifest_is_stored(tmp_path, rows, piece):
    names = [f"{number}.png" for number in range(rows)]
    parquet.write_table(pa.table({"id": range(rows), "path": names}), tmp_path / "images.parquet", row_group_size=piece)
    copy = tmp_path / "copy.parquet"
    assert adopt(tmp_path / "images.parquet", copy) == rows
    found = [read_block(copy, block) for block in range(blocks(rows))]
    assert [len(block) for block in found[:-1]] == [BLOCK] * (len(found) - 1)
    assert [row for block in found for row in block] == list(enumerate(names))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("id\n1\n", "no column path; needed are id and path"),
        ("path,label\na.png,0\n", "no column id;"),
        ("id,path\n1,a.png\n2,b.png\n1,c.png\n", "id 1 is there twice"),
        ("id,path\n1.5,a.png\n", "not a table of integer ids"),
        ("id,path\n,a.png\n", "no id or no path"),
        ("id,path\n", "no rows"),
    ],
)
def test_what_a_manifest_lacks_is_one_line_of_the_command(tmp_path, model, capfd, content, said):
    manifest, out = tmp_path / "images.csv", tmp_path / "out"
    if content is not None:
        manifest.write_text(content)
    assert main(["inspect", str(model), "--manifest", str(manifest), "-o", str(out)]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: {manifest}: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"id": ["1"], "path": ["a.png"]}, "id is string; make it an integer"),
        ({"id": [1], "path": [2]}, "path is int64; make it text"),
        ({"id": pa.array([2**63], pa.uint64()), "path": ["a.png"]}, "not a table of integer ids"),
        ({"id": [1], "path": pa.array([None], pa.string())}, "no id or no path"),
    ],
)
def test_a_parquet_file_of_other_kinds_is_refused(tmp_path, columns, said):
    parquet.write_table(pa.table(columns), tmp_path / "images.parquet")
    with pytest.raises(DataError, match=said):
        adopt(tmp_path / "images.parquet", tmp_path / "copy.parquet")
    (tmp_path / "images.parquet").write_text("id,path\n")
    with pytest.raises(DataError, match="not a table"):
        adopt(tmp_path / "images.parquet", tmp_path / "copy.parquet")


# ----------------------------------------------------------------------------------------------------------- parts


def test_a_part_has_the_fields_of_predictions(detector, category):
    record = detector.inspect(category / "test/hole/000.png").to_record()
    assert schema().names == ["id", *record, "error"]
    table = pa.Table.from_pylist([{"id": 1} | record], schema=schema())
    back = table.to_pylist()[0]
    assert back.pop("id") == 1 and back.pop("error") is None
    assert [region.pop("box") for region in back["regions"]] == [list(region.pop("box")) for region in record["regions"]]
    assert back == record and record["regions"]


def test_what_is_finished_is_what_is_there_whole(tmp_path):
    for block in (3, 123_456_789):
        write_part(tmp_path, block, [{"id": block, "image_path": "a.png", "error": "e"}])
    (tmp_path / ".part-00000004.parquet.x.partial").write_text("half")
    (tmp_path / "part-00000005.npz").touch()
    assert finished(tmp_path) == {3, 123_456_789}
    with pytest.raises(RuntimeError, match="stop"), map_writer(tmp_path, 6) as put:
        put(1, np.zeros((2, 2), np.float32))
        raise RuntimeError("stop")
    assert not part_file(tmp_path, 6, ".npz").exists()


# ----------------------------------------------------------------------------------------------------------- actor


def made(folder: Path, model: Path, category: Path, **changes: object) -> Job:
    """Two blocks: good and defective images among many that are missing, and one that is damaged."""
    names = [f"none/{number}.png" for number in range(BLOCK + 9)]
    names[0], names[7] = "test/good/000.png", str(category / "test/hole/001.png")
    names[BLOCK], names[BLOCK + 1] = "test/good/001.png", "damaged.png"
    link = folder / "data"
    link.mkdir()
    (link / "test").symlink_to(category / "test")
    (link / "damaged.png").write_bytes((category / "test/good/000.png").read_bytes()[:300])
    manifest = write_table(link / "images.parquet", np.arange(len(names)) * 5 + 2, names)
    return Job(**{"model": model, "manifest": manifest, "output": folder / "out", "maps": folder / "maps"} | changes)


def test_an_actor_gives_what_predict_gives_and_a_row_for_every_id(tmp_path, model, detector, category):
    job = made(tmp_path, model, category)
    assert _begun(job) == BLOCK + 9
    found = Inspector(job)({"block": np.array([1, 0])})
    assert found["images"] == [9, BLOCK] and found["skipped"] == [8, BLOCK - 2] and found["process"] == [os.getpid()] * 2
    rows = dataset.dataset(job.output).to_table().to_pylist()  # what begins with _ is passed over
    assert [row["id"] for row in rows] == [number * 5 + 2 for number in range(BLOCK + 9)]
    inspected = {row["id"]: row for row in rows if row["error"] is None}
    for number, name in ((2, "test/good/000.png"), (37, "test/hole/001.png"), (BLOCK * 5 + 2, "test/good/001.png")):
        expected = detector.inspect(category / name)
        row = inspected[number]
        assert (row["pred_score"], row["p_value"], row["pred_label"]) == (expected.pred_score, expected.p_value, int(expected.pred_label))
        assert row["image_path"] == (str(category / name) if number == 37 else name)
        with np.load(part_file(job.maps, (number - 2) // 5 // BLOCK, ".npz")) as maps:
            assert np.array_equal(maps[str(number)], expected.anomaly_map)
    assert len(inspected) == 3 and sum(found["rejected"]) == sum(row["pred_label"] for row in inspected.values())
    assert "none/8.png: no such file" in rows[8]["error"] and "damaged or truncated" in rows[BLOCK + 1]["error"]
    assert zipfile.ZipFile(part_file(job.maps, 1, ".npz")).testzip() is None
    assert not list(job.run.glob("*.tries"))


def test_a_block_that_kills_its_process_again_and_again_is_named(tmp_path, model, category):
    job = made(tmp_path, model, category)
    _begun(job)
    tries = part_file(job.run, 1, ".tries")
    tries.write_bytes(b"." * (TRIES - 1))
    actor = Inspector(job)
    actor({"block": [1]})  # the last time it may
    part_file(job.output, 1).unlink()
    tries.write_bytes(b"." * TRIES)
    with pytest.raises(DataError, match=rf"ids {BLOCK * 5 + 2} to {(BLOCK + 8) * 5 + 2}: the process died {TRIES} times"):
        actor({"block": [1]})
    _begun(job)  # the same command may try again
    assert not tries.exists()


def test_results_are_of_one_manifest_and_one_model(tmp_path, model, category):
    job = made(tmp_path, model, category)
    _begun(job)
    with pytest.raises(ConfigError, match="begun with another calibration; give the same again"):
        _begun(Job(**vars(job) | {"false_reject_rate": 0.5}))
    write_table(job.manifest, [1], ["a.png"])
    with pytest.raises(ConfigError, match="begun with another manifest and maps"):
        _begun(Job(**vars(job) | {"maps": None}))
    (tmp_path / "other").mkdir()
    write_table(tmp_path / "other/theirs.parquet", [1])
    with pytest.raises(WriteError, match="holds something else"):
        _begun(Job(**vars(job) | {"output": tmp_path / "other"}))


def test_what_is_done_needs_no_ray(tmp_path, model, category, monkeypatch):
    job = made(tmp_path, model, category)
    _begun(job)
    Inspector(job)({"block": [0, 1]})
    monkeypatch.setitem(sys.modules, "ray", None)
    done = inspect_manifest(job)
    assert (done.images, done.before) == (0, BLOCK + 9)
    part_file(job.output, 1).unlink()
    with pytest.raises(GladError, match=r"pip install 'gladad\[ray\]'"):
        inspect_manifest(job)


# ------------------------------------------------------------------------------------------------------------ fits


def test_fits_that_are_done_are_passed_over(tmp_path, category):
    settings = make_settings("memory-bank", BANK)
    (fit,) = plan_fits(category, tmp_path, "memory-bank", settings)
    assert fit.folder == tmp_path / category.name and len(fit.images) == 16 and not fit.done
    fit_product(fit, "memory-bank", settings)
    assert fit.done
    told: list[str] = []
    assert run_fits([fit], "memory-bank", settings, tell=told.append) == []
    assert told == ["1 of 1 products were fitted before"]
    (other,) = plan_fits(category, tmp_path, "memory-bank", make_settings("memory-bank", BANK | {"seed": 1}))
    assert not other.done
    with pytest.raises(ConfigError, match="one product at a time"):
        plan_fits(category, tmp_path, "sd14", make_settings("sd14"))
    with pytest.raises(DataError, match="no product has good images"):
        plan_fits(category / "test", tmp_path, "memory-bank", settings, "folders")


# ------------------------------------------------------------------------------------------------------------- Ray

SESSION = """
import json, os, sys, threading, time
from pathlib import Path

import psutil

from gladad.cli.main import main
from gladad.cluster.session import connected

model, manifest, out, pipe, category, config, data = map(Path, sys.argv[1:])

def is_actor(process):
    try:
        return "MapWorker" in " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return False

def kill():
    while not (out / "_run/part-00000001.tries").is_file():  # an actor waits at the pipe
        time.sleep(0.05)
    time.sleep(0.2)
    while not (actors := [p for p in psutil.Process().children(recursive=True) if is_actor(p)]):
        time.sleep(0.05)
    actors[0].kill()
    pipe.unlink()
    pipe.write_bytes((category / "test/good/002.png").read_bytes())

with connected():
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    inspect = ["inspect", str(model), "--manifest", str(manifest), "-o", str(out)]
    found = [main(inspect)]
    thread.join(10)
    found.append(thread.is_alive())
    (out / "part-00000000.parquet").unlink()
    found.append(main(inspect))
    found.append(main([*inspect[:-1], str(out) + "-gpu", "--gpus-per-actor", "1"]))
    (out.parent / "out-tried/_run").mkdir(parents=True)
    (out.parent / "out-tried/_run/part-00000001.tries").write_bytes(b"....")
    found.append(main([*inspect[:-1], str(out) + "-tried"]))
    fit = ["fit-all", str(category), "-o", str(out.parent / "models"), "--base", "memory-bank", "--image-size", "64", "--ray"]
    found += [main(fit), main(fit)]
    found.append(main(["benchmark", str(config), "--data", str(data), "-o", str(out.parent / "bench"), "--ray"]))
    found.append(main(["benchmark", str(config), "--data", str(data / "none"), "-o", str(out.parent / "bench"), "--ray"]))
print(json.dumps(found))
"""
CONFIG = """
title = "Widgets"
[[dataset]]
name = "Widgets"
path = "."
[[configuration]]
name = "bank"
base = "memory-bank"
settings = { image_size = 64 }
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; run: make test-ray")
def test_over_ray(tmp_path, model, category):
    """One session of Ray: an actor killed, a run taken up again, no room, fits and cells as tasks."""
    job = made(tmp_path, model, category, maps=None)
    pipe = job.manifest.parent / "pipe.png"
    os.mkfifo(pipe)
    names = parquet.read_table(job.manifest)["path"].to_pylist()
    names[BLOCK + 2] = "pipe.png"
    write_table(job.manifest, np.arange(len(names)) * 5 + 2, names)
    (tmp_path / "config.toml").write_text(CONFIG)
    places = [model, job.manifest, job.output, pipe, category, tmp_path / "config.toml", category.parent]
    environment = os.environ | {"RAY_worker_niceness": "0"}  # other tests run beside it
    command = [sys.executable, "-c", SESSION, *map(str, places)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert json.loads(lines[-1]) == [0, False, 0, 1, 1, 0, 0, 0, 1], process.stderr
    assert (
        f"{BLOCK} inspected" not in process.stdout and f"2 inspected, 1 rejected, 1 accepted, {BLOCK - 2} skipped; 9 were" in process.stdout
    )
    table = dataset.dataset(job.output).to_table()
    assert sorted(table["id"].to_pylist()) == [number * 5 + 2 for number in range(len(names))]
    assert table["error"].null_count == 4
    errors = process.stderr.splitlines()
    assert [line for line in errors if "no node has 1 CPUs and 1 GPUs" in line] and "1 of 1 products were fitted before" in errors
    assert [line for line in errors if line.startswith("error: ") and f"the process died {TRIES} times" in line]
    assert [line for line in errors if line.startswith("[1/1] Widgets")] and not list(job.output.glob(".*"))
    assert (tmp_path / "models" / category.name / "model.json").is_file() and (tmp_path / "bench/results.csv").is_file()
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr
