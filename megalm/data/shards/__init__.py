"""Preparation in pieces: each becomes a small folder, made by one of several processes; at the end they are joined."""
