"""Phase 1: make the synthetic-to-real spectrum of the hard images."""
