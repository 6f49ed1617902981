"""The commands that make models, run as a user would, on the tiny base."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_category

from gladad.cli.main import main
from gladad.cli.options import _size
from gladad.detector.glad import Glad
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.training import DenoiserTask

SHORT = ("--set", "training.pool=4", "--set", "reconstruction.num_steps=5")
TRAIN = ("--steps", "2", "--image-size", "64", "--batch-size", "2", "--precision", "float32", "--tracker", "none", *SHORT, "-q")
UNSEARCHED = (*TRAIN, "--set", "calibrate_step=false")  # without the whole step search of every image


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_category(tmp_path_factory.mktemp("parts") / "widget", train=26, test=2)


def test_the_whole_chain(tiny_base: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tuned, report = (str(tmp_path / name) for name in ("model", "tuned", "report"))
    assert main(["fit", str(parts), "-o", model, "--base", str(tiny_base), *TRAIN]) == 0
    assert not list((tmp_path / "model.training").rglob("step-*"))  # the pictures stay
    before = Glad.from_pretrained(model)
    tune = ["tune-features", model, str(parts), "-o", tuned, "--steps", "2", "--batch-size", "4", "--tracker", "none"]
    assert main(tune) == 0
    after = Glad.from_pretrained(tuned)
    assert after.model_.pipeline.tuned_weights() and not before.model_.pipeline.tuned_weights()
    assert after.calibration_ != before.calibration_
    assert main(["calibrate", tuned, str(parts), "--false-reject-rate", "0.2"]) == 0
    assert "threshold" in capsys.readouterr().out
    assert main(tune) == 0  # once more into the same folder
    assert main(["calibrate", tuned, str(parts), "--false-reject-rate", "0.2", "-q"]) == 0
    assert Glad.from_pretrained(tuned).calibration_.threshold.false_reject_rate == 0.2
    assert main(["predict", tuned, str(parts / "test" / "good"), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2
    assert main(["evaluate", tuned, str(parts), "-o", report, "-q"]) == 0
    assert 0 <= json.loads((tmp_path / "report" / "report.json").read_text())["metrics"]["image_auroc"] <= 1
    assert main(["merge", tuned, "-o", str(tmp_path / "merged")]) == 0
    assert "stands alone" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "merged"), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["config"]["adapted"] is False and "licence" in description["origin"]["base"]


def test_an_autoencoder_is_tuned_and_used(tiny_base: Path, parts: Path, tmp_path: Path) -> None:
    vae = str(tmp_path / "vae")
    arguments = ["--image-size", "64", "--steps", "2", "--batch-size", "2", "--tracker", "none", "-q"]
    assert main(["tune-vae", str(tiny_base), str(parts), "-o", vae, *arguments]) == 0
    plain, tuned = GladPipeline.from_base(tiny_base), GladPipeline.from_base(tiny_base, vae=vae)
    assert not torch.equal(plain.vae.decoder.conv_in.weight, tuned.vae.decoder.conv_in.weight)


def test_a_stop_leaves_checkpoints_and_the_same_command_goes_on(
    tiny_base: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["fit", str(parts), "-o", str(tmp_path / "model"), "--base", str(tiny_base), *UNSEARCHED]
    command[command.index("--steps") + 1] = "4"
    command.remove("-q")
    loss = DenoiserTask.loss

    def stopping(self: object, module: object, step: int, samples: object) -> torch.Tensor:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        result: torch.Tensor = loss(self, module, step, samples)
        return result

    with monkeypatch.context() as patch:
        patch.setattr("gladad.models.stable_diffusion.training.DenoiserTask.loss", stopping)
        assert main(command) == 128 + signal.SIGTERM
    assert "stopped after step 2 of 4" in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and (tmp_path / "model.training" / "all" / "step-0000002").is_dir()
    assert main(command) == 0
    assert "going on after step 2 of 4" in capsys.readouterr().err
    assert (tmp_path / "model" / "model.json").is_file() and not list((tmp_path / "model.training").rglob("step-*"))


def test_one_model_for_all_products(tiny_base: Path, parts: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_category(data / "bolt", train=25, test=2)
    write_category(data / "nut", train=25, test=2)
    arguments = ["--base", str(tiny_base), *UNSEARCHED, "--multi-class", "--training", "full"]
    assert main(["fit", str(data), "-o", str(tmp_path / "models"), *arguments]) == 0
    bolt, nut = (Glad.from_pretrained(tmp_path / "models" / name) for name in ("bolt", "nut"))
    assert nut.model_.pipeline.prompt == "a photo of sks nut"
    for name, value in bolt.model_.pipeline.unet.state_dict().items():
        assert torch.equal(nut.model_.pipeline.unet.state_dict()[name], value)
    assert main(["fit", str(data), "-o", str(tmp_path / "x"), "--multi-class", "--category", "nut"]) == 1
    assert (tmp_path / "models" / "bolt" / "model.json").is_file()


def test_a_checkpoint_is_converted_and_calibrated(tiny_base: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = GladPipeline.from_base(tiny_base).unet
    torch.save({name: value + 0.01 for name, value in unet.state_dict().items()}, tmp_path / "pytorch_model.bin")
    converted = str(tmp_path / "converted")
    assert main(["convert", "--base", str(tiny_base), "--unet", str(tmp_path / "pytorch_model.bin"), "-o", converted]) == 0
    assert "tensors of" in capsys.readouterr().out
    fit = ["fit", str(parts), "-o", str(tmp_path / "model"), "--base", converted, "--steps", "0", "--image-size", "64", "-q"]
    assert main([*fit, "--precision", "float32", "--preset", "mvtec_ad/bottle", "--set", "reconstruction.num_steps=5"]) == 0
    weight = Glad.from_pretrained(tmp_path / "model").model_.pipeline.unet.conv_in.weight
    torch.testing.assert_close(weight, unet.conv_in.weight + 0.01)


def test_the_plan(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_base), "--image-size", "64", "--training", "full", "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("weights", "gradients", "optimizer", "activations", "total", "available on cpu"))
    assert main(["plan", str(tiny_base), "--image-size", "64", "--memory-limit", "100K"]) == 1
    assert "training needs" in capsys.readouterr().err
    assert main(["plan", "--image-size", "64"]) == 0  # sd14 need not be downloaded


def test_sizes() -> None:
    sizes = {"16GiB": 16 * 2**30, "16G": 16 * 2**30, "1.5 gb": 3 * 2**29, "900M": 900 * 2**20, "24": 24 * 2**30, "100K": 100 * 2**10}
    assert {text: _size(text) for text in sizes} == sizes
    assert main(["plan", "--memory-limit", "lots"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "PARTS", "-o", "OUT", "--base", "no/such", "--offline", *TRAIN], "no/such is neither a folder nor in the local cache"),
        (["fit", "PARTS", "-o", "OUT", "--rank", "3"], "training.rank: unknown setting"),
        (["fit", "PARTS", "-o", "OUT", "--base", "BASE", "--tracker", "abacus"], "unknown tracker"),
        (["fit", "PARTS", "-o", "OUT", "--base", "BASE", "--optimizer", "adamw8bit", *TRAIN], "gladad[adamw8bit]"),
        (["tune-vae", "no/such", "PARTS", "-o", "OUT", "--offline"], "no/such is neither"),
        (["convert", "-o", "OUT"], "nothing to convert"),
        (["plan", "no/such", "--offline"], "no/such is neither"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes(
    tiny_base: Path, parts: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"PARTS": str(parts), "OUT": str(tmp_path / "out"), "BASE": str(tiny_base)}
    assert main([places.get(word, word) for word in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_lite_models_have_nothing_of_this(model: Path, category: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["merge", str(model)], ["tune-features", str(model), str(category)]):
        assert main([*command, "-o", str(tmp_path / "out")]) == 1
        assert "a lite model" in capsys.readouterr().err
    new = str(tmp_path / "new")
    assert main(["calibrate", str(model), str(category), "-o", new, "-q"]) == 0
    assert np.isclose(Glad.from_pretrained(new).calibration_.threshold.value, Glad.from_pretrained(model).calibration_.threshold.value)
