"""The exact matrix of chosen entries."""
