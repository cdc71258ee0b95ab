"""Train a StyleGAN2-ADA on your own images and work with the result."""
