"""Projects, models, rows and stand-ins that several tests share."""
