"""The faults of real inputs, each with its right value; one module a section."""
