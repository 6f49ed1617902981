"""The paper's form: a Stable Diffusion and a ViT."""
