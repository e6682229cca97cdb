"""Pipeline schedules: verified, lowered to sends and receives, costed and drawn. Nothing here imports torch."""
