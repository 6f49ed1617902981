"""Products that are made for a benchmark: drawn by rule, or taken out of packages."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_part
from PIL import Image
from scipy import ndimage

from gladad.benchmark import generated
from gladad.benchmark.config import BenchmarkConfig, Configuration, DatasetEntry
from gladad.benchmark.generated import PRODUCTS, write
from gladad.benchmark.products import MADE, make, prepared
from gladad.core.errors import ConfigError
from gladad.core.images import list_images, load_image, load_mask
from gladad.data.layouts import read_dataset


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_drawn_product(product: str, tmp_path: Path) -> None:
    folder, again = (write(tmp_path / name, product, train=2, good=1, defective=2) for name in ("a", "b"))
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    assert len(paths) == 2 + 1 + 3 * 2 * 2
    assert all((folder / path).read_bytes() == (again / path).read_bytes() for path in paths)
    pictures = {load_image(path).tobytes() for path in list_images(folder / "train") + list_images(folder / "test")}
    assert len(pictures) == 2 + 1 + 6  # no two are alike
    for mask in list_images(folder / "ground_truth"):
        assert 4 < load_mask(mask).sum() < 0.02 * 384**2, mask  # every defect shows, and none is large


def test_the_ground_is_shaded_by_the_filter() -> None:
    noise = np.random.default_rng(0).normal(size=(generated.SIDE, generated.SIDE))
    found = generated._BLUR @ noise @ generated._BLUR.T
    np.testing.assert_allclose(found, ndimage.gaussian_filter(noise, generated.SIDE / 8), rtol=0, atol=1e-15)


def test_textures_get_a_disc_of_another(tmp_path: Path) -> None:
    for name, level in (("first", 40), ("second", 200)):
        (tmp_path / "dtd" / name).mkdir(parents=True)
        for index in range(9):
            grain = np.random.default_rng(index).normal(level, 5, (60, 80, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(grain).save(tmp_path / "dtd" / name / f"{index}.png")
    assert (
        make("texture_1", tmp_path / "made", tmp_path) == "" == make("texture_1", tmp_path / "made", tmp_path)
    )  # the second time it is there
    root = tmp_path / "made" / "texture_1"
    for path in list_images(root / "test" / "foreign"):
        mask = load_mask(root / "ground_truth" / "foreign" / f"{path.stem}_mask.png")
        pixels = load_image(path)
        assert pixels[mask].mean() > 150 > 100 > pixels[~mask].mean()
    dataset = read_dataset(root, "auto")
    learnt = {path.resolve() for path in list_images(root / "train")}
    assert learnt and learnt.isdisjoint(path.resolve() for path in list_images(root / "test" / "good")) and dataset.samples
    assert "no such folder" in make("texture_2", tmp_path / "made", tmp_path)


def test_a_benchmark_makes_what_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "write", partial(generated.write, train=2, good=1, defective=1))
    draw_part(0)[0].save(tmp_path / "x.png")
    entries = DatasetEntry(name="Given"), DatasetEntry(name="Made", made=("texture_1", "tray"))
    wanted = BenchmarkConfig(title="t", dataset=entries, configuration=(Configuration(name="lite"),))
    found, notes = prepared(wanted, tmp_path / "made", tmp_path)
    assert found.dataset[0] == entries[0] and found.dataset[1].categories == ("tray",)
    assert Path(found.dataset[1].path) == tmp_path / "made" and notes == [
        f"Made: left out texture_1, because {tmp_path / 'dtd'}: no such folder of textures"
    ]
    assert set(PRODUCTS) < set(MADE)
    with pytest.raises(ConfigError, match="no product 'spoon' can be made; there are"):
        prepared(
            BenchmarkConfig(title="t", dataset=(DatasetEntry(name="M", made=("spoon",)),), configuration=wanted.configuration),
            tmp_path,
            tmp_path,
        )
