"""A fit that goes on: new good images are learnt, old ones are replayed, and what the thresholds are made from is never trained on."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, draw_part
from PIL import Image

from gladad.cli.main import main
from gladad.core.errors import ConfigError, DataError, ModelFormatError
from gladad.data.samples import file_digest
from gladad.detector.extend import _set_apart
from gladad.detector.glad import Glad
from gladad.models.feature_diffusion.past import MOST, PAST_FILE, Past, load_past, save_past, spread

SETTINGS = TINY | {"training.steps": 40, "false_reject_rate": 0.2, "calibration": "held-out"}


def stained(seed: int) -> Image.Image:
    """A part with a bright square, which is not bad."""
    pixels = np.array(draw_part(seed)[0])
    pixels[26:42, 26:42] = 230
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    for number in range(32):
        draw_part(number)[0].save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def both(old, tmp_path_factory):
    """Old and new images in one folder."""
    folder = tmp_path_factory.mktemp("both") / "good"
    shutil.copytree(old, folder)
    for number in range(12):
        stained(800 + number).save(folder / f"new{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def keeping(old):
    """A detector that keeps latents."""
    return Glad.from_base("lite", settings=SETTINGS | {"training.keep_latents": True}).fit(old)


@pytest.fixture(scope="module")
def folder(keeping, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "old"
    keeping.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def extended(folder, both):
    return Glad.from_pretrained(folder).extend(both)


def seen(detector):
    return detector._fitted.seen


def scores(detector, images):
    return np.array([detector.inspect(image, reconstruct=False).pred_score for image in images])


def test_new_parts_become_normal_and_old_ones_stay_so(keeping, extended):
    new, plain = [stained(seed) for seed in range(900, 912)], [draw_part(seed)[0] for seed in range(500, 512)]
    bad = [draw_part(seed, defective=True)[0] for seed in range(600, 612)]
    assert np.median(scores(extended, new)) < 0.6 * np.median(scores(keeping, new))
    assert (scores(extended, plain) > 1).mean() <= 0.25
    assert (scores(extended, bad) > 1).mean() == 1
    assert np.median(scores(extended, bad)) > 2 * np.median(scores(extended, [*new, *plain]))


def test_nothing_that_is_held_out_is_trained_on(keeping, extended, both):
    before, after = seen(keeping), seen(extended)
    assert not after.trained & after.held_out
    assert before.trained < after.trained and before.held_out < after.held_out
    assert len(after.trained | after.held_out) == 44
    new = {file_digest(path) for path in both.glob("new*")}
    assert (len(new & after.trained), len(new & after.held_out)) == (10, 2)
    assert extended.calibration_.threshold.n == len(after.held_out) == len(before.held_out) + 2
    assert extended.provenance_["continued"] == [{"learnt": 10, "held_out": 2}]


def test_a_held_out_image_stays_so_whatever_its_name(folder, both, tmp_path):
    """Renaming must not make an image trainable."""
    known = seen(Glad.from_pretrained(folder))
    for number, path in enumerate(sorted(both.iterdir(), key=file_digest)):
        shutil.copyfile(path, tmp_path / f"{number:03}.png")
    after = seen(Glad.from_pretrained(folder).extend(tmp_path))
    assert known.held_out <= after.held_out and not known.held_out & after.trained


def test_the_networks_and_the_memory_go_on_from_where_they_were(keeping, extended):
    for before, after in zip(keeping.model_.all_scales(), extended.model_.all_scales(), strict=True):
        assert torch.equal(before.space.basis, after.space.basis)
        weights = [torch.cat([p.flatten() for p in scale.denoiser.parameters()]) for scale in (before, after)]
        distance = float((weights[1] - weights[0]).norm() / weights[0].norm())
        assert 0 < distance < 0.5
        assert len(before.memory.rows) == len(after.memory.rows) == before.capacity
        assert int(after.memory.owner.max()) >= len(seen(keeping).trained) > int(before.memory.owner.max())
        assert before.usual_energy != after.usual_energy
    assert extended.model_id != keeping.model_id


def test_old_images_need_not_be_there(folder, both, tmp_path, extended):
    """But those that the thresholds are made from must: the result is the same, to the last bit."""
    known = seen(Glad.from_pretrained(folder))
    for path in both.iterdir():
        if file_digest(path) not in known.trained:
            shutil.copyfile(path, tmp_path / path.name)
    again = Glad.from_pretrained(folder).extend(tmp_path)
    assert (again.model_id, again.calibration_id) == (extended.model_id, extended.calibration_id)


def test_without_latents_the_old_images_are_looked_at_again(folder, old, both, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/base" / PAST_FILE).unlink()  # as if none had been kept
    detector = Glad.from_pretrained(tmp_path / "model")
    assert not detector.model_.has_past
    again = Glad.from_pretrained(tmp_path / "model").extend(both)
    assert again.model_.has_past
    again.save_pretrained(tmp_path / "model")
    more = tmp_path / "more"
    more.mkdir()
    for path in both.iterdir():
        if file_digest(path) in seen(again).held_out:
            shutil.copyfile(path, more / path.name)
    stained(990).save(more / "one.png")
    once_more = Glad.from_pretrained(tmp_path / "model").extend(more)
    assert [each["learnt"] for each in once_more.provenance_["continued"]] == [10, 1]

    new_only = [path for path in sorted(both.iterdir()) if path.name.startswith("new")]
    known = [path for path in sorted(both.iterdir()) if file_digest(path) in seen(detector).held_out]
    before = detector.model_id, detector.calibration_id
    with pytest.raises(DataError, match=r"keeps no latents .* are missing; give them too"):
        detector.extend([*new_only, *known])
    assert (detector.model_id, detector.calibration_id) == before
    with pytest.raises(DataError, match="known to the model"):
        detector.extend(old)
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for path in sorted(both.iterdir()):  # the memory's numbers mean other images now
        shutil.copyfile(path, shuffled / f"{file_digest(path)[:8]}.png")
    with pytest.raises(DataError, match="order now"):
        detector.extend(shuffled)


def test_latents_travel_with_the_model_and_are_no_part_of_it(folder, keeping, tmp_path):
    loaded = Glad.from_pretrained(folder)
    assert loaded.model_id == keeping.model_id == loaded._fitted.digest()[:16]
    loaded.set_false_reject_rate(0.3)
    loaded.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other/base" / PAST_FILE).read_bytes() == (folder / "base" / PAST_FILE).read_bytes()
    past = load_past(folder / "base" / PAST_FILE, 2)
    scale = keeping.model_.all_scales()[1]
    assert past[1].normal.shape[1:] == (scale.dimensions, *scale.grid) and past[1].normal.dtype == torch.float16
    assert past[0].source.max() < len(past[0].normal)
    assert not set(past[0].owner.tolist()) & set(past[0].usual_owner.tolist())


def test_numbers_of_what_anomalies_are_of_survive_joining():
    def some(count: int, first: int) -> Past:
        rows = torch.arange(first, first + count).view(-1, 1, 1, 1).half()
        numbers = torch.arange(count)
        return Past(rows, numbers + first, rows[:0], numbers[:0], numbers[:0] > 0, rows, numbers)

    joined = some(70, 0).joined(some(30, 70)).thinned()
    assert len(joined.normal) == 100 and len(joined.anomalous) == 64
    assert torch.equal(joined.normal[joined.source], joined.anomalous)
    for turn in range(1, 30):  # however often it goes on
        joined = joined.joined(some(50, 50 + 50 * turn)).thinned()
        assert len(joined.normal) <= MOST and len(joined.anomalous) <= 64
        assert torch.equal(joined.normal[joined.source], joined.anomalous)
        assert torch.equal(joined.normal.flatten().long(), joined.owner)
    assert len(joined.normal) == MOST
    assert 3 <= (joined.owner < 155).sum() <= 30 and 3 <= (joined.owner >= 1395).sum() <= 30  # a tenth each of all
    assert torch.equal(joined.thinned().owner, joined.owner)
    assert spread(torch.arange(10), 3).tolist() == [0, 4, 9]


def test_a_model_of_others_is_refused(old, both, folder):
    with pytest.raises(ConfigError, match="fit it anew"):
        Glad.from_base("memory-bank", settings={"image_size": 64, "false_reject_rate": 0.2}).fit(old).extend(both)
    known = Glad.from_pretrained(folder)
    known._set(replace(known._fitted, seen=None))  # saved by a version that kept no record of its images
    with pytest.raises(ConfigError, match="held out"):
        known.extend(both)


def test_latents_of_another_model_are_refused(folder, tmp_path):
    save_past(tmp_path / PAST_FILE, load_past(folder / "base" / PAST_FILE, 1))
    with pytest.raises(Exception, match="of another model"):
        load_past(tmp_path / PAST_FILE, 2)


def test_parts_that_come_one_at_a_time_are_held_out_as_often(tmp_path):
    earlier, batches = [], [1] * 23 + [12, 2, 1, 4, 1, 1]
    for turn, size in enumerate(batches):
        new = [tmp_path / f"{turn}-{number}.png" for number in range(size)]
        trained, apart = _set_apart(new, earlier, 0)
        assert sorted([*trained, *apart]) == sorted(new)
        earlier.append({"learnt": len(trained), "held_out": len(apart)})
        assert sum(each["held_out"] for each in earlier) == sum(batches[: turn + 1]) // 5
    assert _set_apart(new, [{"learnt": 1, "held_out": 9}], 0) == (new, [])  # enough already


def test_one_part_that_is_held_out_makes_thresholds_only(folder, old, tmp_path):
    shutil.copytree(old, tmp_path / "all")
    stained(970).save(tmp_path / "all/one.png")
    detector = Glad.from_pretrained(folder)
    detector._set(replace(detector._fitted, provenance=detector.provenance_ | {"continued": [{"learnt": 4, "held_out": 0}]}))
    before = detector.model_id, detector.calibration_.threshold.n
    detector.extend(tmp_path / "all")
    assert (detector.model_id, detector.calibration_.threshold.n) == (before[0], before[1] + 1)
    assert file_digest(tmp_path / "all/one.png") in seen(detector).held_out
    with pytest.raises(DataError, match=r"known to the model, 7 of them held out for its thresholds, which stay so; .* fit it anew"):
        detector.extend(tmp_path / "all")


def test_latents_that_were_replaced_or_removed_since_loading_are_told(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    detector = Glad.from_pretrained(tmp_path / "model")
    assert detector.model_.past()[0].owner.tolist()
    path = tmp_path / "model/base" / PAST_FILE
    content = path.read_bytes()
    path.unlink()
    for _ in range(2):  # removed, then replaced
        with pytest.raises(ModelFormatError, match=r"latents.safetensors: was replaced or removed since the model was loaded"):
            detector.model_.past()
        path.write_bytes(content)
    Glad.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")
    detector = Glad.from_pretrained(tmp_path / "model")
    detector.save_pretrained(tmp_path / "model")  # onto itself
    assert detector.model_.past()[0].owner.tolist()


def test_the_command(folder, both, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["fit", str(both), "--continue", str(folder), "-o", str(out), "-q"]) == 0
    assert Glad.from_pretrained(out).provenance_["continued"] == [{"learnt": 10, "held_out": 2}]
    for other in (["--set", "training.steps=3"], ["--checkpoint-every", "5"], ["--multi-class"], ["--base", "sd14"]):
        assert main(["fit", str(both), "--continue", str(folder), "-o", str(tmp_path / "no"), *other]) == 1
        assert "leave out all options" in capsys.readouterr().err


def test_what_is_tolerated_stays_so(old, both, tmp_path):
    detector = Glad.from_base("lite", settings=SETTINGS | {"tolerate": ["noise", "shift"]}).fit(old)
    detector.extend(both)
    assert len(detector.provenance_["continued"]) == 1 and detector.calibration_.threshold.tolerated == ("noise", "shift")
    for scale, past in zip(detector.model_.all_scales(), detector.model_.past(), strict=True):
        assert past.usual_varied.any() and not past.usual_varied.all() and float(scale.usual_level[3]) > float(scale.usual_level[1])
    detector.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.model_.past()[0].usual_varied, detector.model_.past()[0].usual_varied)
