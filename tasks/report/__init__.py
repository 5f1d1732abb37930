"""The report of a run: one HTML page, from tables and arrays to charts, pictures and rows of a leaderboard."""
