"""Phase 1: make the images."""
