"""Measurements: quality of the pictures, speed of the ops and of the model."""
