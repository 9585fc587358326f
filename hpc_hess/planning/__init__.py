"""Memory and time of a run, predicted: traced without numbers, or by laws fitted to finished runs."""
