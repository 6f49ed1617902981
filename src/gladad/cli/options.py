"""Options of the commands that stand for settings, as tables: a flag, and the setting that it is a short name of.

``--set NAME=VALUE`` reaches every setting, so a table holds only those that people ask for often.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

DIFFUSION, RUNNING = "Stable Diffusion models", "Running long trainings"
Calibration = Literal["auto", "held-out", "cross-fit"]
Foreground = Literal["all", "bright", "dark", "auto"]
Speed = Literal["exact", "balanced", "fast"]
Precision = Literal["float32", "bfloat16", "float16"]


def _size(text: str) -> int:
    """Bytes of a size such as ``16GiB``, ``900M`` or ``24``, which are gibibytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a size; write one like 16GiB")
    return int(float(match[1]) * 2 ** {"k": 10, "m": 20, "": 30, "g": 30, "t": 40}[match[2]])


def _names(text: str) -> list[str]:
    """Of ``light,noise``; none of ``none``."""
    return [] if text.strip() == "none" else [name.strip() for name in text.split(",")]


@dataclass(frozen=True)
class Option:
    """One option."""

    flag: str  # such as --batch-size; with /--no-... it has two forms
    kind: Any  # type of its value
    help: str  # with the default where that is not obvious
    panel: str | None = None  # heading that it stands below in the help
    setting: str = ""  # dotted name of the setting, where that is not the option's own
    parser: Callable[[str], Any] | None = None  # of the text, for kinds that typer does not know
    metavar: str = "SIZE"  # what the help calls a text that is parsed

    @property
    def name(self) -> str:
        """Of the command's parameter."""
        return self.flag.split("/")[0].removeprefix("--").replace("-", "_")

    @property
    def parameter(self) -> inspect.Parameter:
        """As a parameter of a command; None where it was not given."""
        extra: dict[str, Any] = {} if self.parser is None else {"parser": self.parser, "metavar": self.metavar}
        told = typer.Option(self.flag, help=self.help, show_default=False, rich_help_panel=self.panel, **extra)
        kind: Any = Annotated[(self.kind | None, told)]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def collects(**tables: Sequence[Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: for each table, the command's parameter of its name gets a dict of setting -> value of those options that were given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values() if p.name not in tables]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters += [option.parameter for table in tables.values() for option in table]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for name, table in tables.items():
                values = {option.setting or option.name: given.pop(option.name) for option in table}
                given[name] = {key: str(v) if isinstance(v, Path) else v for key, v in values.items() if v is not None}
            command(**given)

        run.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


SET_HELP = "Any setting, such as training.steps=900; may be repeated."
Set = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=SET_HELP, show_default=False)]
_TRAINING = (
    ("--training", "method", Literal["lora", "full"], "Adapters, or all weights as in the paper (default: lora; full with a preset)."),
    ("--rank", "rank", int, "Rank of the adapters (default: 16)."),
    ("--layers", "layers", Literal["attention", "all"], "Layers that are adapted (default: attention)."),
    ("--batch-size", "batch_size", int, "Images per step, of all processes together (default: 4; 32 with a preset)."),
    ("--micro-batch", "micro_batch", int, "Images at a time; gradients are accumulated (default: all)."),
    ("--learning-rate", "learning_rate", float, "Learning rate (default: 1e-4 for lora, 5e-6 for full)."),
    ("--precision", "precision", Precision, "Of the arithmetic (default: bfloat16)."),
    ("--optimizer", "optimizer", Literal["adamw", "adamw8bit", "muon"], "adamw8bit needs bitsandbytes (default: adamw; small: muon)."),
    ("--ema", "ema", float, "Decay of averaged weights, which are then kept (default: 0: none)."),
    ("--gradient-checkpointing/--no-gradient-checkpointing", "gradient_checkpointing", bool, "Compute twice, don't keep (default: on)."),
)
DENOISER = tuple(Option(flag, kind, text, DIFFUSION, f"training.{name}") for flag, name, kind, text in _TRAINING)
WEIGHTS = (
    Option(
        "--features",
        str,
        "Extractor: folder or Hub id, for lite also efficientnet-lite2 (default: facebook/dino-vitb8; lite: efficientnet-lite0).",
        DIFFUSION,
    ),
    Option("--vae", str, "Autoencoder that replaces the base's: folder or Hub id.", DIFFUSION),
    Option("--revision", str, "Branch, tag or commit on the Hub.", DIFFUSION),
    Option("--offline", bool, "Never ask the Hub.", DIFFUSION),
)
SEED = Option("--seed", int, "Seed of everything random (default: 0).")
TOLERATE_HELP = "Harmless changes that good parts may show: light,noise,focus,compression,shift (default: none)."
FIT = (
    Option("--minutes", float, "Time budget of the training.", setting="training.minutes"),
    Option("--steps", int, "Steps of each training; 0 only calibrates a trained Stable Diffusion.", setting="training.steps"),
    SEED,
    Option("--false-reject-rate", float, "Share of good parts that may be rejected (default: 0.01)."),
    Option("--textures", Path, "Folder of images to make defects from."),
    Option("--foreground", Foreground, "Part of the image where defects are made; auto decides by the good images (default: all)."),
    Option("--image-size", int, "Side in pixels to work at (default: that of the images, from 256 to 384; Stable Diffusion: 512)."),
    Option("--tiles", int, "Cut large images into so many tiles per side, for tiny defects (default: 1)."),
    Option("--align", bool, "Turn and crop the images so that parts before an even ground lie alike."),
    Option("--max-images", int, "Good images used at most (default: 1000)."),
    Option("--shots", int, "Learn from so few good images (1, 2, 4, 8)."),
    Option("--calibration", Calibration, "Images the threshold is made from (default: auto: cross-fit below 24)."),
    Option("--tolerate", list, TOLERATE_HELP, parser=_names, metavar="NAMES"),
    Option("--preset", str, "Published constants, such as mvtec_ad/bottle.", DIFFUSION),
    Option("--speed", Speed, "Of inspections: exact, balanced or fast, see docs/speed.md (default: exact).", DIFFUSION),
    Option("--prompt", str, "What the denoiser is told (default: 'a photo of sks', and the product if several).", DIFFUSION),
    *WEIGHTS,
    *DENOISER,
)
RUN = (
    Option("--training-folder", Path, "For checkpoints and logs (default: OUTPUT.training).", RUNNING, "folder"),
    Option("--checkpoint-every", int, "Steps between checkpoints (default: 500).", RUNNING),
    Option("--keep", int, "Newest checkpoints kept (default: 2).", RUNNING),
    Option("--tracker", str, "TensorBoard if installed (auto, the default), none, or one of accelerate's.", RUNNING),
    Option("--sample-every", int, "Steps between example pictures (default: 500).", RUNNING),
)
MEMORY_HELP = "Refuse a training that needs more, such as 16GiB (default: what is free)."
MEMORY = Option("--memory-limit", int, MEMORY_HELP, RUNNING, parser=_size)
MICRO_BATCH = Option("--micro-batch", int, "Images at a time; gradients are accumulated.")
FEATURE_TUNING = (
    Option("--epochs", int, "Passes over the images (default: 15)."),
    Option("--steps", int, "Training steps instead."),
    Option("--batch-size", int, "Images per step (default: 32)."),
    MICRO_BATCH,
    Option("--anchor-weight", float, "How much the tuned extractor is held to the frozen one (default: 0.01)."),
    SEED,
)
AUTOENCODER_TUNING = (
    Option("--steps", int, "Training steps (default: 2000)."),
    Option("--batch-size", int, "Images per step (default: 4)."),
    MICRO_BATCH,
    Option("--discriminator", bool, "Train against a discriminator, too."),
    Option("--precision", Precision, "Of the arithmetic (default: float32)."),
    SEED,
)
CONVERSION = (
    Option("--unet", Path, "pytorch_model.bin of a denoiser."),
    Option("--features", Path, ".pth of a DINO ViT."),
    Option("--tuned-features", Path, ".pth of a fine-tuned one, which scores."),
    Option("--vae", Path, ".ckpt of an autoencoder."),
    Option("--extractor", str, "Folder or Hub id of the ViT's architecture."),
    Option("--prompt", str, "What the denoiser was trained with (default: a photo of sks)."),
    Option("--revision", str, "Branch, tag or commit of the base."),
    Option("--offline", bool, "Never ask the Hub.", setting="local_files_only"),
)
