"""What a model's memories hold and do: recorded, read back, traced to its sources."""
