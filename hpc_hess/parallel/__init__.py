"""Processes and what lies on them: launchers, the world, layouts, vectors."""
