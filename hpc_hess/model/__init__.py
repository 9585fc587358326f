"""Models: found, built without weights, sharded, filled; data; the loss and its gradient."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is on disk or it does not exist; set before transformers loads
