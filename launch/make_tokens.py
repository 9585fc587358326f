"""Write the token files that models without a tokenizer run on (the toy and the random 70 B shape); numbers, no text.

``toy_tokens.npy``: 4,096 bytes of northanger_abbey.txt, one token a byte.
``llama3_tokens.npy``: 65,536 random ids below 128,000 with Zipf's frequencies, so that the loss meets rare and frequent
tokens as it does in text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

here = Path(__file__).parent / "data"
text = (here / "northanger_abbey.txt").read_bytes()
np.save(here / "toy_tokens.npy", np.frombuffer(text[:4096], dtype=np.uint8).astype(np.int32))

generator = np.random.default_rng(0)
ranks = np.arange(1, 128_001)
weights = 1.0 / ranks
ids = generator.permutation(128_000)[generator.choice(128_000, size=65_536, p=weights / weights.sum())]
np.save(here / "llama3_tokens.npy", ids.astype(np.int32))
