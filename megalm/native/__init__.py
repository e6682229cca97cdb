"""Builds csrc/: finds the tools, compiles with ninja, keeps what it built.

It serves two callers that see different worlds. ``setup.py`` runs where torch may be installed beside the build but not
in it; a running program builds what its installation could not. So everything here needs the standard library alone:
torch is found and never imported.
"""
