"""Measured separately; nothing imports it."""
