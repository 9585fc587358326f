"""hpc-hess run: a spectrum, its page and what the terminal shows of it."""
