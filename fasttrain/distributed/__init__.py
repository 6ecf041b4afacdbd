"""From one process to many."""
