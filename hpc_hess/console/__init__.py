"""What a terminal shows: progress, and numbers and sizes in words."""
