"""The commands, a folder each: a run, its check and its plan, scaling, training, and what sketches are for.

Each is one collective function of a configuration, a World and what was asked; it returns the exit code.
"""
