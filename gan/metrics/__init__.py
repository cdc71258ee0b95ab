"""How good a generator is, in numbers: FID, KID, precision and recall, IS, PPL, and SWD, which needs no detector."""
