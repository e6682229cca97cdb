"""Plugins: hook specifications, the contracts that components follow, discovery and loading. Never imports torch."""
