"""Algorithms on operators and vectors: probes, Lanczos, quadrature. No processes, files or models here."""
