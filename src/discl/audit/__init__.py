"""What a careful person checks before training: copies, leakage, and images that teach little."""
