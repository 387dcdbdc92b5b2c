"""Building memories, and calibrating how far they are trusted."""
