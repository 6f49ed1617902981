"""The published constants: every number against a second transcription, and files with mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gladad.core.errors import ConfigError
from gladad.models.stable_diffusion.family import from_preset
from gladad.models.stable_diffusion.presets import FOLDER, MULTI_CLASS, category_preset, load_preset, preset_names, read_presets

# category: max_step min_step delta v train_steps extractor_epoch (- = not tuned)
TABLES = {
    "mvtec_ad": """
        carpet 750 350 .32 0 2000 - | grid 750 350 .47 0 3000 - | leather 750 350 .35 0 2500 - | tile 750 350 .35 0 500 -
        wood 750 350 .37 0 1000 - | bottle 750 350 .32 0 2500 - | cable 750 350 .40 0 1500 - | capsule 600 350 .40 0 2000 -
        hazelnut 750 350 .50 0 3500 - | metal_nut 750 350 .40 0 2500 - | pill 750 350 .35 0 1500 - | screw 750 350 .32 0 3000 -
        toothbrush 750 350 .50 0 500 - | transistor 850 350 .50 0 2500 - | zipper 750 350 .35 0 1000 -
        multi_class 650 350 .45 0 20000 -""",
    "mpdd": """
        bracket_black 500 350 .35 0 2500 - | bracket_brown 500 350 .35 0 7000 - | bracket_white 450 200 .35 0 1000 -
        connector 500 350 .35 0 1000 - | metal_plate 500 350 .35 0 2500 - | tubes 500 350 .10 0 500 -
        multi_class 500 350 .35 0 3000 -""",
    "visa": """
        candle 450 200 .45 7 4000 1 | capsules 450 200 .40 7 4000 4 | cashew 450 200 .40 1 4000 7 | chewinggum 450 200 .45 1 4000 7
        fryum 450 200 .35 2 4000 1 | macaroni1 450 200 .45 7 4000 1 | macaroni2 450 200 .45 7 4000 8 | pcb1 450 200 .30 1 4000 7
        pcb2 450 200 .30 2 4000 6 | pcb3 450 200 .30 2 4000 9 | pcb4 450 200 .30 2 4000 0 | pipe_fryum 450 200 .45 2 4000 2
        multi_class 500 250 .15 2 20000 -""",
    "pcb_bank": """
        pcb1 450 200 .30 1 4000 7 | pcb2 450 200 .30 2 4000 6 | pcb3 450 200 .30 2 4000 9 | pcb4 450 200 .30 2 4000 0
        pcb5 450 200 .40 2 4000 7 | pcb6 450 200 .45 1 4000 14 | pcb7 450 200 .30 2 4000 1
        multi_class 500 250 .20 1 20000 1""",
}
ROWS = [(data, *row.split()) for data, text in TABLES.items() for line in text.strip().splitlines() for row in line.split("|")]
CATEGORIES = {"mvtec_ad": 15, "mpdd": 6, "visa": 12, "pcb_bank": 7}
SYNTHESIS = {
    "dark": "screw bottle capsule zipper bracket_black bracket_brown metal_plate",
    "bright": """hazelnut pill metal_nut toothbrush candle cashew chewinggum fryum macaroni1 macaroni2 pipe_fryum bracket_white""",
}
SCORING = {"dark": "screw capsule bracket_black bracket_brown", "bright": "bracket_white"}


def foreground_of(category: str, lists: dict[str, str]) -> str:
    return next((side for side, names in lists.items() if category in names.split()), "all")


def test_every_category_is_there_once():
    names = preset_names()
    assert names == list(dict.fromkeys(names))
    assert set(names) == {f"{data}/{category}" for data, category, *_ in ROWS}
    for data, count in CATEGORIES.items():
        assert sum(name.startswith(f"{data}/") for name in names) == count + 1
        assert f"{data}/{MULTI_CLASS}" in names


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "/".join(row[:2]))
def test_every_published_number(row):
    data, category, max_step, min_step, delta, weight, steps, epoch = row
    preset = load_preset(f"{data}/{category}")
    multi = category == MULTI_CLASS
    chain = preset.reconstruction
    assert (preset.name, preset.category) == (f"{data}/{category}", category)
    assert (chain.max_step, chain.min_step, chain.step_threshold) == (int(max_step), int(min_step), float(delta))
    assert chain.num_steps == (15 if data in {"visa", "pcb_bank"} and not multi else 25)
    assert chain.noise_step == (int(max_step) - 1 if data in {"visa", "pcb_bank"} else None)
    assert (chain.adaptive, chain.fusion, chain.top_k) == (True, "sigmoid", 10)
    assert preset.scoring.pixel_weight == float(weight)
    assert preset.scoring.symmetric == (category in {"transistor", "pcb1", "pcb4"})
    assert (preset.scoring.blur_sigma, preset.scoring.blur_kernel, preset.scoring.top_k) == (6.0, 49, 250)
    assert preset.train_steps == int(steps)
    assert preset.extractor_epoch == (None if epoch == "-" else int(epoch))
    side = 256 if multi else 512
    assert preset.image_size == (side, side)
    assert preset.encode_size == (512, 512)
    assert preset.feature_size == ((512, 512) if data in {"mvtec_ad", "mpdd"} and not multi else (256, 256))
    assert preset.prompt == ("a photo of sks{category}" if multi else "a photo of sks")
    assert preset.guidance_scale == 9.0
    assert preset.synthesis_foreground == foreground_of(category, SYNTHESIS)
    assert preset.scoring_foreground == foreground_of(category, SCORING)
    assert from_preset(preset).training.apart == 0  # the published training is shown all good images
    assert preset.tuned_autoencoder == (category.startswith("pcb") or (multi and data in {"visa", "pcb_bank"}))


def test_provenance_is_visible():
    for name in preset_names():
        preset = load_preset(name)
        assert preset.tuned_on == "test"
        assert "2406.07487" in preset.source
        assert not preset.step_threshold_calibrated
    for path in FOLDER.glob("*.toml"):
        assert "on its test images" in path.read_text(encoding="utf-8").splitlines()[0]


def test_every_listed_foreground_is_of_a_category():
    known = {name.split("/")[1] for name in preset_names()}
    for lists in (SYNTHESIS, SCORING):
        assert {category for names in lists.values() for category in names.split()} <= known


def test_a_multi_class_preset_for_one_category():
    multi = load_preset("mvtec_ad/multi_class")
    own = category_preset(multi, "screw")
    assert own.prompt == "a photo of sksscrew"
    assert (own.scoring_foreground, own.synthesis_foreground) == ("dark", "dark")
    assert category_preset(multi, "transistor").scoring == replace(multi.scoring, symmetric=True)
    assert category_preset(multi, "tile") == replace(multi, prompt="a photo of skstile")
    with pytest.raises(ConfigError, match="of one category already"):
        category_preset(load_preset("visa/pcb1"), "pcb1")
    with pytest.raises(ConfigError, match="unknown preset 'mvtec_ad/candle'"):
        category_preset(multi, "candle")


@pytest.mark.parametrize(
    "name, near",
    [
        ("mvtec_ad/botle", "near are mvtec_ad/bottle"),
        ("bottle", "near are mvtec_ad/bottle"),
        ("visa/pcb7", "pcb_bank/pcb7"),
        ("mvtec/screw", "mvtec_ad/screw"),
        ("", "DATA_SET one of mpdd, mvtec_ad, pcb_bank, visa"),
        ("../presets_data/visa/pcb1", "unknown preset"),
    ],
)
def test_unknown_presets_name_near_ones(name, near):
    with pytest.raises(ConfigError, match="unknown preset") as error:
        load_preset(name)
    assert near in str(error.value)


DEFAULTS = """
[defaults]
tuned_on = "normal"
source = "here"
image_size = [64, 64]
encode_size = [64, 64]
feature_size = [32, 64]
prompt = "a photo"
guidance_scale = 1
reconstruction = { max_step = 300, min_step = 100 }
scoring = { symmetric = true }
scoring_foreground = "all"
synthesis_foreground = "dark"
train_steps = 10
"""


def test_a_category_overrides_the_defaults_key_by_key(tmp_path):
    own = '[category.one]\n[category.two]\nreconstruction.max_step = 200\nsynthesis_foreground = "bright"\n'
    (tmp_path / "mine.toml").write_text(DEFAULTS + own)
    one, two = read_presets(tmp_path / "mine.toml").values()
    assert (one.name, two.name) == ("mine/one", "mine/two")
    assert (one.reconstruction.max_step, one.reconstruction.min_step, one.synthesis_foreground) == (300, 100, "dark")
    assert one.feature_size == (32, 64)
    assert one.extractor_epoch is None
    assert two == replace(one, name="mine/two", synthesis_foreground="bright", reconstruction=replace(one.reconstruction, max_step=200))


@pytest.mark.parametrize(
    "own, message",
    [
        ("colour = 1", "mine.toml, category one: colour: unknown setting; known are"),
        ("reconstruction.steps = 3", "mine.toml, category one: reconstruction.steps: unknown setting; near are"),
        ("reconstruction.max_step = '750'", "mine.toml, category one: reconstruction.max_step: input should be a valid integer, not '750'"),
        ("train_steps = 1.5", "mine.toml, category one: train_steps: input should be a valid integer"),
        ("train_steps = -1", "mine.toml, category one: train_steps: input should be greater than or equal to 0"),
        ("scoring.symmetric = 1", "mine.toml, category one: scoring.symmetric: input should be a valid boolean, not 1"),
        ("scoring_foreground = 'light'", "mine.toml, category one: scoring_foreground: input should be 'all', .*, not 'light'"),
        ("image_size = 512", "mine.toml, category one: image_size: input should be a valid array, not 512"),
        ("image_size = [512]", r"category one: image_size\.1: is missing"),
        ("image_size = [512, 0]", r"category one: image_size\.1: input should be greater than or equal to 1, not 0"),
        ("feature_size = [512, 512.5]", r"category one: feature_size\.1: input should be a valid integer"),
        ("scoring = 3", "mine.toml, category one: scoring: input should be an object, not 3"),
        ("tuned_on = 'luck'", "mine.toml, category one: tuned_on: input should be 'test' or 'normal', not 'luck'"),
        ("source = 2024-09-30", "mine.toml, category one: .*date"),
        ("name = 'x'", r"mine.toml, category one: name: .*cannot be set"),
        ("[more]\na = 1", r"mine.toml: unknown table 'more'"),
        ("a = ", r"mine.toml: cannot be read as TOML"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, own, message):
    (tmp_path / "mine.toml").write_text(DEFAULTS + "[category.one]\n" + own)
    with pytest.raises(ConfigError, match=message):
        read_presets(tmp_path / "mine.toml")


def test_other_damaged_files(tmp_path):
    path = tmp_path / "mine.toml"
    with pytest.raises(ConfigError, match=r"mine.toml: cannot be read"):
        read_presets(path)
    path.write_text(DEFAULTS.replace('source = "here"\n', "") + "[category.one]\n")
    with pytest.raises(ConfigError, match=r"mine.toml, category one: source: is missing"):
        read_presets(path)
    path.write_text("category = 3\n")
    with pytest.raises(ConfigError, match=r"mine.toml: category must be a table"):
        read_presets(path)
    path.write_text("defaults = 3\n[category]\none = {}\n")
    with pytest.raises(ConfigError, match=r"mine.toml: defaults must be a table"):
        read_presets(path)
    path.write_text(DEFAULTS + "[category]\none = 4\n")
    with pytest.raises(ConfigError, match=r"mine.toml: one must be a table"):
        read_presets(path)


def test_a_preset_says_what_of_it_is_not_applied():
    assert load_preset("mvtec_ad/bottle").describe()["not_applied"] == []
    told = load_preset("visa/pcb1").describe()
    assert told["tuned_on"] == "test" and told["not_applied"][0] == "extractor fine-tuned for 8 epochs"
    assert "fine-tuned autoencoder" in told["not_applied"]
