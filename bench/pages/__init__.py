"""Pages that a command writes and a test keeps up to date."""
