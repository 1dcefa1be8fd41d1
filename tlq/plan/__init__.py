"""What a job will need: memory, disk and time."""
