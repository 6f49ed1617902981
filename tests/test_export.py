"""Exported models decide as the models they are from, without torch."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from filelock import FileLock
from test_imports import run

import gladad
from gladad.cli.main import main
from gladad.core.errors import ConfigError, DataError, MissingExtraError, ModelFormatError
from gladad.core.images import list_images, load_image, resize_pixels
from gladad.detector import export as exporting
from gladad.detector.export import ExportError, compare
from gladad.detector.glad import Glad
from gladad.models.exported import engines
from gladad.models.exported.conversion import to_openvino
from gladad.models.exported.model import Exported
from gladad.models.feature_diffusion.graphs import Denoiser, Encoder, Scorer, Smaller, _in_float32

SMALL = TINY | {"training.steps": 8, "false_reject_rate": 0.2, "calibration": "held-out", "widths": [32, 64], "memory": 3000}
SEARCHING = {
    "reconstruction.timesteps": [400, 200],
    "reconstruction.adaptive": True,
    "reconstruction.noise": "drawn",
    "tolerate": ["noise"],
}
SETTINGS = {
    "no memory": {"scales": 1, "memory": 0, "reconstruction.fusion": "calibrated"},
    "deviation": {"reconstruction": {"method": "deviation"}},
    "three scales": {"image_size": 128, "scales": 3, "memory": 300},
}


@pytest.fixture(scope="module")
def original(category: Path) -> Glad:
    """It searches steps and tolerates noise: what is hardest to trace."""
    return Glad.from_base("lite", settings=SMALL | SEARCHING).fit(category)


@pytest.fixture(scope="module")
def folder(original: Glad, category: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model; written once for all processes of the tests, because tracing takes long."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    target = shared / "exported"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            original.export(category, target)
    return target


@pytest.fixture
def same_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are those that are there, whatever model is exported."""

    def copy(model: object, target: Path) -> None:
        for path in (folder / "base").iterdir():
            shutil.copyfile(path, target / path.name)

    monkeypatch.setattr("gladad.models.feature_diffusion.graphs.write_graphs", copy)


def images(category: Path) -> list[Path]:
    return sorted((category / "test").glob("*/*.png"))


def test_scores_maps_and_decisions_are_those_of_the_original(original, folder, category):
    exported = Glad.from_pretrained(folder)
    assert isinstance(exported.model_, Exported)
    for path in images(category):
        one, other = original.inspect(path), exported.inspect(path)
        assert other.pred_score == pytest.approx(one.pred_score, rel=1e-4)
        assert (one.pred_label, one.step, one.p_value) == (other.pred_label, other.step, other.p_value)
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=1e-3)
        assert np.abs(one.reconstruction.astype(int) - other.reconstruction).max() <= 2
    assert exported.calibration_.threshold.value == pytest.approx(original.calibration_.threshold.value, rel=1e-4)


def test_a_script_compares_decisions_with_the_original(original, folder, category, tmp_path, capsys):
    original.save_pretrained(tmp_path / "original")
    shutil.copytree(folder, tmp_path / "stricter")
    calibration = json.loads((tmp_path / "stricter" / "calibration.json").read_text())
    calibration["threshold"]["value"] /= 100
    (tmp_path / "stricter" / "calibration.json").write_text(json.dumps(calibration))
    script = runpy.run_path(str(Path(gladad.__file__).parents[2] / "scripts" / "compare_decisions.py"))
    assert script["main"]([str(tmp_path / "original"), str(folder), "--images", str(category)]) == 0
    count = len(list_images(category)) - len(list(category.glob("ground_truth/*/*")))
    said = capsys.readouterr().out
    assert f"{count} images" in said and "exported: scores differ by" in said and "; 0 decided otherwise" in said
    assert script["main"]([str(tmp_path / "original"), str(tmp_path / "stricter"), "--images", str(category / "test"), "--most", "3"]) == 1
    said = capsys.readouterr().out
    assert "3 images" in said and "0 decided otherwise" not in said and str(category / "test") in said


def test_it_says_where_it_is_from(original, folder):
    described = Glad.from_pretrained(folder).describe()
    assert described["config"]["origin"] == {"name": "lite", "model_id": original.model_id}
    assert described["model_id"] not in ("", original.model_id)
    compared = described["provenance"]["compared"]
    assert compared["good"] == compared["defects"] == 4 and compared["largest"] < 1e-4
    assert main(["info", str(folder)]) == 0


def test_bits_do_not_depend_on_company(folder, category):
    exported = Glad.from_pretrained(folder)
    alone = [exported.inspect(path).pred_score for path in images(category)]
    assert [prediction.pred_score for prediction in exported.predict(images(category)[::-1])][::-1] == alone


def test_graphs_take_any_batch(folder, category):
    model = Glad.from_pretrained(folder).model_
    assert isinstance(model, Exported)
    pixels = np.stack([np.resize(load_image(path), (*model.image_size, 3)) for path in images(category)[:3]])
    latents, rebuilt = [], []
    for encoder, denoiser in zip(model._encoders, model._denoisers, strict=True):
        latents += encoder([pixels])
        np.testing.assert_allclose(latents[-1], np.concatenate([encoder([each[None]])[0] for each in pixels]), atol=1e-4)
        found, step = denoiser([latents[-1], latents[-1]])
        rebuilt.append(found)
        assert step.shape == (3,) and found.shape == latents[-1].shape
    maps, score = model._scorer([np.abs(each[:, :1]) for each in latents])
    assert maps.shape == (3, *model.image_size) and score.shape == (3,)
    assert model._decoder([rebuilt[0]])[0].shape == (3, *model.image_size, 3)


def test_inspection_needs_no_torch(folder, category, tmp_path):
    arguments = ["predict", str(folder), str(category / "test" / "hole"), "-o", str(tmp_path / "out")]
    code = f"import sys; from gladad.cli.main import main; s = main({arguments!r}); print({{'torch', 'scipy.stats'}} & set(sys.modules), s)"
    assert run(code).splitlines()[-1] == "set() 0"
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {row["model_id"] for row in rows} == {Glad.from_pretrained(folder).model_id}


def test_nor_does_an_actor_of_ray(folder, category, tmp_path):
    manifest = tmp_path / "images.csv"
    manifest.write_text("id,path\n" + "".join(f"{number},{path}\n" for number, path in enumerate(images(category))))
    code = f"""
import sys
from pathlib import Path
from gladad.cluster.inspection import Inspector, Job, _begun
job = Job(model=Path({str(folder)!r}), manifest=Path({str(manifest)!r}), output=Path({str(tmp_path / "out")!r}))
_begun(job)
print(Inspector(job)({{"block": [0]}})["images"], Inspector(job)({{"block": [0]}})["skipped"], "torch" in sys.modules)"""
    assert run(code).splitlines()[-1] == "[8] [0] False"


def test_saved_again_it_is_the_same(folder, category, tmp_path):
    exported = Glad.from_pretrained(folder)
    exported.save_pretrained(tmp_path / "copy")
    again = Glad.from_pretrained(tmp_path / "copy")
    path = images(category)[0]
    assert again.inspect(path).pred_score == exported.inspect(path).pred_score
    assert again.model_.digest() == exported.model_.digest()


def test_it_can_be_calibrated_and_asked_for_another_rate(folder, category, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    assert main(["calibrate", str(tmp_path / "model"), str(category / "train"), "-q"]) == 0
    exported = Glad.from_pretrained(tmp_path / "model")
    assert exported.provenance_["left_out"] == 12
    exported.set_false_reject_rate(0.4)
    assert exported.calibration_.threshold.false_reject_rate == 0.4


def test_openvino_decides_alike(original, category, same_graphs, tmp_path, capsys):
    original.save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(category), "-o", str(tmp_path / "out"), "--format", "openvino"]
    assert main(arguments) == 0
    assert "4 good images and 4 with synthetic defects are decided alike" in capsys.readouterr().out
    exported = Glad.from_pretrained(tmp_path / "out")
    for path in images(category):
        assert exported.inspect(path).pred_score == pytest.approx(original.inspect(path).pred_score, rel=1e-4)


def test_a_planted_difference_is_caught(original, category, same_graphs, tmp_path, monkeypatch):
    inspect = Exported.inspect

    def louder(self, pixels):
        found = inspect(self, pixels)
        return replace(found, score=found.score * (2 if pixels.min() < 40 else 1))

    monkeypatch.setattr(Exported, "inspect", louder)
    fitted = original._require_fit()
    path = images(category)[-1]
    dark = load_image(path)
    with pytest.raises(ExportError, match=r"decided otherwise: .*; their scores lie too near the threshold"):
        other = replace(fitted, model=Glad.from_pretrained(_exported(original, category, tmp_path)).model_)
        limit = replace(fitted.calibration, threshold=replace(fitted.calibration.threshold, value=1.5 * fitted.model.inspect(dark).score))
        compare(replace(fitted, calibration=limit), replace(other, calibration=limit), [path], [dark], 0, lambda *_: None)


def _exported(original: Glad, category: Path, tmp_path: Path) -> Path:
    original.export(category, tmp_path / "exported")
    return tmp_path / "exported"


def test_nothing_is_written_where_decisions_differ(original, category, same_graphs, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "compare", lambda *_: (_ for _ in ()).throw(ExportError("1 of 8 images would be decided otherwise")))
    with pytest.raises(ExportError):
        original.export(category, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_cross_fitted_thresholds_stay(category, same_graphs, tmp_path):
    fitted = Glad.from_base("lite", settings=SMALL | SEARCHING | {"calibration": "cross-fit"}).fit(category)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "compare", lambda *_: exporting.Comparison(0, 0, 0.0))
        fitted.export(category, tmp_path / "out")
    assert Glad.from_pretrained(tmp_path / "out").calibration_ == fitted.calibration_


def judged(original: Glad, path: Path) -> float:
    """Score by the modules that are traced."""
    copy = _in_float32(original.model_)
    pixels = torch.from_numpy(resize_pixels(load_image(path), copy.image_size))[None]
    magnitudes = []
    with torch.no_grad():
        for number, scale in enumerate(copy.all_scales()):
            latent = Encoder(copy, number)(pixels)
            nearest = [scale.memory(latent)] if scale.memory.rows.numel() else []
            magnitudes.append(scale.magnitude(latent, Denoiser(scale)(latent, *nearest)[0]))
        return float(Scorer(copy)(magnitudes)[1])


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_other_settings(category, changes):
    original = Glad.from_base("lite", settings=SMALL | changes).fit(category)
    for path in images(category)[::4]:
        pixels = resize_pixels(load_image(path), original.model_.image_size)
        assert judged(original, path) == pytest.approx(original.model_.inspect(pixels).score, rel=1e-4)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_smaller_image_is_that_of_an_antialiased_resize(factor):
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(image, (32 // factor, 48 // factor), mode="bilinear", antialias=True)
    torch.testing.assert_close(Smaller((32, 48), factor)(image), wanted, atol=1e-6, rtol=0)


REFUSED = {
    "format": (["--format", "tflite"], "format must be one of onnx, openvino, not 'tflite'"),
    "precision": (["--precision", "fp8"], "precision must be one of"),
    "bfloat16": (["--precision", "bfloat16"], "ONNX Runtime does not compute in bfloat16"),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED)
def test_refused(model, category, tmp_path, capsys, flags, message):
    assert main(["export", str(model), str(category), "-o", str(tmp_path / "out"), "-q", *flags]) == 1
    assert message in capsys.readouterr().err


def test_other_images_are_refused(original, category, tmp_path):
    with pytest.raises(DataError, match="4 of the 4 images that the thresholds are from are missing"):
        original.export(images(category), tmp_path / "out")


def test_other_kinds_are_refused(category, tmp_path):
    bank = Glad.from_base("pca", settings={"image_size": 64, "calibration": "held-out"}).fit(category)
    with pytest.raises(ConfigError, match="models of the kind pca cannot be exported; lite can"):
        bank.export(category, tmp_path / "out")


def test_it_cannot_be_trained(folder, category):
    exported = Glad.from_pretrained(folder)
    with pytest.raises(ConfigError, match="an exported model cannot be trained"):
        exported.fit(category)
    with pytest.raises(ConfigError, match="an exported model cannot be trained"):
        exported.adjust(category, {"seed": 3})
    with pytest.raises(ConfigError, match="models of the kind exported cannot be exported"):
        exported.export(category, folder.parent / "again")


@pytest.mark.parametrize("name", ["encoder_1.onnx", "memory.safetensors"])
def test_a_damaged_folder_is_refused(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "base" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelFormatError, match=f"{name}: damaged"):
        Glad.from_pretrained(tmp_path / "model")
    file.unlink()
    with pytest.raises(ModelFormatError, match=f"{name}: missing"):
        Glad.from_pretrained(tmp_path / "model")


def test_a_description_that_does_not_fit_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    description = json.loads(file.read_text())
    description["config"]["form"] = "tflite"
    file.write_text(json.dumps(description))
    with pytest.raises(ModelFormatError, match="form"):
        Glad.from_pretrained(tmp_path / "model")


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnxscript", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="pip install onnxruntime"):
        Glad.from_pretrained(folder)
    with pytest.raises(MissingExtraError, match="pip install openvino"):
        to_openvino(tmp_path)


def test_bfloat16_needs_a_processor_that_computes_in_it(folder, tmp_path):
    import openvino

    shutil.copyfile(folder / "base" / "decoder.onnx", tmp_path / "decoder.onnx")
    to_openvino(tmp_path)
    native = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if native:
        assert engines.open_graph(tmp_path, "decoder", "openvino", "bfloat16") is not None
    else:
        with pytest.raises(ConfigError, match="does not compute in bfloat16"):
            engines.open_graph(tmp_path, "decoder", "openvino", "bfloat16")
