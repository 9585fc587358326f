"""Block-diagonal approximations, and the spectra of blocks on their own."""
