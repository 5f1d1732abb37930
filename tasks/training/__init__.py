"""Trainings in a study: their config, their pictures on disk, and the stage."""
