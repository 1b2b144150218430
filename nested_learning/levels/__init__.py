"""Levels: memories and MLPs on clocks of their own."""
