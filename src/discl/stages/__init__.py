"""The stages of a run, each a function of an open run that does only what is missing."""
