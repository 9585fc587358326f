"""Models: found, built without weights, sharded, filled; data; the loss and its gradient."""

import os

# What is loaded lies on disk: model/sources/hub.py alone goes to the network, for names, unless a user keeps it offline.
# Set before transformers loads. The second variable tells later readers, of child processes too, who set the first.
if "HF_HUB_OFFLINE" not in os.environ:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HPC_HESS_NAMES_ONLINE": "1"}
