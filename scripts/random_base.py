"""Write a base of the full size of Stable Diffusion v1-4 and DINO ViT-B/8, with random weights: python scripts/random_base.py FOLDER.

For measuring time and memory where no weights can be downloaded (4.6 GB). What it draws is noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, ViTConfig, ViTModel

from gladad.models.stable_diffusion.architectures import SD14


def main(folder: Path) -> None:
    """Write ``folder/sd`` and ``folder/dino``."""
    torch.manual_seed(0)
    sd = folder / "sd"
    UNet2DConditionModel.from_config(SD14.unet).save_pretrained(sd / "unet")
    AutoencoderKL.from_config(SD14.vae).save_pretrained(sd / "vae")
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408)
    CLIPTextModel(text).save_pretrained(sd / "text_encoder")
    words = ["<|startoftext|>", "<|endoftext|>", *(chr(97 + n) + end for n in range(26) for end in ("", "</w>"))]
    (sd / "tokenizer").mkdir(parents=True, exist_ok=True)
    (sd / "tokenizer" / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (sd / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    places = (str(sd / "tokenizer" / name) for name in ("vocab.json", "merges.txt"))
    CLIPTokenizer(*places, model_max_length=77).save_pretrained(sd / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ).save_pretrained(sd / "scheduler")
    ViTModel(ViTConfig(**SD14.features), add_pooling_layer=False).save_pretrained(folder / "dino")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
