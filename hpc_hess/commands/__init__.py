"""The commands beside a run: training with checkpoints, spectra of a list of models, and what sketches are for.

Each is one collective function of a configuration, a World and what was asked; it returns the exit code.
"""
