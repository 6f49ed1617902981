"""A Stable Diffusion base and a ViT of real classes with random weights, small enough to build in a second."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WIDTH = 32


def build_base(folder: Path, *, patch_size: int = 8, prediction_type: str = "epsilon") -> Path:
    """Write ``folder/sd`` and ``folder/dino``, the same bytes every time; returns the folder."""
    # here, as pytest reads this module in every process before any test, also in those that need no base
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=64,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=80,
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        vit = ViTModel(
            ViTConfig(
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=3,
                image_size=64,
                patch_size=patch_size,
                initializer_range=0.2,
            ),
            add_pooling_layer=False,
        )
    vae.save_pretrained(folder / "sd" / "vae")
    unet.save_pretrained(folder / "sd" / "unet")
    text.save_pretrained(folder / "sd" / "text_encoder")
    tokenizer(folder / "words").save_pretrained(folder / "sd" / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "sd" / "scheduler")
    vit.save_pretrained(folder / "dino")
    return folder


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that spells."""
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny base, as `GladPipeline.from_base` takes it. Read only."""
    return build_base(tmp_path_factory.mktemp("base"))
