"""What every run and command works with: problem, operator, memory, requests to stop, products kept in part."""
