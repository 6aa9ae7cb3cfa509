"""Phase 2: which level now, and what an epoch draws. Pure functions."""
