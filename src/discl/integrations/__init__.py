"""The curriculum in other training loops."""
