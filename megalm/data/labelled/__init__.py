"""Labelled records from files, each with the place where it stands."""
