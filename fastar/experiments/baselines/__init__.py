"""What star and ensemble are compared with that takes a training of its own: SWAG, a student."""
