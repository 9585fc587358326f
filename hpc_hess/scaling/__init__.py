"""What a run costs: traced without doing it, measured, fitted, and predicted for the next, larger one."""
