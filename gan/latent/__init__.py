"""Working with a trained generator: sampling, and the latents that images come from."""
