"""checkpoint → bundle."""
