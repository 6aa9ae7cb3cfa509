"""Processes that generate together."""
