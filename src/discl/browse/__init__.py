"""`discl browse`: a run folder in the browser, served on this machine only."""
