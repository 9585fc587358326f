"""What people see: progress, figures, the report page, summaries."""
