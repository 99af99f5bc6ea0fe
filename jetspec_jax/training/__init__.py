"""Training of draft heads: prompts, recorded answers of the target, packing, loss, trainer."""
