"""Publishing: uploads, pushes, cards and Spaces."""
