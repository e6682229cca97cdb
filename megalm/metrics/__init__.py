"""What a run records and shows: metrics.jsonl, the console, summary.json and report.html. Free of torch."""
