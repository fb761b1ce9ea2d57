"""Rivals of star and ensemble that take a training of their own: SWAG, a student."""
