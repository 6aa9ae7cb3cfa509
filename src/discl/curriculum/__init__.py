"""Phase 2: learn from real images and a spectrum, level by level."""
