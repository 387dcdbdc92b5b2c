"""Reports as single HTML pages: numbers in, a page out, nothing fetched, no script."""
