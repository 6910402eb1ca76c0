"""The page, the demo and the drawings that both show."""
