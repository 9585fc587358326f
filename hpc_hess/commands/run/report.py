"""hpc-hess report RUN: figures and report.html, drawn again from what the directory holds. One process."""

from hpc_hess.studies.run_page import rewrite_report

__all__ = ["rewrite_report"]
