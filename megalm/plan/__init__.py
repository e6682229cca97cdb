"""What a run will cost on a layout, before it is started. See docs/planning.md."""
