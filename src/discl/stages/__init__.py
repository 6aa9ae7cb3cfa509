"""One file per command; each does only what is missing in the run folder."""
