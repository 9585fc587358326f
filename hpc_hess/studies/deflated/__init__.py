"""The spectrum without its outliers."""
